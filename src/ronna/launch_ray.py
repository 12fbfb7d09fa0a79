"""Several ranks of a run on a Ray cluster, started by Ray Train, which starts all again where one is lost.

Each of its workers starts this command line with the variables of `torchrun`, so a run is the same as anywhere else.
All machines have the same files under the same paths, as they have on a cluster with a common file system.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from ronna.base.errors import RonnaError
from ronna.launch import FINAL, PROGRAM, refuse_nonsense


class Attempts:
    """An actor that all tries of a run report to: which one it is, and how each rank of it ended."""

    def __init__(self) -> None:
        self.count = 0
        self.codes: dict[int, int] = {}
        self.printed = ""

    def begin(self) -> int:
        self.count, self.codes = self.count + 1, {}
        return self.count

    def end(self, rank: int, code: int, printed: str) -> None:
        self.codes[rank] = code
        self.printed = printed or self.printed

    def outcome(self) -> tuple[list[int], str]:
        return list(self.codes.values()), self.printed


def launch_on_ray(ranks: int, arguments: Sequence[str], restarts: int, out: str, cards: bool) -> int:
    """Run this command line on as many of the cluster's workers, each with a core or, with `cards`, a GPU; the exit
    code is the largest of a rank's. Raises RonnaError where there is no cluster, or too small a one."""
    refuse_nonsense(ranks, restarts)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = import_ray()
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    join(ray)
    cards = cards and ray.cluster_resources().get("GPU", 0) > 0
    refuse_few(ranks, ray.cluster_resources(), "GPU" if cards else "CPU")
    attempts: Any = ray.remote(num_cpus=0)(Attempts).remote()
    trainer = TorchTrainer(
        rank_of_run,
        torch_config=TorchConfig(backend="gloo"),  # of the workers, whose ranks have a group of their own
        train_loop_config={"arguments": list(arguments), "attempts": attempts, "folder": os.getcwd()},
        scaling_config=ScalingConfig(num_workers=ranks, use_gpu=cards),
        run_config=RunConfig(
            storage_path=os.path.join(os.path.abspath(out), "ray"), failure_config=FailureConfig(max_failures=restarts)
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        print(f"ronna: {str(error).strip().splitlines()[-1]}; giving up", file=sys.stderr, flush=True)
        return 1
    codes, printed = ray.get(attempts.outcome.remote())
    print(printed, end="", flush=True)
    return max(codes, default=1)


def import_ray() -> Any:
    try:
        import ray
        import ray.data
        import ray.train
    except ImportError as error:
        raise RonnaError("Ray is not installed", fix="pip install 'ronna[ray]'") from error
    return ray


def join(ray: Any) -> None:
    """Raises RonnaError where no cluster is running."""
    if ray.is_initialized():
        return
    try:
        ray.init(address="auto", logging_level="warning")
    except ConnectionError as error:
        fix = "start one with `ray start --head`, or say where one is by RAY_ADDRESS"
        raise RonnaError("no Ray cluster is running here", fix=fix) from error


def refuse_few(ranks: int, resources: dict[str, float], kind: str) -> None:
    """RonnaError where Ray would wait for ever for what a cluster has not got."""
    there = int(resources.get(kind, 0))
    if ranks > there:
        what = f"{ranks} ranks need as many {kind}s, and the cluster has {there}"
        raise RonnaError(what, where="--nproc", fix="give fewer, or add machines to the cluster")


def rank_of_run(config: dict[str, Any]) -> None:
    """What each worker does: one rank, in a process of its own. An end that another try might not come to is left to
    Ray."""
    import ray
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    context, attempts = get_context(), config["attempts"]
    rank, here = context.get_world_rank(), context.get_local_world_size()
    first = rank == 0
    said = (ray.util.get_node_ip_address(), free_port(), ray.get(attempts.begin.remote())) if first else None
    address, port, number = broadcast_from_rank_zero(said)
    cards = [card for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if card]
    variables = {
        "RANK": rank,
        "WORLD_SIZE": context.get_world_size(),
        "LOCAL_RANK": context.get_local_rank() % max(1, len(cards)),  # a worker may see its own card alone
        "LOCAL_WORLD_SIZE": here,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": max(1, len(os.sched_getaffinity(0)) // here),
    }
    again = ["--resume"] if number > 1 else []
    done = subprocess.run(
        [sys.executable, *PROGRAM, *config["arguments"], *again],
        cwd=config["folder"],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode not in FINAL and done.returncode != 0:
        raise RuntimeError(f"rank {rank} ended with exit code {done.returncode}")
    ray.get(attempts.end.remote(rank, done.returncode, done.stdout))


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])
