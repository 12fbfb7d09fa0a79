"""How long a training step takes, by arithmetic: what it does (`ronna.plan.work`) times what each kind of work costs.

Costs are measured where `ronna.base.rates` has been, else told from the device's rates and bandwidth. They are added
up: nothing of a step is thought to run beside the rest, but a GPU beside the calls, and beside what it sends to others
and takes from them. No GPU has been compared with yet.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ronna.base.errors import RonnaError
from ronna.model import config as c
from ronna.plan.ends import chunk_rows
from ronna.plan.hardware import Device
from ronna.plan.memory import estimate
from ronna.plan.ranks import blocks, divided, sent, share
from ronna.plan.shapes import BYTES, Lengths, Numbers
from ronna.plan.stages import Stage, stages, waits
from ronna.plan.stretches import Step, Table, read_positions, scene_of
from ronna.plan.weights import Optimizer, Weight, adapted, states, weights
from ronna.plan.work import PRODUCTS, Scene, Work, embedding, halves, heads, norm, total, vocabulary

# Bytes that move for a number: read and written, backward also what was kept. Of `words`, three passes in fp32.
MOVED = {"forward": 2, "backward": 3}
# Seconds of an operation beside its work: to find and start it, from Python and autograd.
CALL = {"cpu": 4e-6, "cuda": 8e-6}
# Of the rate of large products: of many small ones, of attention in one kernel and its backward pass.
SHARES = {"linear": 1.0, "batched": 0.5, "flash": 0.6, "flash backward": 0.5}
# A CPU reckons where a GPU waits for memory: so many times what the bytes alone would take.
DEAR = {
    "gelu": 3.0,
    "gelu_tanh": 6.0,
    "silu": 2.0,
    "tanh": 3.0,
    "mask": 3.0,
    "softmax": 2.0,
    "rms": 4.0,
    "dropout": 6.0,
    "words": 3.0,
    "nf4": 10.0,
    "rounded": 7.0,
    "adamw8bit": 20.0,
}
# Numbers in fp32 that an optimizer reads and writes for a weight, and how many passes that takes.
WALKS: dict[str, tuple[float, int]] = {
    "adamw": (7, 1), "sgd": (5, 2), "adafactor": (14, 8), "muon": (12, 8), "adamw8bit": (4, 1),
    "apollo": (12, 10),
}  # fmt: skip
# Bytes of a word's logit, from product to gradient, and of a weight that is rounded.
PASSES = {"words": 24.0, "rounded": 12.0}
# Of a whole step, beyond its operations measured one by one, whose operands a cache holds by then.
SUSTAINED = {"cpu": 1.1, "cuda": 1.0}
MUON_STEPS = 5
HOP = 5e-6  # seconds until a ring's next rank has what it is given, beside what rate and size say
HOST_STREAM = 40e9  # bytes/s of a GPU's host's memory, a guess


@dataclass(frozen=True)
class Time:
    """Seconds of a step, all its micro-batches together. overhead: of calling the operations of all other parts, on a
    GPU what does not pass while it computes. flops: floating-point operations of all products, those done again
    included. bytes: moved outside of products. communication: of waiting for other ranks."""

    forward: float
    backward: float
    recomputation: float
    loss: float
    optimizer: float
    offload: float
    overhead: float
    communication: float
    flops: float
    bytes: float

    @property
    def total(self) -> float:
        return (
            self.forward + self.backward + self.recomputation + self.loss + self.optimizer + self.offload
            + self.overhead + self.communication
        )  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """Work of one micro-batch."""

    forward: Counter[str]
    backward: Counter[str]
    again: Counter[str]
    loss: Counter[str]

    @property
    def all(self) -> Counter[str]:
        return total((self.forward, self.backward, self.again, self.loss))


def step_time(model: c.Model, step: Step, device: Device) -> Time:
    """Of a step after the first few. Raises RonnaError where the device does not compute in the step's precision."""
    if not device.rates[step.compute]:
        fix = f'use precision = "fp32", or a device that computes {step.compute}'
        raise RonnaError(f"it computes no {step.compute}", where=f"device {device.name}", fix=fix)
    found = stages(divided(model, step.ranks), replace(step, device=device.kind))
    return max((stage_time(stage, device) for stage in found), key=lambda time: time.total)


