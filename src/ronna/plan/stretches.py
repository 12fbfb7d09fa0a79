"""A training step as the stretches that a model's forward pass consists of, each with its memory.

Legend: T tokens, C channels, M predicted positions, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Self

from ronna.model import config as c
from ronna.plan import ends
from ronna.plan.blocks import Scene, attention_half, feed_half
from ronna.plan.heap import LOST, lost
from ronna.plan.ranks import ALONE, Ranks
from ronna.plan.shapes import BYTES, Adapter, Dtype, Lengths, Numbers
from ronna.plan.tape import Events, Profile, Tape, Value
from ronna.plan.weights import Optimizer

WORTHWHILE = 0.7  # as in ronna.train.rows


@dataclass(frozen=True)
class Step:
    """What the memory of a training step depends on beside the model.

    lengths: of a micro-batch, the decoder's where there are two stacks; source: what the encoder then reads.
    predicted: positions given to the vocabulary head (None: all). token_rows: tokens of the vocabulary that the data
    holds (None: not counted), which matters where a table of them is trained by rows. blocks and feeds: how many
    blocks, the encoder's first, are computed again for the backward pass, and of how many after them the feed-forward
    half. fused_backward: the optimizer steps within the backward pass, one weight at a time; `clip`: with the norm of
    all gradients known before, for which the backward pass is walked twice. offload and quantize: as in a run file.
    tight: a CPU's heap gives back what is freed, as it does in every `lean` run and on several `ranks` (see
    `ronna.base.heap`). ranks: that share the step; all other numbers are of one of them.
    """

    lengths: Lengths
    source: Lengths | None = None
    predicted: int | None = None
    compute: Dtype = "fp32"
    weights: Dtype = "fp32"
    optimizer: Optimizer = field(default_factory=Optimizer)
    adapter: Adapter | None = None  # None: everything learns
    token_rows: int | None = None
    micro_batches: int = 1
    blocks: int = 0
    feeds: int = 0
    fused_backward: bool = False
    clip: bool = True
    offload: tuple[Literal["optimizer", "activations"], ...] = ()
    quantize: Literal["nf4", "nf4_double"] | None = None
    tight: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    ranks: Ranks = ALONE
    compiled: bool = True  # which means something on a GPU

    @property
    def numbers(self) -> Numbers:
        """An adapter's base is held in the precision of the computation."""
        width = self.compute if self.adapter else self.weights
        away, four_bit = "activations" in self.offload, self.quantize is not None
        cuda = self.device == "cuda"
        return Numbers(BYTES[self.compute], BYTES[width], cuda, self.adapter, four_bit, away, cuda and self.compiled)

    def led(self, tokens: int) -> Self:
        """With so many virtual tokens before every text, which the first stack reads."""
        led = (self.source or self.lengths).ahead(tokens)
        return replace(self, source=led) if self.source else replace(self, lengths=led)

    @property
    def inside(self) -> Numbers:
        """Of blocks, which several ranks gather as they compute."""
        n = self.numbers
        return n if self.ranks.size == 1 else replace(n, weight=n.compute)

    @property
    def lean(self) -> bool:
        """Whether a step is taken tensor by tensor, as `ronna.run` has it."""
        ways = (self.weights == "bf16", self.fused_backward, "optimizer" in self.offload)
        return any(ways) or self.optimizer.kind in ("adamw8bit", "apollo")

    @property
    def keeps_gradients(self) -> bool:
        """Whether each weight's gradient is new in the backward pass and stays; on several ranks until it has been
        added up."""
        return (self.micro_batches == 1 and not self.fused_backward) or self.ranks.size > 1


class Stretch(NamedTuple):
    """Of a step. block: its number among all, None outside of the blocks. memory: bytes of the encoder's states that it
    reads. gives: those that it leaves for others. rows: of the token table, gradients by rows. holes: those that it
    leaves in the heap. added: a gradient of the table that goes as it is added to the head's, before the optimizer
    steps. parts: what it consists of, and what each gives; `again`: computed again."""

    name: str
    profile: Profile
    block: int | None = None
    memory: int = 0
    gives: int = 0
    rows: int = 0
    holes: int = 0
    added: int = 0
    parts: tuple[tuple[Tape, tuple[Value, ...]], ...] = ()
    again: bool = False


