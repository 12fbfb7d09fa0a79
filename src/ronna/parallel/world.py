"""The processes of a run, and the plain numbers that they agree on.

One process is the rule. Under `torchrun`, or whatever else sets its variables, a run has as many ranks as were
started; each calls everything here at the same places in the same order, or all would wait for ever.
"""

import ctypes
import faulthandler
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Self, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ronna.base.config import Config
from ronna.base.device import choose_device
from ronna.base.errors import RonnaError

T = TypeVar("T")
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


class ParallelConfig(Config):
    """How a run's ranks share its model."""

    replicate: int = Field(1, ge=1)  # copies of the model, each in shards on its part of the ranks
    context: int = Field(1, ge=1)  # ranks that share the tokens of the same samples
    tensor: int = Field(1, ge=1)  # ranks that divide each block's matrices, and compute on the same samples
    sequence: bool = True  # whether those ranks also divide the rows of the states between blocks
    timeout: float = Field(600.0, gt=0)  # seconds that a rank waits for the others


class RankLost(Exception):
    """Another rank of this run has ended, or has not come for as long as ranks wait for each other."""


# What gloo says then; NCCL has a class of its own.
LOST = ("closed by peer", "reset by peer", "onnection refused", "imed out")


class Roll:
    """Who was heard of when: each rank leaves word in the store through which the ranks have found each other, of how
    far it has come, and every so often that it lives; a context manager."""

    def __init__(self, rank: int, size: int, timeout: float):
        self.rank, self.size, self.timeout, self.count = rank, size, timeout, 0
        self.store = dist.PrefixStore("roll", dist.distributed_c10d._get_default_store())
        self.every = min(10.0, timeout / 10)
        self.left = threading.Event()
        self.thread = threading.Thread(target=self.live, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.left.set()
        self.thread.join(self.every)

    def live(self) -> None:
        with suppress(RuntimeError):  # the store has gone with rank 0
            while True:
                self.store.set(f"life {self.rank}", str(time.time()))
                if self.left.wait(self.every):
                    return

    def call(self) -> None:
        """Say that this rank has come so far. Its stack is printed where it does not say so again in nine tenths of the
        time that the others wait."""
        self.count += 1
        self.store.set(f"count {self.rank}", str(self.count))
        faulthandler.dump_traceback_later(0.9 * self.timeout, exit=False)

    def missing(self) -> str:
        """The ranks that do not live, or else those that are behind all others."""
        try:
            lives, counts = (self.words(kind) for kind in ("life", "count"))
        except RuntimeError:
            return ""
        silent = {rank: time.time() - float(word) for rank, word in enumerate(lives)}
        dead = {rank: seconds for rank, seconds in silent.items() if seconds > 3 * self.every}
        if dead:
            return "".join(f"; rank {rank} was last heard of {seconds:.0f} s ago" for rank, seconds in dead.items())
        steps = [int(count) for count in counts]
        behind = [rank for rank, step in enumerate(steps) if step == min(steps) < max(steps)]
        return "".join(f"; rank {rank} lives, but did not come where the others are" for rank in behind)

    def words(self, kind: str) -> list[str]:
        keys = [f"{kind} {rank}" for rank in range(self.size)]
        return [self.store.get(key).decode() for key in keys] if self.store.check(keys) else []


@dataclass(frozen=True)
class World:
    """One rank of `size`. mesh: (replicate, shard, tensor) ranks, None where there is one alone; shards lie over the
    ranks of a context group too. context_mesh: (the others, context, tensor)."""

    rank: int = 0
    size: int = 1
    context: int = 1  # groups of `tensor` ranks, one behind the other, that have the same samples
    tensor: int = 1
    sequence: bool = True  # as ParallelConfig has it
    mesh: DeviceMesh | None = field(default=None, compare=False)
    context_mesh: DeviceMesh | None = field(default=None, compare=False)
    roll: Roll | None = field(default=None, compare=False)
    here: int = 1  # ranks on this machine

    @property
    def copies(self) -> int:
        """Of the model."""
        return 1 if self.mesh is None else self.mesh.size(0)

    @property
    def main(self) -> bool:
        """Whether this is the rank that speaks and writes for all."""
        return self.rank == 0

    @property
    def together(self) -> int:
        """Consecutive ranks that have the same samples."""
        return self.context * self.tensor

    @property
    def part(self) -> int:
        """Which part of the samples is this rank's."""
        return self.rank // self.together

    @property
    def first_copy(self) -> bool:
        """Whether this rank has part of the model's first copy."""
        return self.mesh is None or self.mesh.get_local_rank("replicate") == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The part of a list that is this rank's: parts are consecutive and differ by one item at most."""
        n, parts = len(items), self.size // self.together
        return items[n * self.part // parts : n * (self.part + 1) // parts]

    def total(self, numbers: Sequence[int]) -> list[int]:
        """Sums over all parts of the samples."""
        if self.size == 1:
            return list(numbers)
        summed = torch.tensor(list(numbers), dtype=torch.int64)
        dist.all_reduce(summed)
        return [int(n) // self.together for n in summed]

    def total_counts(self, counts: Mapping[str, int]) -> dict[str, int]:
        """The same of numbers by name; every rank has the same names."""
        self.call()
        names = sorted(counts)
        return dict(zip(names, self.total([counts[name] for name in names]), strict=True))

    def total_sums(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over all parts of the samples of scalars by name, in double precision."""
        if self.size == 1 or not sums:
            return dict(sums)
        names = sorted(sums)
        summed = torch.stack([sums[name].detach().double().cpu() for name in names])
        dist.all_reduce(summed)
        return dict(zip(names, (summed / self.together).unbind(), strict=True))

    def any(self, here: bool) -> bool:
        """Whether it is so on some rank."""
        self.call()
        return self.total([int(here) * self.together])[0] > 0

    def call(self) -> None:
        """Say that this rank has come so far."""
        if self.roll is not None:
            self.roll.call()

    def at_rest(self) -> None:
        """Nobody is waiting for this rank now, however long it takes."""
        faulthandler.cancel_dump_traceback_later()

    def told(self, number: int) -> int:
        """What rank 0 has."""
        if self.size == 1:
            return number
        said = torch.tensor(number, dtype=torch.int64)
        dist.broadcast(said, src=0)
        return int(said)


ALONE = World()


def started_with_others() -> bool:
    """Whether whoever started this process has started more of them."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def stop_with_starter() -> None:
    """Let the system ask this process to stop when the one that started it ends, even by SIGKILL; on Linux alone."""
    if sys.platform == "linux":
        starter = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != starter:  # it ended before
            os.kill(os.getpid(), signal.SIGTERM)


def refuse_uneven(config: ParallelConfig, size: int) -> None:
    copies = "one copy" if config.replicate == 1 else f"{config.replicate} copies"
    what, together = f"{size} ranks cannot hold {copies} of a model", config.context * config.tensor
    what += f" divided over {together}" if together > 1 else ""
    names = [name for name in ("replicate", "tensor", "context") if getattr(config, name) > 1]
    raise RonnaError(what, where=f"parallel.{names[0]}", fix="give numbers whose product divides the ranks")


@contextmanager
def joined(config: ParallelConfig, device: str) -> Iterator[World]:
    """This process among the others that were started with it, as one of a run's ranks, until the run ends.

    device: as a run file has it; of several cards, rank i of a machine takes the card i. Raises RonnaError where the
    ranks cannot be divided as asked or the device is absent, RankLost where another one is gone or does not come.
    """
    if not started_with_others():
        degrees = (("replicate", "hold copies of the model"), ("context", "share a text with others"))
        for name, what in (*degrees, ("tensor", "divide a model's matrices")):
            if getattr(config, name) > 1:
                fix = "start more ranks: --nproc N, or torchrun"
                raise RonnaError(f"one process cannot {what}", where=f"parallel.{name}", fix=fix)
        yield ALONE
        return
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    together = config.context * config.tensor
    shards, left = divmod(size, config.replicate * together)
    if left:
        refuse_uneven(config, size)
    cuda = choose_device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    stop_with_starter()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=config.timeout))
    roll = Roll(rank, size, config.timeout)
    try:
        kind, names = "cuda" if cuda else "cpu", ("replicate", "shard", "tensor")
        shape = (config.replicate, shards * config.context, config.tensor)
        mesh, texts = init_device_mesh(kind, shape, mesh_dim_names=names), None
        if config.context > 1:
            shape = (size // together, config.context, config.tensor)
            texts = init_device_mesh(kind, shape, mesh_dim_names=("part", "context", "tensor"))
        here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        with roll:
            yield World(rank, size, config.context, config.tensor, config.sequence, mesh, texts, roll, here)
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(said in str(error) for said in LOST):
            what = f"rank {rank} has lost another one: {str(error).splitlines()[0][:200]}{roll.missing()}"
            raise RankLost(what) from error
        raise
    finally:
        # Models in shards hold each other in circles, and groups, whose threads must end before Python does.
        gc.collect()
        dist.destroy_process_group()
