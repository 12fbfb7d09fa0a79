"""What a model is, as plain data: nested frozen dataclasses, no torch.

Every part knows its own number of parameters and the floating-point operations of its matrix products,
so a planner can reason about a model that no machine here could hold. A family (`families/`) is a function
that fills these parts in; `transformer.py` builds any of them.

Legend: T tokens, C model width, H heads, D head size, V vocabulary, B sequences, L sequence length.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

from ronna.base.errors import RonnaError

Activation = Literal["gelu", "gelu_tanh", "silu", "relu", "tanh"]
Pool = Literal["first", "last", "mean"]
# What a classifier scores: a sequence, each of its tokens, each token as a start and as an end, two tokens together.
Unit = Literal["sequence", "tokens", "spans", "pair"]


@dataclass(frozen=True)
class Norm:
    kind: Literal["layer", "rms"] = "layer"
    eps: float = 1e-5
    bias: bool = True

    def params(self, dim: int) -> int:
        return dim * (2 if self.kind == "layer" and self.bias else 1)


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al. 2023)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies divided by `factor`, high ones kept, a ramp between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021), halves paired as (i, i + D/2)."""

    theta: float = 10_000.0
    scaling: LinearScaling | Llama3Scaling | None = None


@dataclass(frozen=True)
class RelativeBias:
    """T5's bucketed bias: one table for the whole stack, added to the attention scores (Raffel et al. 2020)."""

    buckets: int = 32
    max_distance: int = 128


@dataclass(frozen=True)
class LearnedPositions:
    count: int
    offset: int = 0  # row of the table that position 0 reads; RoBERTa keeps rows 0 and 1 for padding

    def params(self, dim: int) -> int:
        return self.count * dim


@dataclass(frozen=True)
class SinusoidalPositions:
    """Sines in the first half of the channels, cosines in the second (Vaswani et al. 2017)."""

    count: int

    def params(self, dim: int) -> int:
        return 0


@dataclass(frozen=True)
class Attention:
    heads: int
    head_dim: int
    kv_heads: int | None = None  # None: as many as heads
    bias: bool = False  # on q, k, v
    out_bias: bool = False
    qk_norm: Norm | None = None
    rotary: Rotary | None = None
    window: int | None = None  # sees at most this many tokens to either side
    scale: float | None = None  # None: D ** -0.5
    dropout: float = 0.0  # on the attention probabilities

    @property
    def kv(self) -> int:
        return self.kv_heads or self.heads

    def weights(self, dim: int) -> int:
        return 2 * dim * (self.heads + self.kv) * self.head_dim

    def params(self, dim: int) -> int:
        biases = (self.heads + 2 * self.kv) * self.head_dim * self.bias + dim * self.out_bias
        norms = 2 * self.qk_norm.params(self.head_dim) if self.qk_norm else 0
        return self.weights(dim) + biases + norms

    def flops(self, dim: int, queries: int, keys: int, context: int, read: int | None = None) -> int:
        """`queries` and `keys` in tokens; every query meets `context` keys (no credit for masking), and the
        outputs of `read` of them are computed (None: all)."""
        width, kv_width = self.heads * self.head_dim, self.kv * self.head_dim
        projections = 2 * dim * (2 * width * (queries if read is None else read) + 2 * kv_width * keys)
        return projections + 4 * queries * context * width


@dataclass(frozen=True)
class FeedForward:
    hidden: int
    act: Activation = "gelu"
    gated: bool = False
    bias: bool = False
    dropout: float = 0.0  # on the activations

    def weights(self, dim: int) -> int:
        return (3 if self.gated else 2) * dim * self.hidden

    def params(self, dim: int) -> int:
        biases = (2 if self.gated else 1) * self.hidden + dim
        return self.weights(dim) + biases * self.bias

    def flops(self, dim: int, tokens: int) -> int:
        return 2 * self.weights(dim) * tokens


