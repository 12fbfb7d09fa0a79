"""Which ways to train a model fit into the memory there is, the fastest of each, and why the others do not.

A way is what changes the optimizer, the precision of weights, or where things lie. Within one, the micro-batch and how
many blocks are computed again are free: they change no gradient. The fewest blocks that make it fit are found by
bisection, feed-forward halves first, since those give the most memory for the time they take (the two are the items of
a knapsack whose blocks are alike, Jain et al. 2020).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product

from ronna.model import config as c
from ronna.plan.memory import Memory, estimate
from ronna.plan.shapes import Lengths
from ronna.plan.stretches import Step
from ronna.plan.weights import Optimizer

Seconds = Callable[[Step], float]
SLOWER = 1.2  # steps on a heap that gives back what is freed, about
EIGHT_BIT, LOW_RANK, RANK_ONE = Optimizer("adamw8bit"), Optimizer("apollo"), Optimizer("apollo", rank=1)


@dataclass(frozen=True)
class Shape:
    """Of a micro-batch: as the fields of `Step` of these names."""

    lengths: Lengths
    source: Lengths | None = None
    predicted: int | None = None

    def of(self, step: Step) -> Step:
        shaped = replace(step, lengths=self.lengths, source=self.source, predicted=self.predicted)
        return shaped.led(step.adapter.rank) if step.adapter and step.adapter.kind == "prompt" else shaped


@dataclass(frozen=True)
class Work:
    """A model and its training step as it was asked for. batch: items a step. shape: of a micro-batch of so many of
    them, the heaviest that there is. exact: only ways that compute the same. fixed: the micro-batch and what is
    computed again are not to be changed either."""

    model: c.Model
    step: Step
    batch: int
    shape: Callable[[int], Shape]
    exact: bool = False
    eight_bit: bool = True  # whether there is a library for it
    fixed: bool = False
    micro: int | None = None  # items of a micro-batch as asked for; None: all micro-batches alike

    @property
    def blocks(self) -> int:
        return sum(len(stack.blocks) for stack in (self.model.encoder, self.model.decoder) if stack)

    def at(self, step: Step, micro: int) -> Step:
        return replace(self.shape(micro).of(step), micro_batches=-(-self.batch // micro))


@dataclass(frozen=True)
class Plan:
    """One way, at its best. exact: it computes what was asked for, but for rounding. missing: bytes, where it does not
    fit even as lean as it gets; the rest is then of its leanest form."""

    step: Step
    micro: int
    memory: Memory
    peak: int
    seconds: float  # of an optimizer step
    exact: bool
    missing: int = 0
    words: tuple[str, ...] = field(default=())

    @property
    def fits(self) -> bool:
        return self.missing == 0

    @property
    def name(self) -> str:
        ranks = [self.step.ranks.name] if self.step.ranks.size > 1 else []
        return ", ".join([*ranks, *self.words]) or "as asked for"


def search(work: Work, room: int, seconds: Seconds, correction: float = 1.0) -> list[Plan]:
    """The best of every way: those that fit, exact ones first, by time, but before all what was asked for if it does;
    then the rest, by what they lack.

    room: bytes that the run may grow by. correction: what a measurement of this model took, by its estimate.
    """
    found = [best(work, way, room, seconds, correction) for way in ways(work)]
    fitting = sorted((p for p in found if p.fits), key=lambda p: (not p.exact, p.step != work.step, p.seconds, p.peak))
    return fitting + sorted((p for p in found if not p.fits), key=lambda p: p.missing)


def ways(work: Work) -> Iterator[Step]:
    """What was asked for first; the micro-batch and what is computed again are still open."""
    asked, seen = work.step, set[Step]()
    if asked.ranks.size > 1:  # where no other ways work yet
        yield asked
        return
    optimizers = [asked.optimizer]
    widths, unclipped = [asked.weights], [asked.clip]
    cpu = asked.device == "cpu"
    offloads = {asked.offload, ("optimizer",), ("activations",), ("optimizer", "activations")}
    if asked.adapter is not None:  # what learns is small already
        offloads = {asked.offload, ("activations",)}
    elif not work.exact:
        if asked.optimizer.kind in ("adamw", "adam"):
            optimizers += [EIGHT_BIT] * work.eight_bit + [LOW_RANK, RANK_ONE]
        widths = [asked.weights] if asked.weights == "bf16" else ["fp32", "bf16"]
        unclipped = [True, False] if asked.clip else [False]
    fused = [False, True] if asked.adapter is None and not asked.fused_backward else [asked.fused_backward]
    for optimizer, width, together, clip, offload in product(
        optimizers, widths, fused, unclipped, sorted(offloads, key=lambda o: (o != asked.offload, len(o), o))
    ):
        if clip != asked.clip and not together:
            continue  # clipping costs nothing there
        if "optimizer" in offload and optimizer.kind in ("adamw8bit", "apollo", "adafactor"):
            continue  # there is little to put away
        if "activations" in offload and (width != asked.weights or optimizer != asked.optimizer) and cpu:
            continue  # too slow to be anybody's first choice
        step = replace(asked, optimizer=optimizer, weights=width, fused_backward=together, clip=clip, offload=offload)
        for tight in {asked.tight, True} if cpu and step == asked else {asked.tight or cpu}:
            found = replace(step, tight=tight)
            if found not in seen:
                seen.add(found)
                yield found


def some_way_fits(work: Work, room: int) -> bool:
    return any(estimate(work.model, leanest(work, way)).peak <= room for way in ways(work))


def leanest(work: Work, way: Step) -> Step:
    """One item at a time, and every block computed again."""
    micro = work.batch if way.fused_backward else micro_of(work) if work.fixed else 1
    return work.at(way if work.fixed else replace(way, blocks=work.blocks, feeds=0), micro)


def best(work: Work, way: Step, room: int, seconds: Seconds, correction: float) -> Plan:
    """The fastest micro-batch with the fewest blocks computed again, or the leanest if nothing fits."""

    def timed(step: Step) -> float:
        return seconds(step) * (SLOWER if step.tight and not step.lean else 1.0)

    def weigh(step: Step) -> tuple[Memory, int]:
        memory = estimate(work.model, step)
        return memory, int(memory.peak * correction)

    def plan(step: Step, micro: int, missing: int = 0) -> Plan:
        memory, peak = weigh(step)
        return Plan(step, micro, memory, peak, timed(step), exact(work, step), missing, words(work, step, micro))

    asked = micro_of(work)
    micros = [asked] if work.fixed else sizes(asked)
    if way.fused_backward:
        micros = [work.batch]
    least = leanest(work, way)
    if (over := weigh(least)[1] - room) > 0:
        return plan(least, micros[-1], over)
    if way == work.step and weigh(way)[1] <= room:
        return plan(way, asked)  # what was asked for, and does, is left alone
    found: Plan | None = None
    for micro in micros:
        plain = work.at(way, micro)
        if found is not None and timed(plain) >= found.seconds:
            break  # fewer items at a time are slower still, before anything is computed again
        step = plain if work.fixed else lightest(work, plain, lambda s: weigh(s)[1] <= room)
        if step is not None and (found is None or timed(step) < found.seconds):
            found = plan(step, micro)
    return plan(least, micros[-1]) if found is None else found


def lightest(work: Work, step: Step, fits: Callable[[Step], bool]) -> Step | None:
    """With as little computed again as makes it fit: halves first, then whole blocks and as many halves as needed."""
    n = work.blocks

    def first(low: int, high: int, at: Callable[[int], Step]) -> int | None:
        if not fits(at(high)):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(at(middle)) else (middle + 1, high)
        return low

    feeds = first(step.feeds, n - step.blocks, lambda f: replace(step, feeds=f))
    if feeds is not None:
        return replace(step, feeds=feeds)
    blocks = first(step.blocks, n, lambda b: replace(step, blocks=b, feeds=n - b))
    if blocks is None:
        return None
    feeds = first(0, n - blocks, lambda f: replace(step, blocks=blocks, feeds=f))
    return replace(step, blocks=blocks, feeds=feeds or 0)


def micro_of(work: Work) -> int:
    """As it was asked for."""
    return -(-work.batch // work.step.micro_batches) if work.micro is None else work.micro


def sizes(largest: int) -> list[int]:
    """Micro-batches to try: each half of the one before."""
    found = [largest]
    while found[-1] > 1:
        found.append(-(-found[-1] // 2))
    return found


def exact(work: Work, step: Step) -> bool:
    asked = work.step
    return (step.optimizer, step.weights, step.clip) == (asked.optimizer, asked.weights, asked.clip)


def words(work: Work, step: Step, micro: int) -> tuple[str, ...]:
    """What differs from what was asked for."""
    asked, said = work.step, []
    if micro != micro_of(work):
        said.append(f"micro-batch {micro}")
    if (step.blocks, step.feeds) != (asked.blocks, asked.feeds):
        parts = [f"{step.blocks} of {work.blocks} blocks"] * bool(step.blocks) + [f"{step.feeds} halves"] * bool(
            step.feeds
        )
        said.append(f"{' and '.join(parts)} again")
    if step.optimizer != asked.optimizer:
        names = {"adamw8bit": "8-bit AdamW", "apollo": "APOLLO" if step.optimizer.rank is None else "APOLLO-Mini"}
        said.append(names[step.optimizer.kind])
    if step.weights != asked.weights:
        said.append("bf16 weights")
    if step.fused_backward and not asked.fused_backward:
        said.append("fused backward")
    if step.clip != asked.clip:
        said.append("no clipping")
    if step.tight and not (asked.tight or step.lean):
        said.append("tight heap")
    where = "disk" if step.device == "cpu" else "host"
    said += [f"{what} on {where}" for what in step.offload if what not in asked.offload]
    return tuple(said)