@dataclass(frozen=True)
class Table:
    """How the token table is trained: see `ronna.train.rows`. rows: those that the optimizer has; copy and buffer:
    bytes of what is held for it; sparse: whether its gradient has rows for the tokens of a batch alone."""

    rows: int
    sparse: bool = False
    copy: int = 0
    buffer: int = 0

    @classmethod
    def of(cls, model: c.Model, step: Step) -> "Table":
        vocab, tied = model.embedding.vocab, model.head is not None and model.head.tied
        alone = step.ranks.size == 1
        if step.device != "cpu" or tied or step.adapter is not None or step.lean or not alone:
            return cls(vocab)
        row = model.dim * step.numbers.weight
        if step.token_rows is not None and step.token_rows < WORTHWHILE * vocab:
            return cls(step.token_rows, True, step.token_rows * row + 8 * vocab, step.token_rows * row)
        return cls(vocab, True, 0, vocab * row)


def read_positions(model: c.Model, step: Step) -> int | None:
    """Of the last block's outputs, those that somebody reads; None: all."""
    lengths, words, scored = step.lengths, 0, 0
    if model.head is not None:
        words = lengths.total if step.predicted is None else step.predicted
    if (cfg := model.classifier) is not None:
        everything = cfg.of in ("tokens", "spans") or (cfg.of == "sequence" and cfg.pool == "mean")
        scored = lengths.total if everything else lengths.sequences * cfg.states
    found = words + scored
    return found if 0 < found < lengths.total else None


def vocabulary_loss(model: c.Model, step: Step) -> Stretch | None:
    if model.head is None:
        return None
    profile, holes = ends.vocabulary_loss(*loss_sizes(model, step), model.head.bias, loss_numbers(step))
    return Stretch("loss", profile, holes=holes)


def loss_numbers(step: Step) -> Numbers:
    """The softmax that ranks share word by word is not compiled."""
    return replace(step.numbers, compiled=step.numbers.compiled and step.ranks.tensor == 1)