@dataclass(frozen=True)
class Block:
    attention: Attention
    ffn: FeedForward
    norm: Norm
    norm_at: Literal["pre", "post"] = "pre"
    cross: Attention | None = None  # a decoder that also reads an encoder
    skip_first_norm: bool = False  # the embeddings are already normed
    dropout: float = 0.0  # on each layer's output, before the residual sum

    def params(self, dim: int) -> int:
        parts = (self.attention, self.ffn, self.cross)
        norms = 2 + (self.cross is not None) - self.skip_first_norm
        return sum(p.params(dim) for p in parts if p) + norms * self.norm.params(dim)

    def flops(
        self, dim: int, tokens: int, length: int, source_tokens: int, source_length: int, read: int | None = None
    ) -> int:
        total = self.attention.flops(dim, tokens, tokens, length, read)
        total += self.ffn.flops(dim, tokens if read is None else read)
        if self.cross:
            total += self.cross.flops(dim, tokens, source_tokens, source_length, read)
        return total


@dataclass(frozen=True)
class Stack:
    blocks: tuple[Block, ...]
    causal: bool
    final_norm: Norm | None = None
    relative_bias: RelativeBias | None = None
    dropout: float = 0.0  # on what comes in and what goes out; T5

    def params(self, dim: int) -> int:
        table = self.relative_bias.buckets * self.blocks[0].attention.heads if self.relative_bias else 0
        final = self.final_norm.params(dim) if self.final_norm else 0
        return sum(b.params(dim) for b in self.blocks) + final + table

    def flops(
        self,
        dim: int,
        tokens: int,
        length: int,
        source_tokens: int = 0,
        source_length: int = 0,
        read: int | None = None,
    ) -> int:
        """`read` of the last block's outputs are computed (None: all)."""
        sizes = (dim, tokens, length, source_tokens, source_length)
        return sum(b.flops(*sizes) for b in self.blocks[:-1]) + self.blocks[-1].flops(*sizes, read)


@dataclass(frozen=True)
class Embedding:
    vocab: int
    positions: LearnedPositions | SinusoidalPositions | None = None
    segments: int = 0  # BERT's sentence A / B; 0: none
    norm: Norm | None = None
    scale: float = 1.0  # on the token vectors
    dropout: float = 0.0

    def params(self, dim: int) -> int:
        positions = self.positions.params(dim) if self.positions else 0
        return (self.vocab + self.segments) * dim + positions + (self.norm.params(dim) if self.norm else 0)


@dataclass(frozen=True)
class Transform:
    """The dense layer, activation and norm between the last hidden state and the vocabulary."""

    act: Activation
    norm: Norm
    bias: bool = True

    def params(self, dim: int) -> int:
        return dim * dim + dim * self.bias + self.norm.params(dim)


@dataclass(frozen=True)
class Head:
    """Hidden states to logits over the vocabulary."""

    tied: bool = True
    bias: bool = False
    scale: float = 1.0
    transform: Transform | None = None

    def params(self, dim: int, vocab: int) -> int:
        transform = self.transform.params(dim) if self.transform else 0
        return transform + vocab * self.bias + (0 if self.tied else vocab * dim)

    def flops(self, dim: int, vocab: int, positions: int) -> int:
        return 2 * positions * dim * (vocab + (dim if self.transform else 0))


@dataclass(frozen=True)
class Classifier:
    """The last hidden states to `labels` scores: of each sequence, its states pooled into one, of each token, or of
    two tokens of each sequence, their states side by side."""

    labels: int
    pool: Pool = "first"
    dense: Activation | None = None  # a square layer with this activation before the scores
    dense_bias: bool = True
    norm: Norm | None = None  # after the dense layer
    bias: bool = True
    dense_dropout: float = 0.0  # on what the dense layer reads
    dropout: float = 0.0  # on what the scores are made of
    of: Unit = "sequence"
    transitions: bool = False  # of tokens: also how well the labels of neighbours go together, for a task to add up

    def params(self, dim: int) -> int:
        dense = dim * dim + dim * self.dense_bias if self.dense else 0
        pairs = (self.labels + 2) * self.transitions
        row = self.states * dim + self.bias + pairs
        return dense + (self.norm.params(dim) if self.norm else 0) + self.labels * row

    @property
    def states(self) -> int:
        """Hidden states that one row of scores is made of, after pooling."""
        return 2 if self.of == "pair" else 1

    def reads(self, sequences: int, length: int, predicted: int | None = None) -> int:
        """Positions whose states it needs, `predicted` of them (None: all) where it scores tokens."""
        if self.of in ("tokens", "spans"):
            return sequences * length if predicted is None else predicted
        return sequences * (length if self.pool == "mean" and self.of == "sequence" else self.states)

    def flops(self, dim: int, vectors: int) -> int:
        """For so many sequences, tokens or pairs."""
        return 2 * vectors * self.states * dim * (self.labels + (dim if self.dense else 0))


