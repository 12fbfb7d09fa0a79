"""The processes of a run, and the plain numbers that they agree on.

One process is the rule. Under `torchrun`, or whatever else sets its variables, a run has as many ranks as were
started; each calls everything here at the same places in the same order, or all would wait for ever.
"""

import faulthandler
import gc
import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
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
from ronna.base.heap import share_one_heap
from ronna.base.process import stop_with_starter

T = TypeVar("T")
ENDS = "ends"  # dimension of a mesh
HEARD = 2.0  # seconds that a rank which ends with an error waits for others with the same


class ParallelConfig(Config):
    """How a run's ranks share its model."""

    replicate: int = Field(1, ge=1)  # copies of the model, each in shards on its part of the ranks
    pipeline: int = Field(1, ge=1)  # ranks that micro-batches go through, each with some of the blocks
    chunks: int = Field(1, ge=1)  # runs of blocks that each of those ranks has: more wait less and send more
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

    def as_rank_0(self, words: str) -> bool:
        """Whether this is another rank than 0, which ends with the same words: once is enough to read them."""
        wait, same = timedelta(seconds=HEARD), False
        with suppress(RuntimeError):
            if self.rank == 0:  # with which the store goes, so the others should have looked
                self.store.set("end", words)
                self.store.wait([f"read {rank}" for rank in range(1, self.size)], wait)
                return False
            self.store.wait(["end"], wait)
            same = self.store.get("end").decode() == words
            self.store.set(f"read {self.rank}", "")
        return same

    def words(self, kind: str) -> list[str]:
        keys = [f"{kind} {rank}" for rank in range(self.size)]
        return [self.store.get(key).decode() for key in keys] if self.store.check(keys) else []


@dataclass(frozen=True)
class World:
    """One rank of `size`. mesh: (replicate, shard, tensor) ranks that have the same blocks, None where there is one
    alone; shards lie over the ranks of a context group too. ends_mesh: (replicate, ends, tensor), of what stands around
    the blocks, which lies in shards over a pipeline's ranks too. context_mesh: (the others, context, tensor).
    pipe: the ranks that micro-batches of this one go through, in order."""

    rank: int = 0
    size: int = 1
    pipeline: int = 1
    chunks: int = 1  # as ParallelConfig has it
    context: int = 1  # groups of `tensor` ranks, one behind the other, that have the same samples
    tensor: int = 1
    sequence: bool = True  # as ParallelConfig has it
    mesh: DeviceMesh | None = field(default=None, compare=False)
    ends_mesh: DeviceMesh | None = field(default=None, compare=False)
    context_mesh: DeviceMesh | None = field(default=None, compare=False)
    pipe: dist.ProcessGroup | None = field(default=None, compare=False)
    pipe_back: dist.ProcessGroup | None = field(default=None, compare=False)  # the same ranks, for what comes back
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
        return self.pipeline * self.context * self.tensor

    @property
    def stage(self) -> int:
        """Which of its pipeline's ranks this is."""
        return self.rank // (self.context * self.tensor) % self.pipeline

    @property
    def first_of_stage(self) -> bool:
        """Whether no rank before this one has the same blocks."""
        return self.rank == self.stage * self.context * self.tensor

    @property
    def part(self) -> int:
        """Which part of the samples is this rank's."""
        return self.rank // self.together

    @property
    def parts(self) -> int:
        return self.size // self.together

    @property
    def first_copy(self) -> bool:
        """Whether this rank has part of the model's first copy."""
        return self.mesh is None or self.mesh.get_local_rank("replicate") == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The part of a list that is this rank's: parts are consecutive and differ by one item at most."""
        n = len(items)
        return items[n * self.part // self.parts : n * (self.part + 1) // self.parts]

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

    def of_last_stage(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the last rank of this one's pipeline has; where there is none, what is given."""
        if self.pipe is None:
            return sums
        last, source = self.stage == self.pipeline - 1, dist.get_process_group_ranks(self.pipe)[-1]
        names = torch.tensor(list(json.dumps(sorted(sums)).encode()), dtype=torch.uint8)
        length = torch.tensor(len(names))
        dist.broadcast(length, source, group=self.pipe)
        names = names if last else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(names, source, group=self.pipe)
        said = json.loads(bytes(names.tolist()))
        values = (
            torch.stack([sums[n].detach().double().cpu() for n in said]) if last else torch.empty(len(said)).double()
        )
        if said:
            dist.broadcast(values, source, group=self.pipe)
        return dict(zip(said, values.unbind(), strict=True))

    def from_parts(self, mine: Tensor) -> list[Tensor]:
        """(n, ...) of each part of the samples, in order, on a CPU; n may differ."""
        if self.size == 1:
            return [mine]
        self.call()
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(mine)]))
        if (longest := max(map(int, lengths))) == 0:
            return [mine] * self.parts
        padded = torch.cat([mine, mine.new_zeros(longest - len(mine), *mine.shape[1:])])
        every = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(every, padded)
        return [some[: int(n)] for some, n in zip(every, lengths, strict=True)][:: self.together]

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

    def least(self, number: int) -> int:
        """Of what the ranks have."""
        found = torch.tensor(number, dtype=torch.int64)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found)

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