def loss_sizes(model: c.Model, step: Step) -> tuple[int, int, int]:
    """V, C, M."""
    predicted = step.lengths.total if step.predicted is None else step.predicted
    return model.embedding.vocab, model.dim, -(-predicted // step.ranks.context)


def words_of(model: c.Model, step: Step) -> int | None:
    """Whose losses this rank computes; None: of all that is read."""
    return step.predicted if step.ranks.context == 1 else loss_sizes(model, step)[2]


def loss_parts(model: c.Model, step: Step) -> Events:
    return ends.chunks(*loss_sizes(model, step), loss_numbers(step))


def scene_of(model: c.Model, stack: c.Stack, lengths: Lengths, source: Lengths | None, step: Step) -> Scene:
    within, context = step.ranks.within, step.ranks.context
    ahead = step.adapter.rank if step.adapter and step.adapter.kind == "prefix" and stack is model.last else 0
    return Scene(model.dim, lengths, source, stack.causal, stack.relative_bias, step.inside, within, context, ahead)


def forward_pass(model: c.Model, step: Step, table: Table) -> Iterator[Stretch]:
    """In order, without the vocabulary loss."""
    n, keep, memory, number = step.numbers, step.keeps_gradients, 0, 0
    dense = 0 if table.sparse or not n.learns else model.embedding.vocab * model.dim * n.weight
    there = model.head is not None and model.head.tied  # the head's gradient of the table
    for name, stack, lengths in (
        ("encoder", model.encoder, step.source or step.lengths),
        ("decoder", model.decoder, step.lengths),
    ):
        if stack is None:
            continue
        last = stack is model.last
        reads = read_positions(model, step) if last else None
        t, x = ends.embedding(
            model, stack, lengths, n, dense, there, step.ranks.rows, led=stack is (model.encoder or model.decoder)
        )
        by_rows = lengths.total * model.dim * n.weight if table.sparse else 0
        profile = t.profile(x, keep_leaves=keep, away=n.away)
        added = dense if there else 0
        yield Stretch(f"{name}'s embedding", profile, rows=by_rows, added=added, parts=((t, (x,)),))
        there = True
        cross = step.source if last else None
        scene = scene_of(model, stack, lengths, cross, step)
        for i, (a, b, holes) in enumerate(halves(stack, scene, reads, x.needs, keep)):
            where = f"{name} block {i}"
            if number < step.blocks:
                both = again(together(a.profile, b.profile, keep))
                yield Stretch(where, both, number, memory, parts=(a.part, b.part), again=True)
            else:
                feed = number < step.blocks + step.feeds
                yield Stretch(where, a.profile, number, memory, holes=holes, parts=(a.part,))
                yield Stretch(where, again(b.profile) if feed else b.profile, number, parts=(b.part,), again=feed)
            number += 1
        rows = n.rows(lengths.total if reads is None else reads)
        read = lengths.total if reads is None else reads
        t, x = ends.ending(stack, model.dim, rows, read, True, n, step.ranks.rows)
        if last:
            outs = ends.heads(t, x, model, read, step.lengths.sequences, reads is None, words_of(model, step), n)
            yield Stretch("heads", t.profile(*outs, keep_leaves=keep, away=n.away), parts=((t, tuple(outs)),))
        else:
            memory = lengths.total * model.dim * n.compute
            profile = t.profile(x, keep_leaves=keep, away=n.away)
            yield Stretch(f"{name}'s end", profile, gives=memory, parts=((t, (x,)),))


class Half(NamedTuple):
    profile: Profile
    part: tuple[Tape, tuple[Value, ...]]


def halves(
    stack: c.Stack, scene: Scene, reads: int | None, needs: bool, keep_leaves: bool
) -> Iterator[tuple[Half, Half, int]]:
    """Of each block: attention, feed-forward, and the holes that it leaves in the heap."""
    known: dict[tuple[c.Block, int | None, bool], tuple[Half, Half, int, bool]] = {}
    before: tuple[c.Block, int | None, bool] | None = None
    given: tuple[Half, Half, int] | None = None
    for i, cfg in enumerate(stack.blocks):
        read = reads if i == len(stack.blocks) - 1 else None
        key = (cfg, read, needs)
        if given and before and cfg is before[0] and key[1:] == before[1:]:  # to hash a block takes a while
            yield given
            continue
        before = key
        if key not in known:
            t, x = attention_half(cfg, scene, read, needs)
            u, y = feed_half(cfg, scene, read, x.needs)
            holes = 0 if scene.numbers.cuda or read is not None else int(LOST * lost([(t, x), (u, y)]))
            away = scene.numbers.away
            first, second = (
                Half(tape.profile(out, keep_leaves=keep_leaves, away=away), (tape, (out,)))
                for tape, out in ((t, x), (u, y))
            )
            known[key] = first, second, holes, y.needs
        first, second, holes, needs = known[key]
        given = first, second, holes
        yield given


def together(a: Profile, b: Profile, keep_leaves: bool) -> Profile:
    after = max(a.held + b.backward, a.backward + (b.leaf if keep_leaves else 0))
    return Profile(
        max(a.forward, a.held + b.forward), a.kept + b.kept, a.casts + b.casts, after, a.leaf + b.leaf,
        a.start, b.out, a.keeps_start,
    )  # fmt: skip


def again(p: Profile) -> Profile:
    """Of a stretch that keeps what it reads alone, and is computed again for the backward pass."""
    backward = max(p.forward + p.out, p.backward + (0 if p.keeps_start else p.start))
    return replace(p, kept=p.start, casts=0, backward=backward)