def stage_time(stage: Stage, device: Device) -> Time:
    model, step = stage.holds, stage.step
    parts, update = micro_batch(stage.computes, step), optimizer(model, step)
    walks = 2 if step.fused_backward and step.clip else 1
    seconds = {
        "forward": spent(parts.forward, step, device) * step.micro_batches,
        "backward": spent(parts.backward, step, device) * step.micro_batches * walks,
        "recomputation": spent(parts.again, step, device) * step.micro_batches * walks,
        "loss": spent(parts.loss, step, device) * step.micro_batches,
        "optimizer": spent(update, step, elsewhere(step, device)),
    }
    work, times = Counter(update), step.micro_batches
    for part, again in ((parts.forward, 1), (parts.loss, 1), (parts.backward, walks), (parts.again, walks)):
        work.update({kind: units * again * times for kind, units in part.items()})
    calls = work["calls"] * cost("calls", step, device)
    communication = times * waiting(model, step, device, seconds)
    if step.ranks.pipeline > 1:
        busy = sum(seconds.values()) - seconds["optimizer"] + communication
        communication += waits(step.ranks, times) * busy / times
    return Time(
        **seconds,
        offload=offloaded(model, step) / device.host,
        overhead=max(0.0, calls - sum(seconds.values())) if device.kind == "cuda" else calls,
        communication=communication,
        flops=sum(work[kind] for kind in PRODUCTS),
        bytes=sum(units * width(kind, step) for kind, units in work.items()),
    )


def flops(model: c.Model, step: Step) -> float:
    """Floating-point operations of the matrix products that a step cannot do without, as utilisation (MFU) counts
    them: about 6 a token and weight where all learn, 4 where all but an adapter is frozen, and attention to the tokens
    that may be seen alone, once forward and twice backward. Nothing is counted for rounding, computing again or the
    optimizer."""
    bare = replace(step, device="cuda", compute="bf16", blocks=0, feeds=0)
    work = micro_batch(without_masks(model), bare).all
    return step.micro_batches * (sum(work[kind] for kind in PRODUCTS) - work["flash backward"] * 0.5 / 2.5)


def without_masks(model: c.Model) -> c.Model:
    """The same with no need for rectangles: neither bias of scores nor dropout."""
    encoder, decoder = (one and replace(one, relative_bias=None) for one in (model.encoder, model.decoder))
    return c.without_dropout(replace(model, encoder=encoder, decoder=decoder))


def spent(work: Mapping[str, float], step: Step, device: Device) -> float:
    """Seconds of all but calls."""
    alone = sum(units * cost(kind, step, device) for kind, units in work.items() if kind != "calls")
    return alone * SUSTAINED[device.kind]


def cost(kind: str, step: Step, device: Device) -> float:
    """Seconds of one unit of a kind of work."""
    if kind == "narrow":  # muon multiplies in bf16 where there are instructions for it
        return cost("linear", replace(step, compute=device.precision()), device)
    for key in (f"{step.compute} {kind}", kind):
        if key in device.costs:
            return device.costs[key]
    if kind in SHARES:
        return 1 / (device.rates[step.compute] * SHARES[kind])
    if kind == "calls":
        return CALL[device.kind]
    dear = DEAR.get(kind.removesuffix(" backward"), 1.0) if device.kind == "cpu" else 1.0
    return width(kind, step) * dear / device.bandwidth


