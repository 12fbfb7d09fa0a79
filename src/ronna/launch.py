"""Several ranks of a run on this machine, started by torch's elastic agent as `torchrun` starts them."""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from ronna.base.errors import RonnaError

PROGRAM = ("-m", "ronna")
STOPPED = 143
# Exit codes after which starting again would end the same way, or was not wished: an error of the user's, Ctrl-C,
# stopped as asked.
FINAL = {2, 130, STOPPED}
SAVING = 600  # seconds that ranks have to save when all are asked to stop


def launch(ranks: int, arguments: Sequence[str], restarts: int = 3) -> int:
    """Run this command line once for each rank; the exit code is that of the rank that failed first, or 0.

    When a rank is lost, all start again from the newest checkpoint, `restarts` times at most. Cores are divided among
    the ranks, unless OMP_NUM_THREADS says otherwise. Raises RonnaError where numbers make no sense.
    """
    refuse_nonsense(ranks, restarts)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING))
    for left in reversed(range(restarts + 1)):
        code, cause = attempt(ranks, arguments)
        if code in FINAL or code == 0:
            return code
        again = f"starting again from the newest checkpoint ({left} more times at most)" if left else "giving up"
        print(f"ronna: {cause}; {again}", file=sys.stderr, flush=True)
        arguments = [*arguments, "--resume"]
    return code


def refuse_nonsense(ranks: int, restarts: int) -> None:
    if ranks < 1 or restarts < 0:
        where, what = ("--nproc", f"{ranks} ranks") if ranks < 1 else ("--restarts", f"{restarts} restarts")
        raise RonnaError(what, where=where, fix="give a number above 0")


def attempt(ranks: int, arguments: Sequence[str]) -> tuple[int, str]:
    """The exit code of one try, and which rank ended it how."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what ended a rank is said by us
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id="ronna", max_restarts=0, monitor_interval=0.1,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)(*PROGRAM, *arguments)
    except SignalException:  # given on to the ranks, which have saved
        return STOPPED, "asked to stop"
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=lambda found: secondary(found[1].exitcode))
        if failure.exitcode < 0:
            return 1, f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}"
        return failure.exitcode, f"rank {rank} ended with exit code {failure.exitcode}"
    return 0, ""


def secondary(code: int) -> int:
    """How likely it is that a rank ended like this because another one had, which lets the agent end all others."""
    if code == -signal.SIGTERM:
        return 3
    return 0 if code < 0 else 1 if code in FINAL else 2
