"""The files for clusters: what is in them is read by those who will, and what can run here runs."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from ronna.base.config import build, dump_toml
from ronna.cli import parser
from ronna.runfile import PretrainRun

yaml = pytest.importorskip("yaml")


def words_after_ronna(command: str) -> list[str]:
    """The arguments of the command line `... -m ronna ...`."""
    words = shlex.split(command.replace("\\\n", " ").replace("&\n", "\n"))
    begin = next(i for i, (a, b) in enumerate(pairwise(words)) if (a, b) == ("-m", "ronna")) + 2
    words = [w for w in words[begin:] if w != "&"]
    return words[: words.index("--resume") + 1]


def test_kubernetes(repository):
    job = yaml.safe_load((repository / "deploy" / "kubernetes.yaml").read_text())
    assert job["kind"] == "JobSet" and job["spec"]["failurePolicy"]["maxRestarts"] > 0
    (ranks,) = job["spec"]["replicatedJobs"]
    spec = ranks["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    flags = dict(a.removeprefix("--").split("=") for a in container["args"] if a.startswith("--") and "=" in a)
    assert int(flags["nnodes"]) == spec["parallelism"] == spec["completions"] and spec["completionMode"] == "Indexed"
    assert int(flags["nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    host, port = flags["rdzv-endpoint"].split(":")
    assert host == f"{job['metadata']['name']}-{ranks['name']}-0-0.{job['metadata']['name']}"
    assert int(port) in [p["containerPort"] for p in container["ports"]]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    (saving,) = [int(v["value"]) for v in container["env"]]
    assert saving < pod["terminationGracePeriodSeconds"]
    parsed = parser().parse_args(words_after_ronna(shlex.join(container["args"])))
    assert parsed.verb_name == "pretrain" and parsed.resume


def test_skypilot(repository):
    task = yaml.safe_load((repository / "deploy" / "skypilot.yaml").read_text())
    assert subprocess.run(["bash", "-n"], input=task["run"], text=True, check=False).returncode == 0
    parsed = parser().parse_args(words_after_ronna(task["run"]))
    assert parsed.resume and parsed.file == "$RUN" and "RUN" in task["envs"]


def test_the_image_has_what_it_copies(repository):
    lines = (repository / "deploy" / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert copied and all((repository / name).exists() for name in copied)
    assert "USER ronna" in lines and 'ENTRYPOINT ["python"]' in lines


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """The variables of a job of one node, and commands that do as SLURM's would; what they were told is in `told`."""
    tools = tmp_path / "bin"
    tools.mkdir()
    told = tmp_path / "told"
    scripts = {
        "scontrol": f'echo "$@" >> {told}; [ "$1" != show ] || echo 127.0.0.1',
        "scancel": f'echo "scancel $@" >> {told}; pkill -TERM -f "bin/torchrun.*{tmp_path}"',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    }
    for name, script in scripts.items():
        (tools / name).write_text(f"#!/bin/bash\n{script}\n")
        (tools / name).chmod(0o755)
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "RONNA_RANKS_PER_NODE": "2"}
    return os.environ | job | {"PATH": path, "OMP_NUM_THREADS": "1", "RONNA_PORT": "0"}


def test_slurm_stops_in_time_queues_again_and_goes_on(repository, cluster, shards, tmp_path):
    out = tmp_path / "out"
    train = {"steps": 60, "batch": 4, "length": 32, "save_every": 1, "evaluate_every": 60}
    run = {"out": str(out), "device": "cpu", "model": {"name": "bert-tiny"}, "objective": {"kind": "mlm"}}
    run |= {"data": {"train": str(shards["wordpiece"])}, "train": train}
    file = tmp_path / "run.toml"
    file.write_text(dump_toml(build(PretrainRun, run, where="test")))
    command = ["bash", str(repository / "deploy" / "slurm.sh"), str(file)]
    job = subprocess.Popen(command, env=cluster, stderr=subprocess.PIPE, text=True)
    while not list(out.glob("checkpoints/step-????????")):
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=200)[1]
    told = (tmp_path / "told").read_text()
    assert "scancel --signal=TERM 7" in told and "requeue 7" in told, (told, said)
    assert not (out / "report.json").exists()
    done = subprocess.run(command, env=cluster, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "resuming from step-" in done.stderr, done.stderr
    assert json.loads((out / "report.json").read_text())["train"]["steps"] == 60