def width(kind: str, step: Step) -> float:
    """Bytes that a unit moves."""
    if kind == "bytes":
        return 1.0
    if kind in PRODUCTS or kind.endswith(("operands", "calls")):
        return 0.0  # the rate of products is with theirs
    if kind in WALKS:
        return 4.0 * WALKS[kind][0]
    if kind in PASSES:
        return PASSES[kind]
    if kind.startswith("nf4"):
        return 0.5 + BYTES[step.compute]
    return float(BYTES[step.compute] * MOVED["backward" if kind.endswith("backward") else "forward"])


def micro_batch(model: c.Model, step: Step) -> Parts:
    """What one does, but for the optimizer."""
    n, table, again = step.numbers, Table.of(model, step), Counter[str]()
    number, done = 0, Work()
    for stack, lengths in ((model.encoder, step.source or step.lengths), (model.decoder, step.lengths)):
        if stack is None:
            continue
        last = stack is model.last
        reads = read_positions(model, step) if last else None
        done.add(embedding(model, stack, lengths, n, table.sparse))
        source = step.source if last else None
        part = scene_of(model, stack, lengths, source, step)
        for one, two in of_blocks(stack, part, reads):
            repeated = (one, two) if number < step.blocks else (two,) if number < step.blocks + step.feeds else ()
            for half in repeated:
                again.update(half.forward)
                again.subtract(half.spared)
            done.add(one)
            done.add(two)
            number += 1
        if stack.relative_bias is not None:
            relative(done, lengths, stack.blocks[0].attention.heads // step.ranks.context, n)
        if not last:
            norm(done, stack.final_norm, lengths.total * model.dim)
    words = (step.lengths.total if step.predicted is None else step.predicted) if model.head else 0
    words = -(-words // step.ranks.context)
    read = read_positions(model, step)
    done.add(heads(model, step.lengths.total if read is None else read, step.lengths.sequences, words, n))
    loss = vocabulary(model, words, n, chunk_rows(model.embedding.vocab, n.cuda)) if model.head is not None else Work()
    grown = gradients(model, step)
    if step.micro_batches > 1 and not step.fused_backward:  # added to those that are there
        done.backward.update({"bytes": 3 * grown})
    return Parts(done.forward, done.backward, again, loss.forward + loss.backward)


def of_blocks(stack: c.Stack, part: Scene, reads: int | None) -> Iterator[tuple[Work, Work]]:
    """Of each block; the first one's input has no gradient where the embedding is frozen."""
    known: dict[tuple[c.Block, int | None, bool], tuple[Work, Work]] = {}
    for i, cfg in enumerate(stack.blocks):
        key = (cfg, reads if i == len(stack.blocks) - 1 else None, i > 0)
        if key not in known:
            known[key] = halves(cfg, part, key[1], key[2])
        yield known[key]


def relative(done: Work, lengths: Lengths, heads: int, n: Numbers) -> None:
    """T5's bias, made once for all blocks."""
    view = lengths.packed(n.cuda)
    pairs = view.columns**2 * (1 if view.single else view.rows)
    done.moves(pairs * (heads * (4 + 2 * n.compute) + 80), 3 * pairs * heads * 4, 12)


def learning(model: c.Model, step: Step) -> list[Weight]:
    """On one rank."""
    whole = weights(model, Table.of(model, step).rows) if step.adapter is None else adapted(model, step.adapter)
    return [share(w, step.ranks) for w in whole]


def waiting(model: c.Model, step: Step, device: Device, seconds: Mapping[str, float]) -> float:
    """Seconds of a micro-batch. A GPU gathers blocks and adds up gradients while it computes others."""
    ranks, machine = step.ranks, device.machine
    if ranks.size == 1:
        return 0.0
    grown = sum(w.size for w in (weights(model) if step.adapter is None else adapted(model, step.adapter)))
    tokens = step.lengths.total + (step.source.total if step.source else 0)
    width, count = step.numbers.compute, len(blocks(model))
    activation = -(-tokens // ranks.context) * model.dim * width
    it = sent(model, ranks, activation, width, grown, 2 * step.blocks + step.feeds, step.micro_batches)
    together = max(1, machine // ranks.tensor)  # of a group of shards, on one machine
    copies = max(1, machine // (ranks.tensor * ranks.shards))

    def ring(size: float, members: int, here: int, times: int = 1) -> float:
        rate = device.link if members <= here else min(device.link, device.network * here)
        return size * (members - 1) / members / rate + times * (members - 1) * HOP

    members = ranks.shards if ranks.shards > 1 else ranks.pipeline  # the ends lie over both
    forward = ring(it.forward, members, together, count + 1)
    backward = ring(it.backward, ranks.shards, together, count)
    backward += ring(it.gradients, members, together, count + 1)
    backward += 2 * ring(it.gradients / ranks.shards, ranks.replicate, copies, count + 1)
    in_between = 2 * ring(it.activations, ranks.tensor, machine, it.sums)
    in_between += ring(it.exchanged, ranks.context, together, it.exchanges)
    if ranks.pipeline > 1:
        near = ranks.pipeline * ranks.context * ranks.tensor <= machine
        in_between += it.handed / (device.link if near else device.network) + 2 * ranks.chunks * HOP
    if device.kind == "cuda":
        each = 1 / step.micro_batches
        forward = max(0.0, forward - each * (seconds["forward"] + seconds["loss"]))
        backward = max(0.0, backward - each * (seconds["backward"] + seconds["recomputation"]))
    return forward + backward + in_between


def gradients(model: c.Model, step: Step) -> int:
    """Bytes of all, but for the token table where its gradient has rows for the tokens of a batch alone."""
    sparse = Table.of(model, step).sparse
    found = [w for w in learning(model, step) if not (sparse and w.path == "embedding.tokens")]
    return sum(w.size for w in found) * (4 if step.adapter else step.numbers.weight)


def optimizer(model: c.Model, step: Step) -> Counter[str]:
    """The gradient's norm, clipping, and the step itself."""
    own, cfg, work = learning(model, step), step.optimizer, Counter[str]()
    grown = gradients(model, step)
    if step.clip:
        work.update({"bytes": 3 * grown, "calls": len(own)})
    for w in own:
        kind = kind_of(cfg, w)
        work.update({kind: w.size, "calls": WALKS[kind][1] * w.times})
        if kind == "muon":
            short, long = sorted((w.rows, w.columns))
            work.update({"narrow": w.times * MUON_STEPS * (4 * short**2 * long + 2 * short**3)})
        if kind == "apollo":
            work.update({"linear": 2 * cfg.directions(w) * w.size})
        if step.lean:  # tensor by tensor, from a copy in fp32 that is then rounded by chance
            work.update({"rounded": w.size * (step.numbers.weight != 4), "calls": 20 * w.times})
    return work


def kind_of(cfg: Optimizer, w: Weight) -> str:
    """AdamW takes what an optimizer is not made for."""
    if cfg.kind in ("muon", "apollo") and not (w.columns and w.inside):
        return "adamw"
    return "adamw" if cfg.kind == "adam" else cfg.kind


def offloaded(model: c.Model, step: Step) -> float:
    """Bytes that go away and come back in a step: states, or of a GPU's weights the gradients and the weights, as the
    host takes the step; and activations."""
    own, moved = learning(model, step), 0
    if "optimizer" in step.offload:
        wide = 4 if step.adapter else step.numbers.weight
        there = sum(w.size for w in own) * wide if step.device == "cuda" else states(step.optimizer, own, wide)
        moved += 2 * there
    if "activations" in step.offload:
        kept = estimate(model, replace(step, offload=()))
        moved += 2 * step.micro_batches * sum(kept.activations)
    return float(moved)


def elsewhere(step: Step, device: Device) -> Device:
    """Where the optimizer's step is taken."""
    if device.kind == "cuda" and "optimizer" in step.offload:
        return replace(device, bandwidth=HOST_STREAM, costs={})
    return device
