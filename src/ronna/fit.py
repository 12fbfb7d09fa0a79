"""A run planned by its own data before it starts, and anew when it takes more memory than it may."""

import gc
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from ronna.asked import this_machine
from ronna.assemble import Labelled, finetune_shape
from ronna.base.config import build, read_toml
from ronna.base.device import describe, held_bytes
from ronna.base.errors import RonnaError
from ronna.base.heap import release
from ronna.base.rates import cache_folder
from ronna.base.track import say
from ronna.model.families import with_dropout
from ronna.packed import Packed
from ronna.parallel.world import ALONE, World
from ronna.plan import record
from ronna.plan.hardware import gib, parse_bytes
from ronna.plan.memory import estimate
from ronna.plan.ranks import Ranks, divided
from ronna.plan.search import Work, search
from ronna.plan.time import flops, step_time
from ronna.planned import AnyRun, heaviest, micro_of, with_plan, work_of
from ronna.runfile import FinetuneRun, PretrainRun
from ronna.trial import warm_up

SHARE = 0.98  # of the memory that a run may come to hold
CAREFUL = 1.15  # what a run took that ended for want of memory, by its estimate, at the least
WATCHED = 2  # steps after which a run has taken all that it takes
CHOSEN = {"micro_batch", "recompute", "weights", "fused_backward", "offload", "clip", "memory"}  # by a plan, of train


class TooLarge(RonnaError):
    """A run that would take more memory than there is."""


class Outgrown(TooLarge):
    """A run holds more than it may. measured: bytes, None where it just ended."""

    def __init__(self, measured: int | None, limit: int):
        took = "there is no memory left" if measured is None else f"it holds {gib(measured)} of {gib(limit)}"
        fix = "give --memory, which finds a way that fits, or a smaller train.micro_batch"
        super().__init__(f"this run takes more memory than there is: {took}", where="train", fix=fix)
        self.measured = measured


