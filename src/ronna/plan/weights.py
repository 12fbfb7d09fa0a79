"""Every weight of a model by its shape, and what optimizers keep for it.

Legend: C channels, I inputs and O outputs of a linear map, V vocabulary, r rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Literal, NamedTuple

from ronna.model import config as c
from ronna.plan.shapes import Adapter

ROWS, ELEMENTWISE = 2**20, {"adamw", "adam", "sgd", "adamw8bit"}  # as in ronna.train.portions
DEQUANTIZED = 20  # bytes of a number that bitsandbytes takes on a CPU to step what it holds in 8 bits
Kind = Literal["adamw", "adam", "sgd", "adafactor", "muon", "adamw8bit", "apollo"]


class Weight(NamedTuple):
    """A matrix (rows, columns), or a vector of `rows` where there are no columns, `times` over; `inside` a block."""

    path: str
    rows: int
    columns: int = 0
    inside: bool = False
    times: int = 1

    @property
    def size(self) -> int:
        return self.rows * max(1, self.columns) * self.times


@dataclass(frozen=True)
class Optimizer:
    """momentum: of sgd, whether it has one. rank: of apollo's states; None: a quarter of a matrix's smaller side."""

    kind: Kind = "adamw"
    momentum: bool = True
    rank: int | None = None

    def directions(self, w: Weight) -> int:
        """Rank of a matrix's states."""
        short = min(w.rows, w.columns)
        return min(self.rank or max(1, short // 4), short)


def norm(path: str, cfg: c.Norm | None, dim: int, inside: bool = False) -> Iterator[Weight]:
    if cfg is not None:
        yield Weight(path, dim, 0, inside)
        if cfg.params(dim) > dim:
            yield Weight(f"{path}.bias", dim, 0, inside)


def linear(path: str, inputs: int, outputs: int, bias: bool, inside: bool = False) -> Iterator[Weight]:
    yield Weight(path, outputs, inputs, inside)
    if bias:
        yield Weight(path, outputs, 0, inside)


def attention(path: str, cfg: c.Attention, dim: int) -> Iterator[Weight]:
    inner, kv = cfg.heads * cfg.head_dim, cfg.kv * cfg.head_dim
    for name, inputs, outputs, bias in (
        ("q", dim, inner, cfg.bias),
        ("k", dim, kv, cfg.bias),
        ("v", dim, kv, cfg.bias),
        ("out", inner, dim, cfg.out_bias),
    ):
        yield from linear(f"{path}.{name}", inputs, outputs, bias, True)
    for _ in range(2):
        yield from norm(f"{path}.norm", cfg.qk_norm, cfg.head_dim, True)


def block(cfg: c.Block, dim: int) -> Iterator[Weight]:
    yield from attention("attention", cfg.attention, dim)
    if cfg.cross is not None:
        yield from attention("cross", cfg.cross, dim)
    yield from linear("ffn.up", dim, cfg.ffn.hidden, cfg.ffn.bias, True)
    if cfg.ffn.gated:
        yield from linear("ffn.gate", dim, cfg.ffn.hidden, cfg.ffn.bias, True)
    yield from linear("ffn.down", cfg.ffn.hidden, dim, cfg.ffn.bias, True)
    for _ in range(2 + (cfg.cross is not None) - cfg.skip_first_norm):
        yield from norm("norm", cfg.norm, dim, True)


def stack(cfg: c.Stack, dim: int) -> Iterator[Weight]:
    for one, same in groupby(cfg.blocks):
        count = len(list(same))
        yield from (w._replace(times=w.times * count) for w in block(one, dim))
    if cfg.relative_bias is not None:
        yield Weight("bias.table", cfg.relative_bias.buckets, cfg.blocks[0].attention.heads)
    yield from norm("final_norm", cfg.final_norm, dim)


def head(cfg: c.Head, dim: int, vocab: int) -> Iterator[Weight]:
    if cfg.transform is not None:
        yield from linear("head.dense", dim, dim, cfg.transform.bias)
        yield from norm("head.norm", cfg.transform.norm, dim)
    if not cfg.tied:
        yield Weight("head.logits", vocab, dim)
    if cfg.bias:
        yield Weight("head.logits", vocab)


def classifier(cfg: c.Classifier, dim: int) -> Iterator[Weight]:
    if cfg.dense is not None:
        yield from linear("classifier.dense", dim, dim, cfg.dense_bias)
    yield from norm("classifier.norm", cfg.norm, dim)
    yield from linear("classifier.out", cfg.states * dim, cfg.labels, cfg.bias)
    if cfg.transitions:
        yield Weight("classifier.transitions", cfg.labels + 2, cfg.labels)


def weights(model: c.Model, token_rows: int | None = None) -> Iterator[Weight]:
    """All of a model, in its own order, equal blocks together; of the token table `token_rows` (None: all)."""
    dim, table = model.dim, model.embedding
    yield Weight("embedding.tokens", table.vocab if token_rows is None else token_rows, dim)
    if isinstance(table.positions, c.LearnedPositions):
        yield Weight("embedding.positions", table.positions.count, dim)
    if table.segments:
        yield Weight("embedding.segments", table.segments, dim)
    yield from norm("embedding.norm", table.norm, dim)
    for one in (model.encoder, model.decoder):
        if one is not None:
            yield from stack(one, dim)
    if model.head is not None:
        yield from head(model.head, dim, table.vocab)
    if model.classifier is not None:
        yield from classifier(model.classifier, dim)


def adapted(model: c.Model, adapter: Adapter) -> Iterator[Weight]:
    """What learns of a model with an adapter: its own weights and the classifier."""
    for w in weights(replace(model, classifier=None)):
        yield from alongside(w, adapter)
    last, (n, hidden) = model.last, (adapter.rank, adapter.hidden)
    if adapter.kind == "prompt":
        yield Weight("embedding.prompt", n, model.dim)
    if adapter.kind == "prefix":
        width = sum(2 * b.attention.kv * b.attention.head_dim for b in last.blocks)
        yield Weight("prefix", n, hidden or width)
        if hidden is not None:
            yield from linear("prefix.inner", hidden, hidden, True)
            yield from linear("prefix.outer", hidden, width, True)
    if model.classifier is not None:
        yield from classifier(model.classifier, model.dim)


def alongside(w: Weight, adapter: Adapter) -> Iterator[Weight]:
    """What an adapter has for a weight of the base."""
    scale = w.path == "norm" or w.path.endswith((".norm", "_norm"))
    if w.inside and w.columns and adapter.on(w.path):
        inputs = w.rows if adapter.kind == "houlsby" else w.columns
        yield Weight(f"{w.path}.a", adapter.rank, inputs, True, w.times)
        yield Weight(f"{w.path}.b", w.rows, adapter.rank, True, w.times)
        if adapter.kind == "houlsby":
            yield from (Weight(w.path, n, 0, True, w.times) for n in (adapter.rank, w.rows))
    elif (adapter.kind == "houlsby" and (scale or w.path.endswith("norm.bias"))) or (
        adapter.kind == "bitfit" and w.inside and not w.columns and not scale
    ):
        yield w


def states(optimizer: Optimizer, learning: list[Weight], width: int) -> int:
    """Bytes that an optimizer keeps for weights of `width` bytes, moments being as wide as they."""
    return sum(state(optimizer, w, width) for w in learning)


def state(optimizer: Optimizer, w: Weight, width: int) -> int:
    match optimizer.kind:
        case "sgd":
            return w.size * width * optimizer.momentum
        case "adafactor" if w.columns:
            return (w.rows + w.columns) * w.times * width
        case "adafactor":
            return w.size * width
        case "muon" if w.columns and w.inside:
            return w.size * width
        case "adamw8bit":
            return 2 * w.size + w.size // 32
        case "apollo" if w.columns and w.inside:
            return 2 * optimizer.directions(w) * max(w.rows, w.columns) * w.times * width
    return 2 * w.size * width


def pieces(optimizer: Optimizer, w: Weight) -> list[int]:
    """The same for weights of four bytes, block by block."""
    count = 2 if optimizer.kind in ("adamw", "adam") else 1
    return [state(optimizer, w, 4) // (count * w.times)] * (count * w.times)


def spaces(learning: list[Weight], width: int) -> int:
    """What is held for copies of narrow weights and gradients where a step is taken tensor by tensor."""
    return 0 if width == 4 else 8 * min(ROWS, max(w.size // w.times for w in learning))


def portions(optimizer: Optimizer, learning: list[Weight], width: int, shelved: bool, cuda: bool) -> int:
    """The most bytes beside them that such a step takes (see `ronna.train.portions`); `shelved` states come for it."""
    most = 0
    for w in learning:
        size = w.size // w.times
        part = min(size, ROWS) if optimizer.kind in ELEMENTWISE else size
        taken = 8 * part if width != 4 and part > ROWS else 0
        taken += state(optimizer, w, 4) // w.times * part // size if shelved else 0
        taken += DEQUANTIZED * part if optimizer.kind == "adamw8bit" and not cuda else 0
        most = max(most, taken + scratch(optimizer, [w._replace(times=1)], 4))
    return most


def scratch(optimizer: Optimizer, learning: list[Weight], width: int) -> int:
    """The most bytes that an optimizer step takes beside weights, gradients and states: one matrix after another,
    the one before not gone until the next is there."""
    matrices = [w.size // w.times for w in learning if w.columns for _ in range(min(2, w.times))]
    match optimizer.kind:
        case "adafactor":
            return width * max((a + b for a, b in pairwise([0, *matrices])), default=0)
        case "muon":
            return max((muon(w, width) for w in learning if w.columns and w.inside), default=0)
        case "apollo":
            return width * 2 * max((w.rows * w.columns for w in learning if w.columns and w.inside), default=0)
    return 0


def muon(w: Weight, width: int) -> int:
    """Of the matrix: what becomes of the update, the next, and two products with itself; in bf16 it can be less."""
    short, size = min(w.rows, w.columns), w.rows * w.columns
    return width * (2 * size + 2 * short**2)
