"""How much memory a training step needs, by arithmetic: components, the peak, and when in the step it is reached.

The moments of a step are walked one after the other: forward block by block, the loss, backward block by block, the
optimizer. The peak is the fullest moment, not the sum of what each component needs at its own. On a CPU it is what the
process grows by, as `ronna.base.heap` has it; on a GPU what torch allocates, which no run has been compared with yet.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ronna.model import config as c
from ronna.plan.heap import REHEARSED, SMALL, SPARE, TIGHT
from ronna.plan.inputs import inputs
from ronna.plan.ranks import MASTER, PASSED, around, block_sizes, divided, share
from ronna.plan.rehearsal import Rehearsal
from ronna.plan.stages import Stage, stages
from ronna.plan.stretches import Step, Stretch, Table, forward_pass, loss_parts, vocabulary_loss
from ronna.plan.weights import Weight, adapted, pieces, portions, scratch, spaces, states, weights

__all__ = ["Memory", "Step", "estimate"]

BITS = {"nf4": 4.5, "nf4_double": 4.127}  # a weight, scales included
CUDA_WORKSPACE = 2 * 32 * 2**20  # of matrix products on recent cards, of each of the threads of a step
BITSANDBYTES = 43 * 2**20  # what a process grows by that loads it
# What is not there between two steps.
PASSING = ("gathered", "gradients", "activations", "ends", "casts", "loss", "holes")


@dataclass(frozen=True)
class Memory:
    """Bytes. activations (of each block, the encoder's first), ends (those outside of the blocks), casts (of weights,
    for the backward pass) and the rest are what there is of each at its most; `held` is what there is at the fullest
    moment, `where`, and adds up to the peak."""

    weights: int
    optimizer: int
    gradients: int
    activations: tuple[int, ...]
    ends: int
    casts: int
    loss: int
    inputs: int
    workspace: int
    peak: int
    where: str
    held: dict[str, int]


def estimate(model: c.Model, step: Step) -> Memory:
    """Of a training step after the first, when the optimizer's states are there; of several ranks, on the fullest."""
    found = [estimate_stage(stage) for stage in stages(divided(model, step.ranks), step)]
    return max(found, key=lambda memory: memory.peak)


def estimate_stage(stage: Stage) -> Memory:
    model, step, n = stage.holds, stage.step, stage.step.numbers
    table = Table.of(model, step)
    learning = list(weights(model, table.rows)) if step.adapter is None else list(adapted(model, step.adapter))
    learning = [share(w, step.ranks) for w in learning]
    width = n.weight if step.adapter is None else 4
    walk = Walk(
        weights=model_bytes(model, step) + table.copy,
        optimizer=(0 if "optimizer" in step.offload else states(step.optimizer, learning, 4) + table.buffer)
        + (spaces(learning, width) if step.lean else 0),
        inputs=inputs(model, step.lengths, step.source, step.predicted, n),
        workspace=workspace(step),
        spare=0.0 if n.cuda else TIGHT if step.tight or step.lean or step.ranks.size > 1 else SPARE,
    )
    if step.ranks.size > 1:
        walk.shards = Shards(model, step)
    stretches, loss = list(forward_pass(stage.computes, step, table)), vocabulary_loss(stage.computes, step)
    dense = sum(w.size for w in learning) * width - (table.rows * model.dim * width if table.sparse else 0)
    inside, outside = ([w for w in learning if w.inside == within] for within in (True, False))
    beside = beside_step(step, learning, width)
    sparse = sum(s.rows for s in stretches)
    if step.micro_batches > 1 and not step.fused_backward:
        walk.now["gradients"] = dense + (step.micro_batches - 1) * sparse
    for s in stretches:
        walk.now["activations"] += int(stage.behind * s.profile.kept)
    forward(walk, stretches, loss)
    most = dict(walk.now)
    stepping = (beside_step(step, inside, width), beside_step(step, outside, width)) if step.fused_backward else (0, 0)
    backward(walk, stretches, step, stepping, model)
    if not step.fused_backward:
        once = min(sparse, table.rows * model.dim * width)
        walk.now["gradients"] = dense + step.micro_batches * sparse
        walk.moment("gradients by rows", once)
        walk.now["gradients"] = dense + once
        walk.moment("optimizer", beside)
    if walk.keeps_holes and (step.blocks or step.feeds):
        parts = [] if loss is None else list(loss_parts(model, step))
        optimizer = [size for w in learning for size in pieces(step.optimizer, w)]
        grown = Rehearsal(stretches, parts, optimizer, beside).high(step.micro_batches)
        walk.at_least(walk.now["weights"] + table.buffer + int(REHEARSED * grown))
    blocks = [0] * sum(len(stack.blocks) for stack in (model.encoder, model.decoder) if stack)
    for s in stretches:
        if s.block is not None:
            blocks[s.block] += s.profile.kept
    return Memory(
        weights=most["weights"],
        optimizer=most["optimizer"],
        gradients=dense + sparse,
        activations=tuple(blocks),
        ends=most["ends"],
        casts=most["casts"],
        loss=0 if loss is None else loss.profile.kept,
        inputs=most["inputs"],
        workspace=most["workspace"],
        peak=walk.peak,
        where=walk.where,
        held=walk.held,
    )


