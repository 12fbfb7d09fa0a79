"""One transformer. Every family in `families/` is a value of `config.Model`; none has code of its own here.

Legend: T tokens of a flat batch, S tokens of the source batch, C channels, V vocabulary, B sequences.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ronna.model import config as c
from ronna.model.attention import Attention, LayerCache, Prefix, RelativeBias, relative
from ronna.model.boxes import box_of, local
from ronna.model.group import Group
from ronna.model.heads import Classifier, Head, pooled, pooled_places
from ronna.model.layers import FeedForward, Table, dropout, make_norm
from ronna.model.sequences import Reads, Sequences


@dataclass
class Cache:
    """What decoding keeps between steps; give the same object to every call."""

    layers: list[LayerCache] = field(default_factory=list)

    def layer(self, i: int) -> LayerCache:
        while len(self.layers) <= i:
            self.layers.append(LayerCache())
        return self.layers[i]

    def select(self, rows: Tensor) -> None:
        for layer in self.layers:
            layer.select(rows)


@dataclass(frozen=True)
class Memory:
    """An encoder's states (S, C) and where their sequences lie."""

    states: Tensor
    sequences: Sequences


class Block(nn.Module):
    def __init__(self, cfg: c.Block, dim: int, causal: bool):
        super().__init__()
        self.cfg = cfg
        self.group = Group()  # of the ranks that divide its maps
        self.attention = Attention(cfg.attention, dim, causal)
        self.attention_norm = make_norm(None if cfg.skip_first_norm else cfg.norm, dim)
        self.cross = Attention(cfg.cross, dim, causal=False) if cfg.cross else None
        self.cross_norm = make_norm(cfg.norm, dim) if cfg.cross else None
        self.ffn = FeedForward(cfg.ffn, dim)
        self.ffn_norm = make_norm(cfg.norm, dim)
        self.finish: Callable[[Tensor, Tensor], Tensor] | None = None  # `closed_and_fed`, where that is compiled as one

    def forward(
        self,
        x: Tensor,
        sequences: Sequences,
        bias: RelativeBias | None = None,
        memory: Memory | None = None,
        cache: LayerCache | None = None,
        reads: Reads | None = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """x (rows, C) -> (rows, C), or the rows that `reads` picks of it: see `computed_rows`."""
        attention, tokens, angles = self.attention, sequences.tokens, self.attention.angles(sequences)
        if reads is None:
            q, k, v = self.open(x, tokens, angles)
        else:
            q, k, v = attention.project_read(self.entered(x, self.attention_norm), tokens, angles, reads)
            x = self.group.split(reads.pick(self.group.join(x)))
        y = attention.mix(q, k, v, sequences, bias, cache, prefix)
        del q, k, v
        y = sequences.widen(y) if reads is None else reads.pick(y)
        if self.finish is not None:
            return self.finish(x, y)
        x = self.close(x, y)
        del y
        return self.feed(self.crossed(x, sequences, memory, cache, reads))

    def crossed(
        self, x: Tensor, sequences: Sequences, memory: Memory | None, cache: LayerCache | None, reads: Reads | None
    ) -> Tensor:
        """x (rows, C) with what it takes from an encoder's states, if it reads one."""
        if self.cross is None or self.cross_norm is None or memory is None:
            return x
        states, entered = self.group.shared(memory.states), self.entered(x, self.cross_norm)
        y = self.cross.cross(entered, sequences, states, memory.sequences, cache, reads)
        return self.added(x, y, self.cross_norm)

    # What looks at tokens one at a time, before and behind the attention: see `model.compiled`.

    def open(self, x: Tensor, tokens: int, angles: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (rows, C)."""
        return self.attention.project(self.entered(x, self.attention_norm), tokens, angles)

    def close(self, x: Tensor, y: Tensor) -> Tensor:
        """x (rows, C), and y (rows, H D) that its tokens have taken from each other, -> (rows, C)."""
        return self.added(x, self.attention.close(y), self.attention_norm)

    def feed(self, x: Tensor) -> Tensor:
        return self.added(x, self.ffn(self.entered(x, self.ffn_norm)), self.ffn_norm)

    def closed_and_fed(self, x: Tensor, y: Tensor) -> Tensor:
        return self.feed(self.close(x, y))

    def entered(self, x: Tensor, norm: nn.Module) -> Tensor:
        """What a layer reads of the residual stream x."""
        return self.group.into(norm(x) if self.cfg.norm_at == "pre" else x)

    def added(self, x: Tensor, y: Tensor, norm: nn.Module) -> Tensor:
        """The residual stream x with what a layer says, y."""
        total = dropout(self.group.out(y), self.cfg.dropout, self.training) + x
        return total if self.cfg.norm_at == "pre" else norm(total)


class Stack(nn.Module):
    def __init__(self, cfg: c.Stack, dim: int):
        super().__init__()
        self.cfg = cfg
        self.group = Group()  # as its blocks have it
        self.blocks = nn.ModuleList(Block(b, dim, cfg.causal) for b in cfg.blocks)
        heads = cfg.blocks[0].attention.heads
        self.bias = RelativeBias(cfg.relative_bias, heads, cfg.causal) if cfg.relative_bias else None
        self.final_norm = make_norm(cfg.final_norm, dim)

    @property
    def ahead(self) -> int:
        """Keys of the prefix."""
        return 0

    def prefix(self) -> list[Prefix | None]:
        """What the attention of each block reads before every sequence: `peft` gives the class of a module some."""
        return [None] * len(self.blocks)

    def forward(
        self,
        x: Tensor,
        sequences: Sequences,
        memory: Memory | None = None,
        cache: Cache | None = None,
        reads: Reads | None = None,
    ) -> Tensor:
        """States (T, C) of x (T, C), or those (M, C) that are read."""
        x = self.through(self.enter(x, sequences), range(len(self.blocks)), sequences, memory, cache, reads)
        return self.leave(x, sequences, reads)

    def enter(self, x: Tensor, sequences: Sequences) -> Tensor:
        """(T, C) -> the rows that blocks compute on."""
        return self.group.split(sequences.widen(dropout(x, self.cfg.dropout, self.training)))

    def through(
        self,
        x: Tensor,
        blocks: Iterable[int],
        sequences: Sequences,
        memory: Memory | None,
        cache: Cache | None,
        reads: Reads | None,
    ) -> Tensor:
        """Some of the blocks, one after the other."""
        if self.bias is not None and cache is None:
            relative(self.bias, sequences, x.dtype, self.ahead)  # outside of any block, which may be computed twice
        last, prefixes = len(self.blocks) - 1, self.prefix()
        for i in blocks:
            layer = cache.layer(i) if cache else None
            x = self.blocks[i](x, sequences, self.bias, memory, layer, reads if i == last else None, prefixes[i])
        return x

    def leave(self, x: Tensor, sequences: Sequences, reads: Reads | None) -> Tensor:
        x = self.group.join(x)[: sequences.tokens if reads is None else len(reads.index)]
        return dropout(self.final_norm(x), self.cfg.dropout, self.training)


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """(T,) -> (T, C) fp32: sines of position / 10000 ** (2i / C), then their cosines."""
    freqs = 10_000.0 ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angle = positions.float()[:, None] * freqs
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class Embedding(nn.Module):
    def __init__(self, cfg: c.Embedding, dim: int):
        super().__init__()
        self.cfg, self.dim = cfg, dim
        self.group = Group()  # of the ranks that divide its words
        self.tokens = Table(cfg.vocab, dim)
        learned = isinstance(cfg.positions, c.LearnedPositions)
        self.positions = Table(cfg.positions.count, dim) if learned else None  # type: ignore[union-attr]
        self.segments = Table(cfg.segments, dim) if cfg.segments else None
        self.norm = make_norm(cfg.norm, dim)

    def virtual(self) -> Tensor | None:
        """Vectors (n, C) of virtual tokens, to stand before every text: `peft` gives the class of a module some."""
        return None

    def vectors(self, tokens: Tensor) -> Tensor:
        if self.group.size == 1:
            return self.tokens(tokens)
        table, first = local(self.tokens.weight), box_of(self.tokens.weight).start[0]
        here = (tokens >= first) & (tokens < first + len(table))
        return self.group.total(F.embedding((tokens - first) * here, table) * here[:, None])

    def forward(self, tokens: Tensor, sequences: Sequences, segments: Tensor | None = None) -> Tensor:
        """(T, C) of tokens and segments (T,), or of T less the virtual tokens that `sequences` has places for."""
        x = self.vectors(tokens)
        if self.cfg.scale != 1.0:
            x = x * self.cfg.scale
        if sequences.front and (virtual := self.virtual()) is not None:
            x = sequences.lead(virtual, x)
            segments = None if segments is None else sequences.lead(segments.new_zeros(sequences.front), segments)
        match self.cfg.positions:
            case c.LearnedPositions(offset=offset):
                x = x + self.positions(sequences.positions + offset)  # type: ignore[misc]
            case c.SinusoidalPositions():
                x = x + sequences.memo(("sinusoids", self.dim), lambda: sinusoids(sequences.positions, self.dim))
        if self.segments is not None:
            x = x + (self.segments.weight[0] if segments is None else self.segments(segments))
        return self.norm(x)


class Transformer(nn.Module):
    """The model that `cfg` describes. Activations run in `compute` precision, parameters stay as they are."""

    def __init__(self, cfg: c.Model):
        super().__init__()
        self.cfg = cfg
        self.compute = torch.float32
        self.embedding = Embedding(cfg.embedding, cfg.dim)
        self.encoder = Stack(cfg.encoder, cfg.dim) if cfg.encoder else None
        self.decoder = Stack(cfg.decoder, cfg.dim) if cfg.decoder else None
        self.head = Head(cfg.head, cfg.dim, cfg.embedding.vocab) if cfg.head else None
        self.classifier = Classifier(cfg.classifier, cfg.dim) if cfg.classifier else None
        self.tie()

    def tie(self) -> None:
        """One tensor for embedding and head; to be called again after anything that replaces parameters."""
        if self.head is not None and self.head.cfg.tied:
            self.head.logits.weight = self.embedding.tokens.weight

    @property
    def device(self) -> torch.device:
        return self.embedding.tokens.weight.device

    def embed(self, tokens: Tensor, sequences: Sequences, segments: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens, sequences, segments)
        return dropout(x, self.cfg.embedding.dropout, self.training).to(self.compute)

    @property
    def last(self) -> Stack:
        """The stack whose states are the model's."""
        stack = self.decoder if self.decoder is not None else self.encoder
        assert stack is not None
        return stack

    @property
    def max_length(self) -> int | None:
        """The most tokens that a text may have, or None where nothing says."""
        longest = self.cfg.max_length
        return None if longest is None else longest - self.ahead

    @property
    def ahead(self) -> int:
        """Virtual tokens, and keys that nobody computes, before every text."""
        virtual = self.embedding.virtual()
        return self.last.ahead + (0 if virtual is None else len(virtual))

    def placed(self, sequences: Sequences, stack: Stack, memory: Memory | None = None) -> Sequences:
        """Where a text's tokens lie in what a stack reads; virtual ones stand before what the first stack reads."""
        virtual = self.embedding.virtual() if memory is None else None
        past, front = stack.ahead, 0 if virtual is None else len(virtual)
        return sequences.behind(past, front) if past or front else sequences

    def encode(self, tokens: Tensor, sequences: Sequences) -> Memory:
        """What the decoder of an encoder-decoder reads, from source tokens (S,)."""
        assert self.encoder is not None
        sequences = self.placed(sequences, self.encoder)
        return Memory(self.encoder(self.embed(tokens, sequences), sequences), sequences)

    def hidden(
        self,
        tokens: Tensor,
        sequences: Sequences,
        segments: Tensor | None = None,
        memory: Memory | None = None,
        cache: Cache | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """The last stack's states (T, C) of flat tokens (T,), or (M, C) at the places `at` (M,), each named once.

        Nobody reads the other places of the last block, so it computes keys and values alone for them. Raises
        ValueError where `at` names a place twice, which would count its gradient twice (a GPU is not made to wait
        for this check).
        """
        sequences = self.placed(sequences, self.last, memory)
        return self.states(tokens, sequences, segments, memory, cache, sequences.places(at))

    def states(
        self,
        tokens: Tensor,
        sequences: Sequences,
        segments: Tensor | None,
        memory: Memory | None,
        cache: Cache | None,
        at: Tensor | None,
    ) -> Tensor:
        """`hidden`, of sequences and places `at` as the stack has them."""
        if at is not None and not at.is_cuda and len(at.unique()) < len(at):
            raise ValueError("`at` names a place twice")
        reads = None if at is None or len(at) == sequences.tokens else Reads(at, sequences.tokens)
        states = self.last(self.embed(tokens, sequences, segments), sequences, memory, cache, reads)
        return states if at is None or reads is not None else states.index_select(0, at)

    def pooled(self, tokens: Tensor, sequences: Sequences, pool: c.Pool) -> Tensor:
        """One state a sequence (B, C), of a model without a classifier."""
        sequences = self.placed(sequences, self.last)
        at = pooled_places(sequences, pool)
        return pooled(self.states(tokens, sequences, None, None, None, at), sequences, pool)

    def scores(
        self,
        tokens: Tensor,
        sequences: Sequences,
        segments: Tensor | None = None,
        memory: Memory | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """The classifier's scores in fp32: (B, labels), or (M, labels) of the tokens `at` (M,) where it scores tokens
        (None: all T). Where it scores pairs, `at` (2 B,) are two places of each sequence."""
        assert self.classifier is not None, "this model has no classifier"
        sequences = self.placed(sequences, self.last, memory)
        at = self.classifier.reads(sequences, sequences.places(at))
        return self.classifier(self.states(tokens, sequences, segments, memory, None, at), sequences)

    def forward(
        self,
        tokens: Tensor,
        sequences: Sequences,
        segments: Tensor | None = None,
        memory: Memory | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Vocabulary logits (T, V)."""
        assert self.head is not None, "this model has no vocabulary head"
        return self.head(self.hidden(tokens, sequences, segments, memory, cache))