def together_of(config: ParallelConfig) -> int:
    """Ranks that have the same samples."""
    return config.pipeline * config.context * config.tensor


def refuse_degrees(config: ParallelConfig, size: int) -> None:
    """RonnaError where ranks cannot be divided as asked."""
    if config.chunks > 1 and config.pipeline == 1:
        fix = "give parallel.pipeline as well"
        raise RonnaError("a rank that has all blocks has them in one run", where="parallel.chunks", fix=fix)
    if size % (config.replicate * together_of(config)) == 0:
        return
    copies = "one copy" if config.replicate == 1 else f"{config.replicate} copies"
    what, together = f"{size} ranks cannot hold {copies} of a model", together_of(config)
    what += f" divided over {together}" if together > 1 else ""
    names = [name for name in ("replicate", "tensor", "context", "pipeline") if getattr(config, name) > 1]
    raise RonnaError(what, where=f"parallel.{names[0]}", fix="give numbers whose product divides the ranks")


def in_meshes(config: ParallelConfig, world: World, kind: str) -> World:
    """This rank among the others: consecutive ones divide matrices, then share texts, then pass micro-batches on."""
    sizes = (config.pipeline, config.context, config.tensor)
    shards = world.size // config.replicate // math.prod(sizes)
    ranks = torch.arange(world.size).view(config.replicate, shards, *sizes)
    blocks = ranks.permute(2, 0, 1, 3, 4).reshape(config.pipeline, config.replicate, -1, config.tensor)
    all_of_them = DeviceMesh(kind, blocks, mesh_dim_names=("pipeline", "replicate", "shard", "tensor"))
    ends = texts = pipe = back = None
    if config.pipeline > 1:
        shape = (config.replicate, world.size // config.replicate // config.tensor, config.tensor)
        ends = init_device_mesh(kind, shape, mesh_dim_names=("replicate", ENDS, "tensor"))
        pipe = all_of_them.get_group("pipeline")
        pipes = [dist.new_group(some.tolist()) for some in blocks.flatten(1).T]
        back = next(group for group in pipes if world.rank in dist.get_process_group_ranks(group))
    if config.context > 1:
        shape = (world.size // (config.context * config.tensor), config.context, config.tensor)
        texts = init_device_mesh(kind, shape, mesh_dim_names=("part", "context", "tensor"))
    return replace(
        world, pipeline=config.pipeline, chunks=config.chunks, context=config.context, tensor=config.tensor,
        sequence=config.sequence, mesh=all_of_them["replicate", "shard", "tensor"], ends_mesh=ends, context_mesh=texts,
        pipe=pipe, pipe_back=back,
    )  # fmt: skip


@contextmanager
def said_once(roll: Roll) -> Iterator[None]:
    """What the user can mend is mostly the same on all ranks."""
    try:
        yield
    except RonnaError as error:
        error.said = roll.as_rank_0(str(error))
        raise


@contextmanager
def joined(config: ParallelConfig, device: str) -> Iterator[World]:
    """This process among the others that were started with it, as one of a run's ranks, until the run ends.

    device: as a run file has it; of several cards, rank i of a machine takes the card i. Raises RonnaError where the
    ranks cannot be divided as asked or the device is absent, RankLost where another one is gone or does not come.
    """
    if not started_with_others():
        degrees = [("replicate", "hold copies of the model"), ("context", "share a text with others")]
        degrees += [("tensor", "divide a model's matrices"), ("pipeline", "pass micro-batches on")]
        for name, what in degrees:
            if getattr(config, name) > 1:
                fix = "start more ranks: --nproc N, or torchrun"
                raise RonnaError(f"one process cannot {what}", where=f"parallel.{name}", fix=fix)
        yield ALONE
        return
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    try:
        refuse_degrees(config, size)
    except RonnaError as error:
        error.said = rank > 0
        raise
    cuda = choose_device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        share_one_heap()
    stop_with_starter()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=config.timeout))
    roll = Roll(rank, size, config.timeout)
    try:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        with roll, said_once(roll):
            yield in_meshes(config, World(rank, size, roll=roll, here=here), "cuda" if cuda else "cpu")
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(said in str(error) for said in LOST):
            what = f"rank {rank} has lost another one: {str(error).splitlines()[0][:200]}{roll.missing()}"
            raise RankLost(what) from error
        raise
    finally:
        # Models in shards hold each other in circles, and groups, whose threads must end before Python does.
        gc.collect()
        dist.destroy_process_group()
