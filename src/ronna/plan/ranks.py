"""How several devices share a training step: what each of them holds, and what they send to each other.

As `ronna.parallel` has it: blocks are gathered on every rank for as long as they compute, what stands around them for
the whole micro-batch; heads, hidden channels, words and rows are divided within a tensor group; ranks of a context
group share the rows of the same texts and, while they attend, the heads.

Legend: T tokens of a micro-batch, C channels, S shards.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from ronna.model import config as c
from ronna.plan.weights import Weight, block, weights

STEP_IN_PARTS = {"adamw", "adam", "sgd"}  # optimizers that step parts of tensors as they step whole ones
DEEP = 100  # blocks from which so many stages are looked at that there are few of them in each
MASTER, PASSED = 4, 4  # bytes of a weight that the optimizer has, and of a gradient that ranks add up


@dataclass(frozen=True)
class Ranks:
    """Copies of the model, the shards of each with samples of their own, and the ranks that divide the blocks of each
    shard and, with `sequence`, the rows of the states between them. context: ranks that share the tokens of a text.
    pipeline: ranks that micro-batches go through; chunks: runs of blocks that each of them has."""

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    sequence: bool = True
    context: int = 1
    pipeline: int = 1
    chunks: int = 1

    @property
    def size(self) -> int:
        return self.replicate * self.shards * self.pipeline * self.tensor

    @property
    def shards(self) -> int:
        """Those that the blocks of a copy, or of a stage of it, lie in."""
        return self.shard * self.context

    @property
    def within(self) -> int:
        """Ranks that divide the rows of the states between blocks, of those that a context group has left one."""
        return self.tensor if self.sequence else 1

    @property
    def rows(self) -> int:
        """Ranks that divide the rows of the states between blocks, in all."""
        return self.within * self.context

    @property
    def parts(self) -> int:
        """Ranks with samples of their own."""
        return self.replicate * self.shard

    @property
    def name(self) -> str:
        names = ["copies", "shards", "stages", "to a text", "to a block"]
        counts = zip((self.replicate, self.shard, self.pipeline, self.context, self.tensor), names, strict=True)
        return " x ".join(f"{count} {what}" for count, what in counts if count > 1) or "alone"


ALONE = Ranks()


def layouts(
    model: c.Model, devices: int, machine: int, most_parts: int, whole: bool = True, context: bool = False
) -> Iterator[Ranks]:
    """The sensible ones: groups that share blocks or texts within a machine, shards over a machine, over all, or none,
    and pipelines for which there are enough samples that more of them is done than waited for.

    machine: devices of one. most_parts: samples that there are to share. whole: whether all of the model learns, which
    divided blocks and pipelines need. context: whether texts may be divided, which only long ones are worth.
    """
    yield from flat_layouts(model, devices, machine, most_parts, whole, context)
    for deep in pipelines(model, devices) if whole else ():
        for ranks in flat_layouts(model, devices // deep, machine, most_parts // deep, whole, context):
            # Of the many there are, those that are known to be worth it: an answer is not to take long.
            if 1 in (ranks.replicate, ranks.shard) and ranks.tensor in (1, machine // 2, machine):
                yield replace(ranks, pipeline=deep)


def pipelines(model: c.Model, devices: int) -> list[int]:
    """How many ranks micro-batches may go through."""
    if model.encoder is not None and model.decoder is not None:
        return []
    deepest = 16 if len(model.last.blocks) >= DEEP else 8
    return [n for n in (2, 4, 8, 16) if devices % n == 0 and n <= min(deepest, len(model.last.blocks))]


def flat_layouts(
    model: c.Model, devices: int, machine: int, most_parts: int, tensor: bool, context: bool
) -> Iterator[Ranks]:
    """Those without a pipeline."""
    groups = [n for n in range(1, min(machine, devices) + 1) if devices % n == 0 and machine % n == 0]
    for texts in groups if context else [1]:
        for group in (n for n in groups if devices % (texts * n) == 0 and machine % (texts * n) == 0):
            parts, divided_blocks = devices // (texts * group), group > 1
            if parts > most_parts or (divided_blocks and not (tensor and divides(model, group))):
                continue
            if texts > 1 and not shares_heads(model, texts * group):
                continue
            for shard in sorted({parts, max(1, machine // (texts * group)), 1}, reverse=True):
                if parts % shard == 0:
                    yield Ranks(parts // shard, shard, group, context=texts)


def shares_heads(model: c.Model, ranks: int) -> bool:
    """Whether so many ranks can attend with as many heads each."""
    heads = {a.heads for one in blocks(model) for a in (one.attention, one.cross) if a is not None}
    return all(count % ranks == 0 for count in heads)


def apart(one: c.Attention, ranks: int) -> c.Attention:
    """The heads that one of the ranks has that share a text."""
    return replace(one, heads=one.heads // ranks, kv_heads=one.kv // math.gcd(one.kv, ranks)) if ranks > 1 else one


def divides(model: c.Model, ranks: int) -> bool:
    """Whether every block can be shared by so many."""
    blocks = [one for stack in (model.encoder, model.decoder) if stack for one in set(stack.blocks)]
    attentions = [a for one in blocks for a in (one.attention, one.cross) if a is not None]
    counts = [n for a in attentions for n in (a.heads, a.kv)] + [one.ffn.hidden for one in blocks]
    return all(count % ranks == 0 for count in counts)


def divided(model: c.Model, ranks: Ranks) -> c.Model:
    """What one rank of a tensor group computes."""
    n = ranks.tensor
    if n == 1:
        return model

    def fewer(one: c.Attention | None) -> c.Attention | None:
        return one and replace(one, heads=one.heads // n, kv_heads=one.kv // n)

    parts: dict[int, c.Block] = {}  # blocks that are one stay one: they are looked up by what they are

    def part(one: c.Block) -> c.Block:
        if id(one) not in parts:
            parts[id(one)] = part_of(one)
        return parts[id(one)]

    def part_of(one: c.Block) -> c.Block:
        ffn = replace(one.ffn, hidden=one.ffn.hidden // n)
        attention = fewer(one.attention)
        assert attention is not None
        return replace(one, attention=attention, cross=fewer(one.cross), ffn=ffn)

    stacks = (one and replace(one, blocks=tuple(part(b) for b in one.blocks)) for one in (model.encoder, model.decoder))
    encoder, decoder = stacks
    words = replace(model.embedding, vocab=-(-model.embedding.vocab // n))
    return replace(model, embedding=words, encoder=encoder, decoder=decoder)


def share(w: Weight, ranks: Ranks) -> Weight:
    """The first rank's rows, of which it has no fewer than any other."""
    shards = ranks.shards if w.inside else ranks.shards * ranks.pipeline
    return w._replace(rows=-(-w.rows // shards))


def block_sizes(model: c.Model) -> list[int]:
    """Weights of each block, the encoder's first."""
    some = {id(one): one for one in blocks(model)}  # to hash a block takes a while
    sizes = {key: sum(w.size for w in block(one, model.dim)) for key, one in some.items()}
    return [sizes[id(one)] for one in blocks(model)]


def blocks(model: c.Model) -> list[c.Block]:
    return [one for stack in (model.encoder, model.decoder) if stack for one in stack.blocks]


def around(model: c.Model) -> int:
    """Weights outside of the blocks."""
    return sum(w.size for w in weights(model)) - sum(block_sizes(model))


class Sent(NamedTuple):
    """Bytes that a rank gives others for a micro-batch, and takes from them: blocks gathered on the way forward and on
    the way back, gradients added up, and activations of divided blocks, which nothing can be computed without.

    Each is the whole of what goes through a ring; a ring of n ranks sends (n - 1) / n of it, and sums twice that.
    """

    forward: int
    backward: int
    gradients: int
    activations: int
    sums: int  # how many times activations are added up
    handed: int  # bytes of states that a pipeline's rank gives to the next, and of their gradients
    exchanged: int  # bytes that ranks which share texts exchange around attention, of all of them
    exchanges: int


def sent(
    model: c.Model, ranks: Ranks, activation: int, gathered: int, learning: int, again: int, micros: int = 1
) -> Sent:
    """`model` is that of one rank. activation: bytes of what goes into a block of the ranks that divide it. gathered:
    bytes of a block's weight as it computes. learning: weights that learn. again: halves of blocks that are computed
    again. micros: micro-batches, for all of which a pipeline gathers what is around the blocks once."""
    inside = sum(block_sizes(model)) * gathered if ranks.shards > 1 else 0
    times = micros if ranks.pipeline > 1 else 1
    rest = around(model) * MASTER // times if ranks.shards * ranks.pipeline > 1 else 0
    if ranks.pipeline > 1:
        learning = min(learning, sum(block_sizes(model))) * (ranks.shards > 1) + around(model) // times
    handed = 2 * ranks.chunks * activation // ranks.within if ranks.pipeline > 1 else 0
    # Of every part of a block both ways, of the vectors of tokens, and of the gradient that the words' loss gives.
    sums = sum(2 + (one.cross is not None) for one in blocks(model)) * 2 + 2 + again if ranks.tensor > 1 else 0
    exchanged, exchanges = 0, 0
    if ranks.context > 1:  # queries, keys, values and what comes of them, both ways
        attentions = [a for one in blocks(model) for a in (one.attention, one.cross) if a is not None]
        widths = (2 * (a.heads + a.kv) * a.head_dim for a in attentions)
        exchanged, exchanges = 2 * activation // model.dim * sum(widths), 4 * len(attentions)
        exchanged, exchanges = (n + n * again // (4 * len(blocks(model))) for n in (exchanged, exchanges))
    return Sent(inside + rest, inside, learning * PASSED, activation * sums, sums, handed, exchanged, exchanges)