def out_of_memory(error: Exception) -> bool:
    """Whether torch or Python has found no memory left."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


@dataclass(frozen=True)
class Fit:
    """A run, `origin` as the user has it, and what it is expected to take.

    before: bytes that the process held when it was planned. limit: the most that it may hold; `asked` for, or all that
    there is. peak: bytes by which it is to grow. seconds: of a step.
    """

    run: AnyRun
    origin: AnyRun
    work: Work
    before: int
    limit: int
    asked: bool
    peak: int
    seconds: float
    where: str
    tight: bool = False  # whether its heap gives back what is freed
    correction: float = 1.0
    seen: list[int | None] = field(default_factory=list)  # what it took of those that outgrew it

    @property
    def planned(self) -> int:
        return self.before + self.peak

    @property
    def most(self) -> int:
        """Bytes above which the process may not come."""
        memory = self.run.train.memory
        return int(SHARE * (self.limit if memory is None else min(self.limit, parse_bytes(memory))))

    @property
    def tokens(self) -> int:
        """Of the heaviest micro-batch."""
        step = self.work.at(self.work.step, micro_of(self.run))
        return step.lengths.total + (step.source.total if step.source else 0)

    def utilisation(self, rate: float) -> float:
        """Of a device's matrix products, where each has so many tokens a second: the share of the rate that is known of
        them which is spent on what the model cannot do without (MFU, Chowdhery et al. 2022)."""
        step = self.work.step
        ranks = step.ranks
        each = flops(divided(self.work.model, ranks), replace(step, micro_batches=1)) / self.tokens
        return each * rate * ranks.context * ranks.tensor / this_machine(step.device).rates[step.compute]

    def outgrown(self, measured: int | None) -> None:
        """Note what the process held when the run was ended; None where nobody knows."""
        self.seen.append(measured)

    def watch(self, device: torch.device, step: int) -> None:
        """A hook: raises Outgrown where the first steps have come too near to the limit."""
        if step < WATCHED and self.asked and (held := held_bytes(device)) > SHARE * self.limit:
            raise Outgrown(held, self.limit)

    def remember(self, device: torch.device, peak: int, seconds: float) -> None:
        """Add this run to the record of plans."""
        record.add(cache_folder(), record.Line(device.type, self.peak, peak - self.before, self.seconds, seconds))


def fitted(
    run: AnyRun,
    data: Labelled | Packed,
    device: torch.device,
    dtype: torch.dtype,
    *,
    settled: bool = False,
    world: World = ALONE,
) -> Fit | None:
    """The run as it is, which it stays if it is `settled`, or the best way that stays within `train.memory`; of one
    rank. None on devices that there are no formulas for. Raises TooLarge where nothing fits."""
    if device.type not in ("cpu", "cuda"):
        return None
    work = work_for(run, data, device, dtype, ranks_of(world))
    if device.type == "cpu":
        kind = run.objective.kind if isinstance(run, PretrainRun) else run.task.kind
        warm_up(data.family, kind, isinstance(run, PretrainRun), work.step)
    before = held_bytes(device)
    limit = describe(str(device)).memory_available // (world.here if device.type == "cpu" else 1) + before
    if run.train.memory is None or settled:
        resumed = run.train.memory is not None
        return as_it_is(run, replace(work, step=replace(work.step, tight=resumed)), before, limit)
    return planned(run, work, before, min(limit, parse_bytes(run.train.memory)), 1.0)


def ranks_of(world: World) -> Ranks:
    shards = world.size // world.copies // world.together
    return Ranks(
        world.copies, shards, world.tensor, world.sequence, world.context, world.pipeline, world.chunks
    )  # fmt: skip


def work_for(run: AnyRun, data: Labelled | Packed, device: torch.device, dtype: torch.dtype, ranks: Ranks) -> Work:
    kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    compute: Literal["bf16", "fp32"] = "bf16" if dtype == torch.bfloat16 else "fp32"
    if isinstance(data, Packed):
        assert isinstance(run, PretrainRun)
        model, shape, rows = data.cfg, heaviest(data.rows, data.objective, None, None), None
    else:
        assert isinstance(run, FinetuneRun)
        model = finetune_shape(data)
        items, tokens = data.examples["train"], run.train.batch_tokens
        shape, rows = heaviest(items, data.task, data.lengths, tokens), len(data.used)
    if run.model.dropout is not None:
        model = with_dropout(data.family, model, run.model.dropout)
    return work_of(run, model, shape, kind=kind, compute=compute, token_rows=rows, ranks=ranks)


def as_it_is(run: AnyRun, work: Work, before: int, limit: int) -> Fit:
    memory = estimate(work.model, work.step)
    seconds = step_time(work.model, work.step, this_machine(work.step.device)).total
    tight = work.step.tight or work.step.lean
    fit = Fit(run, run, work, before, limit, False, memory.peak, seconds, memory.where, tight)
    if fit.planned > limit * (1 + record.UNMEASURED):
        what = f"this run would hold about {gib(fit.planned)}, and there are {gib(limit)}"
        fix = "give --memory, which finds a way that fits, or a smaller train.micro_batch"
        raise TooLarge(what, where="train", fix=fix)
    return fit


def planned(run: AnyRun, work: Work, before: int, limit: int, correction: float) -> Fit:
    """correction: what the model took, by its estimate, where that has been seen."""
    device = this_machine(work.step.device)
    kind = work.step.device
    careful = 1 + record.margin(record.read(cache_folder(), kind), kind) if correction == 1.0 else correction
    room = int(SHARE * limit) - before
    plans = search(work, room, lambda step: step_time(work.model, step, device).total, careful)
    best = plans[0]
    if not best.fits:
        what = f"nothing fits: the leanest way ({best.name}) lacks {gib(best.missing)} of {gib(limit)}"
        raise TooLarge(what, where="train.memory", fix="give more, a smaller batch or length, or an adapter (--peft)")
    say(f"plan for {gib(limit)}: {best.name}; about {gib(before + best.memory.peak)}, fullest at {best.memory.where}")
    chosen = with_plan(run, best, work)
    return Fit(
        chosen,
        run,
        work,
        before,
        limit,
        True,
        best.memory.peak,
        best.seconds,
        best.memory.where,
        best.step.tight,
        careful,
    )


def again(fit: Fit) -> Fit:
    """The next plan after one that took more than it was to. Raises TooLarge where there is none."""
    gc.collect()
    release()
    measured = fit.seen[-1]
    room = SHARE * fit.limit - fit.before
    ratio = max(CAREFUL, room / fit.peak) if measured is None else (measured - fit.before) / fit.peak
    took = "ended for want of memory" if measured is None else f"holds {gib(measured)}"
    say(f"this run {took}, {gib(fit.limit)} are there: planning again")
    work = fit.work if fit.asked else replace(fit.work, exact=True)  # nobody has asked for other training
    return planned(fit.origin, work, fit.before, fit.limit, max(fit.correction * 1.05, ratio * 1.02))


def as_planned(run: AnyRun, out: Path) -> AnyRun:
    """A run that goes on, with what was planned for it when it began."""
    try:
        before = build(type(run), read_toml(out / "run.toml"), where=str(out / "run.toml"))
    except RonnaError:
        return run
    if before.train.memory is None or run.train.memory is None:
        return run
    train = run.train.model_copy(update={name: getattr(before.train, name) for name in CHOSEN})
    return run.model_copy(update={"train": train, "optim": before.optim})