def workspace(step: Step) -> int:
    if step.device == "cuda":
        return CUDA_WORKSPACE
    return BITSANDBYTES if step.optimizer.kind == "adamw8bit" or step.quantize else 0


class Walk:
    """What is there now, by component, and what there was at the fullest moment."""

    def __init__(self, spare: float, **fixed: int):
        self.now = fixed | dict.fromkeys(PASSING, 0)
        self.fixed = sum(fixed.values())
        self.keeps_holes = spare == SPARE  # else what is freed is given back at once
        self.spare, self.peak, self.where, self.held = spare, 0, "", dict[str, int]()
        self.tight = spare == TIGHT
        self.shards: Shards | None = None

    def moment(self, where: str, passing: int) -> None:
        total = sum(self.now.values()) + passing
        spare = int(self.spare * (total - self.fixed - self.now["holes"]))
        spare += min(SMALL, total // 4) if self.tight else 0
        total += spare
        if total > self.peak:
            self.peak, self.where = total, where
            self.held = self.now | {"passing": passing, "holes": self.now["holes"] + spare}

    def at_least(self, peak: int) -> None:
        """Of the fullest moment."""
        if peak > self.peak:
            self.held["holes"] += peak - self.peak
            self.peak = peak

    def add(self, s: Stretch, sign: int) -> None:
        self.now["ends" if s.block is None else "activations"] += sign * s.profile.kept
        self.now["casts"] += sign * s.profile.casts
        self.now["ends"] += sign * s.gives
        self.now["holes"] += sign * s.holes * self.keeps_holes


class Shards:
    """What a rank holds of others' parts: a block's while it computes, and those around the blocks throughout; and
    gradients of whole weights until they have been added up."""

    def __init__(self, model: c.Model, step: Step):
        self.parts, self.clear = step.ranks.shards, step.micro_batches == 1
        self.blocks = [size * step.inside.compute for size in block_sizes(model)]
        self.ahead = 2 if step.numbers.cuda else 1  # the next one comes while one computes
        self.around = around(model) * MASTER
        self.width = step.inside.weight if step.adapter is None else PASSED
        self.kept = step.ranks.pipeline > 1 and not self.clear  # gradients around the blocks wait for the last
        self.whole = 0  # bytes of gradients that have not been added up

    def begin(self, walk: Walk) -> None:
        walk.moment("gathering around the blocks", 2 * self.around)
        walk.now["gathered"] = self.around
        walk.now["gradients"] += self.around if self.kept else 0

    def enter(self, walk: Walk, block: int, beside: int = 0) -> None:
        size = self.blocks[block]
        walk.moment(f"gathering block {block}", 2 * size + beside)
        walk.now["gathered"] += self.ahead * size

    def leave(self, walk: Walk, block: int | None) -> None:
        walk.now["gathered"] -= self.around if block is None else self.ahead * self.blocks[block]

    def add_up(self, walk: Walk, where: str, width: int) -> None:
        """Gradients of the whole weights of so many bytes a number turn into this rank's part."""
        passed = self.whole // width * PASSED
        walk.moment(f"adding up gradients {where}", passed + passed // self.parts)
        walk.now["gradients"] += (passed // self.parts if self.clear else 0) - self.whole
        self.whole = 0


def borders(stretches: list[Stretch]) -> Iterator[tuple[bool, Stretch, bool]]:
    """Each with whether it is the first and the last of its block."""
    before, behind = [None, *stretches[:-1]], [*stretches[1:], None]
    for a, s, b in zip(before, stretches, behind, strict=True):
        inside = s.block is not None
        yield inside and (a is None or a.block != s.block), s, inside and (b is None or b.block != s.block)


def forward(walk: Walk, stretches: list[Stretch], loss: Stretch | None) -> None:
    shards = walk.shards
    if shards:
        shards.begin(walk)
    for first, s, last in borders(stretches):
        if shards and first and s.block is not None:
            shards.enter(walk, s.block)
        walk.moment(f"forward of {s.name}", s.profile.forward)
        walk.add(s, 1)
        if shards and last:
            shards.leave(walk, s.block)
    if loss is not None:
        walk.now["holes"] += loss.holes * walk.keeps_holes
        walk.moment(loss.name, loss.profile.forward)
        walk.now["holes"] -= loss.holes * walk.keeps_holes
        walk.now["loss"] += loss.profile.kept
        walk.now["gradients"] += loss.profile.leaf
        if shards:
            shards.whole += loss.profile.leaf


def beside_step(step: Step, learning: list[Weight], width: int) -> int:
    """What the optimizer takes for these."""
    if step.lean:
        return portions(step.optimizer, learning, width, "optimizer" in step.offload, step.numbers.cuda)
    return scratch(step.optimizer, learning, 4)


def backward(walk: Walk, stretches: list[Stretch], step: Step, stepping: tuple[int, int], model: c.Model) -> None:
    """`stepping`: what the optimizer takes, where it steps in between, within the blocks and outside of them."""
    walk.now["loss"] = 0  # it is the gradient that goes into the last stretch
    if not step.keeps_gradients and model.head is not None and not model.head.tied:
        walk.now["gradients"] -= model.embedding.vocab * model.dim * step.numbers.weight * step.numbers.learns
    if step.fused_backward and step.clip:  # a pass for the norm alone, which frees nothing
        for s in reversed(stretches):
            walk.moment(f"backward of {s.name}", s.profile.backward - s.profile.held)
    memory, shards, around_blocks = 0, walk.shards, 0
    # `memory`: gradient of the encoder's states, to which every block of the decoder adds.
    if shards:
        around_blocks, shards.whole = shards.whole, 0
    for first, s, last in borders(stretches[::-1]):
        if shards and first and s.block is not None:  # what it has kept waits beside the gradient of what it gave
            shards.enter(walk, s.block, s.profile.out + memory)
        walk.add(s, -1)
        if s.gives:
            memory = 0
        memory = max(memory, s.memory)
        beside = stepping[s.block is None]
        walk.moment(f"backward of {s.name}", s.profile.backward + memory + max(0, beside - s.added))
        walk.now["gradients"] += s.rows + (s.profile.leaf if step.keeps_gradients else 0)
        if shards and s.block is None:
            around_blocks += s.profile.leaf
        elif shards:
            shards.whole += s.profile.leaf
            if last:
                shards.leave(walk, s.block)
                shards.add_up(walk, f"of block {s.block}", shards.width)
    if shards:
        shards.leave(walk, None)
        shards.whole = around_blocks
        shards.add_up(walk, "around the blocks", MASTER)


def model_bytes(model: c.Model, step: Step) -> int:
    """`model`: of one rank of a tensor group."""
    n = step.numbers
    params = sum(share(w, step.ranks).size for w in weights(model))
    if step.adapter is None:
        return params * n.weight
    own = sum(share(w, step.ranks).size for w in adapted(model, step.adapter)) * 4
    coded = 0
    if step.quantize is not None:
        coded = sum(w.size for w in weights(model) if w.inside and w.columns)
    wide = n.tables(model.embedding.norm is not None).weight - n.weight
    tables = sum(share(w, step.ranks).size for w in weights(model) if w.path.startswith("embedding.")) * wide
    # Beside the classifier that learns, and Houlsby's norms, stand the base's.
    return own + (params - coded) * n.weight + int(coded * BITS.get(step.quantize or "", 0) / 8) + tables