@dataclass(frozen=True)
class Init:
    """How new weights are drawn.

    normal: N(0, std), biases 0 (BERT, Llama). residual: the same, with what writes into the residual stream
    divided by sqrt(2 x blocks) (GPT-2). fan_in: N(0, 1/fan_in) and unit embeddings (T5). xavier: Glorot uniform
    and embeddings N(0, 1/C) (the 2017 Transformer).
    """

    scheme: Literal["normal", "residual", "fan_in", "xavier"] = "normal"
    std: float = 0.02


@dataclass(frozen=True)
class Model:
    """BERT has an encoder, GPT a decoder, T5 both; the vocabulary head and the classifier may each be absent."""

    dim: int
    embedding: Embedding
    head: Head | None = None
    encoder: Stack | None = None
    decoder: Stack | None = None
    classifier: Classifier | None = None
    init: Init = Init()
    context: int | None = None  # the length it is made for, where no table of positions sets one
    pool: Pool | None = None  # of a classifier that it may get; None: as its family does it

    @property
    def last(self) -> Stack:
        stack = self.decoder or self.encoder
        assert stack is not None, "a model has an encoder, a decoder or both"
        return stack

    @property
    def max_length(self) -> int | None:
        """The most tokens a sequence may have, or None where neither a table nor a family says."""
        positions = self.embedding.positions
        if positions is None:
            return self.context
        return positions.count - (positions.offset if isinstance(positions, LearnedPositions) else 0)

    def params(self) -> int:
        total = self.embedding.params(self.dim)
        total += sum(s.params(self.dim) for s in (self.encoder, self.decoder) if s)
        total += self.head.params(self.dim, self.embedding.vocab) if self.head else 0
        return total + (self.classifier.params(self.dim) if self.classifier else 0)

    def flops(self, sequences: int, length: int, source_length: int = 0, predicted: int | None = None) -> int:
        """Forward floating-point operations of all matrix products for equal sequences.

        `predicted` is the number of positions given to the vocabulary head or a classifier of tokens (None: all);
        the last block computes no others, but for what a classifier of sequences pools. A training step costs
        three times this. Masked-out attention counts as computed, as FLOP counters do.
        """
        tokens, source = sequences * length, sequences * source_length
        total = 0
        if self.encoder and self.decoder:
            total += self.encoder.flops(self.dim, source, source_length)
        words = (tokens if predicted is None else predicted) if self.head else 0
        scored = self.classifier.reads(sequences, length, predicted) if self.classifier else 0
        read = min(tokens, words + scored) if words + scored else None
        total += self.last.flops(self.dim, tokens, length, source, source_length, read)
        if self.head:
            total += self.head.flops(self.dim, self.embedding.vocab, words)
        if self.classifier:
            total += self.classifier.flops(self.dim, scored if self.classifier.of in ("tokens", "spans") else sequences)
        return total


def map_parts(part: Any, change: Callable[[Any], Any]) -> Any:
    """The same tree of parts with `change` applied to every dataclass in it, innermost first."""
    if isinstance(part, tuple):
        return tuple(map_parts(p, change) for p in part)
    if not is_dataclass(part) or isinstance(part, type):
        return part
    inner = {f.name: map_parts(getattr(part, f.name), change) for f in fields(part)}
    return change(replace(part, **inner))


def room_beside(virtual: int, longest: int | None, where: str = "peft.tokens") -> int | None:
    """What so many virtual tokens leave to the text of a model's positions. Raises RonnaError where that is nothing."""
    if longest is not None and virtual >= longest:
        said = f"{virtual} virtual tokens, and the model has {longest} positions for them and the text"
        raise RonnaError(said, where=where, fix="use fewer")
    return None if longest is None else longest - virtual


def without_dropout(model: Model) -> Model:
    def changed(part: Any) -> Any:
        had = {name for name in ("dropout", "dense_dropout") if getattr(part, name, 0.0)}
        return replace(part, **dict.fromkeys(had, 0.0)) if had else part

    return map_parts(model, changed)
