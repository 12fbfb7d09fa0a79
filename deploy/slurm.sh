#!/bin/bash
# sbatch deploy/slurm.sh RUN.toml
# One torchrun a node; before its time is over the job saves, and queues itself again until the run has its report.
#SBATCH --job-name=ronna
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=ronna-%j.log
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-540}  # seconds that ranks have to save

run=${1:?usage: sbatch deploy/slurm.sh RUN.toml}
verb=${RONNA_VERB:-pretrain}
ranks=${RONNA_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# With --resume a run that has no checkpoint yet begins, and one that has goes on, whatever the number of nodes.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$ranks" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:${RONNA_PORT:-29500}" \
    -m ronna "$verb" "$run" --resume &
job=$!

# The system tells the batch shell alone; every rank then stops after the same step, with everything saved.
asked=
trap 'asked=1; scancel --signal=TERM "$SLURM_JOB_ID" || kill -TERM "$job"' TERM
code=0
wait "$job" || code=$?
if [ -n "$asked" ]; then
    code=0
    wait "$job" || code=$?
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
