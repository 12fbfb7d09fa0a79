"""What a training step does, part by part: floating-point operations, bytes moved, operations called.

The parts are those of `ronna.model.transformer`, in the shapes that it really computes: rounded rows of linear maps,
whole rectangles of attention, and of the last block what somebody reads.

Legend: T tokens, R rows and L columns of an attention view, H heads, K key/value heads, D head size, C channels, I
inputs and O outputs of a linear map, M positions read, V vocabulary.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from ronna.model import config as c
from ronna.plan.blocks import WRITTEN_OUT, Scene, mask_bytes
from ronna.plan.layers import MERGED, TOGETHER
from ronna.plan.ranks import apart
from ronna.plan.shapes import Lengths, Numbers, View

# Of these, units are floating-point operations: linear maps; an optimizer's products in bf16; many small matrices;
# attention in one kernel.
PRODUCTS = ("linear", "narrow", "batched", "flash", "flash backward")
FLASH_KEYS = 512  # keys that a CPU's kernel takes at a time: it skips those that stand wholly behind the queries


@dataclass
class Work:
    """Units of each kind of work, forward and backward. `linear`, `batched`, `flash`: FLOPs; `... operands`: bytes
    that those products read and write; `bytes`: that all the rest moves; `calls`: of operations; named after an
    activation, a norm, `mask`, `softmax`, `dropout`, `words` (softmax of a vocabulary) or `nf4`: numbers. `spared`: of
    the forward pass, what is not done when it is repeated, since only its result needs it."""

    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)
    spared: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Work") -> None:
        for mine, its in ((self.forward, other.forward), (self.backward, other.backward), (self.spared, other.spared)):
            mine.update(its)

    def moves(self, forward: float, backward: float | None = None, calls: int = 1) -> None:
        """So many bytes read and written (None: backward as many); each way so many operations."""
        self.forward.update({"bytes": forward, "calls": calls})
        self.backward.update({"bytes": forward if backward is None else backward, "calls": calls})

    def each(self, kind: str, numbers: float) -> None:
        """An operation that is dearer than the bytes that it moves."""
        self.forward.update({kind: numbers, "calls": 1})
        self.backward.update({f"{kind} backward": numbers, "calls": 1})

    def product(self, kind: str, sides: tuple[int, int, int], e: int, gradients: int, times: int = 1) -> None:
        """(a, b) x (b, c), so many times; `gradients`: of how many operands."""
        a, b, o = sides
        one = {
            kind: 2 * a * b * o * times,
            f"{kind} operands": e * (a * b + b * o + a * o) * times,
            f"{kind} calls": 1,
            "calls": 1,
        }
        self.forward.update(one)
        for _ in range(gradients):
            self.backward.update(one)


def linear(w: Work, rows: int, sides: tuple[int, int], bias: bool, n: Numbers, path: str, needs: bool) -> None:
    """A map of `sides` (I, O), inside a block if it has a path; `needs`: whether its input has a gradient."""
    inputs, outputs = sides
    w.product("linear", (rows, inputs, outputs), n.compute, needs + n.learns)
    if n.learns and n.compute != n.weight:  # the cast of the weights, and of their gradient
        w.moves(inputs * outputs * (n.compute + n.weight))
    if n.four_bit and path:
        w.each("nf4", inputs * outputs)
    if bias and n.learns:
        w.backward.update({"bytes": rows * outputs * n.compute, "calls": 1})
    changed(w, rows, sides, n, path, needs)


def changed(w: Work, rows: int, sides: tuple[int, int], n: Numbers, path: str, needs: bool) -> None:
    """What an adapter does to the output of a map."""
    if n.adapter is None or not path or not n.adapter.on(path):
        return
    (inputs, outputs), rank, e = sides, n.adapter.rank, n.compute
    if n.adapter.kind == "houlsby":
        linear(w, rows, (outputs, rank), True, n.own, "", True)
        w.each(n.adapter.act, rows * rank)
        linear(w, rows, (rank, outputs), True, n.own, "", True)
        w.moves(3 * rows * outputs * e)
        return
    w.product("linear", (rows, inputs, rank), e, needs + 1)
    w.product("linear", (rows, rank, outputs), e, 2)
    w.moves((inputs + outputs) * rank * (4 + e), calls=4)
    w.moves(2 * rows * outputs * e, 3 * rows * inputs * e * needs, calls=1)


def merged(
    w: Work, rows: int, inputs: int, outputs: list[tuple[str, int]], bias: bool, n: Numbers, needs: bool
) -> None:
    """Several maps of one input, as one product of joined weights where there are rows enough."""
    if rows < MERGED or inputs * sum(o for _, o in outputs) > TOGETHER or n.four_bit:
        for path, o in outputs:
            linear(w, rows, (inputs, o), bias, n, path, needs)
        return
    total = sum(o for _, o in outputs)
    linear(w, rows, (inputs, total), bias, n, "", needs)
    w.moves(2 * inputs * total * n.compute, 2 * rows * total * n.compute * (needs or n.learns), len(outputs))
    for path, o in outputs:
        changed(w, rows, (inputs, o), n, path, needs)


def learns(n: Numbers, path: str) -> bool:
    """Whether anything of a map does, or of what it reads or is changed by."""
    return n.adapter is None or n.adapter.kind != "lora" or n.adapter.on(path)


def norm(w: Work, cfg: c.Norm | None, numbers: int) -> None:
    if cfg is not None:
        w.each(cfg.kind, numbers)


def dropout(w: Work, rate: float, numbers: int) -> None:
    if rate:
        w.each("dropout", numbers)


def spread(w: Work, view: View, width: int, gathered: bool = False) -> None:
    """Rows of `width` bytes between flat tokens and a view, where they do not fill it in order."""
    if not view.full:
        w.moves((2 * view.tokens + (0 if gathered else view.cells)) * width, calls=1 + (not gathered))


def attend(
    w: Work, p: Scene, cfg: c.Attention, views: tuple[View, View], mask: bool, needs: tuple[bool, bool, bool]
) -> None:
    """Scores, softmax and values over rectangles of queries and keys, each spread before and gathered after; `needs`:
    which of queries, keys and values have a gradient."""
    n, (queries, keys) = p.numbers, views
    e, wide, narrow = n.compute, cfg.heads * cfg.head_dim * n.compute, cfg.kv * cfg.head_dim * n.compute
    spread(w, queries, wide)
    for _ in range(2):
        spread(w, keys, narrow)
    causal = p.causal and queries is keys
    if n.cuda or not (cfg.dropout or keys.columns <= WRITTEN_OUT):
        share = 1.0
        if causal and not mask:
            blocks = -(-keys.columns // FLASH_KEYS)
            share = (blocks + 1) / (2 * blocks) if not n.cuda else 0.5
        flops = 4 * queries.cells * keys.columns * cfg.heads * cfg.head_dim * share
        w.forward.update({"flash": flops, "bytes": 2 * queries.cells * (wide + narrow), "calls": 1})
        w.backward.update({"flash backward": 2.5 * flops, "bytes": 4 * queries.cells * (wide + narrow), "calls": 1})
    else:
        pairs, times = queries.cells * cfg.heads * keys.columns, queries.rows * cfg.heads
        w.moves(2 * queries.cells * wide)  # scaled
        w.moves(2 * (queries.cells + 2 * keys.cells) * wide, calls=3)  # heads and tokens change places
        w.product("batched", (queries.columns, cfg.head_dim, keys.columns), e, needs[0] + needs[1], times)
        if p.bias is not None and queries is keys:
            w.moves(3 * e * pairs, e * pairs)
        elif mask or causal:
            w.each("mask", pairs)
        w.each("softmax", pairs)
        dropout(w, cfg.dropout, pairs)
        gradients = (needs[0] or needs[1]) + needs[2]
        w.product("batched", (queries.columns, keys.columns, cfg.head_dim), e, gradients, times)
        w.moves(2 * queries.cells * wide)
    spread(w, queries, wide, gathered=True)


def attend_flat(w: Work, p: Scene, cfg: c.Attention, lengths: Lengths) -> None:
    """By a kernel that takes sequences as they are, and skips what nobody may see."""
    n, width = p.numbers, cfg.heads * cfg.head_dim
    mean = lengths.total / lengths.sequences
    context = mean / 2 if p.causal else mean
    if cfg.window is not None:
        context = min(context, float(cfg.window if p.causal else 2 * cfg.window))
    flops = 4 * lengths.total * context * width
    moved = 2 * lengths.total * (cfg.heads + cfg.kv) * cfg.head_dim * n.compute
    w.forward.update({"flash": flops, "bytes": moved, "calls": 1})
    w.backward.update({"flash backward": 2.5 * flops, "bytes": 2 * moved, "calls": 1})


def attention(w: Work, p: Scene, cfg: c.Attention, reads: int | None, needs: bool) -> bool:
    """Of x (rows, C), or of its `reads` positions that somebody reads. Whether there is a gradient to what it gives."""
    n, tokens, rows = p.numbers, p.lengths.total, p.rows
    inner, kv, e = cfg.heads * cfg.head_dim, cfg.kv * cfg.head_dim, n.compute
    few, own = p.read(reads), apart(cfg, p.context)
    keys = [("attention.k", kv), ("attention.v", kv)]
    q_needs, k_needs, v_needs = (needs or learns(n, f"attention.{name}") for name in "qkv")
    if reads is None:
        merged(w, rows, p.dim, [("attention.q", inner), *keys], cfg.bias, n, needs)
    else:
        w.moves(2 * few * p.dim * e, calls=2)
        linear(w, few, (p.dim, inner), cfg.bias, n, "attention.q", needs)
        merged(w, rows, p.dim, keys, cfg.bias, n, needs)
        w.moves((tokens + 2 * few) * inner * e, 2 * few * inner * e, calls=2)
    both = (own.heads + own.kv) * own.head_dim
    norm(w, cfg.qk_norm, tokens * both)
    if cfg.rotary:
        w.moves(9 * tokens * both * e, calls=16)
    if p.context > 1:  # copies before and behind each exchange
        w.moves(4 * rows * (2 * inner + 2 * kv) * e, calls=8)
    view = p.lengths.packed(n.cuda)
    if n.cuda and n.compute == 2 and p.bias is None and not cfg.dropout:
        attend_flat(w, p, own, p.lengths)
    else:
        masked = mask_bytes(view, p.causal, cfg.window) > 0
        attend(w, p, own, (view, view), masked, (q_needs, k_needs, v_needs))
    if reads is not None:
        w.moves(2 * few * inner * e, (tokens + few) * inner * e, calls=2)
    below = q_needs or k_needs or v_needs
    linear(w, few, (inner, p.dim), cfg.out_bias, n, "attention.out", below)
    return below or learns(n, "attention.out")


def cross(w: Work, p: Scene, cfg: c.Attention, reads: int | None) -> None:
    n, source, e = p.numbers, p.source, p.numbers.compute
    assert source is not None
    inner, kv = cfg.heads * cfg.head_dim, cfg.kv * cfg.head_dim
    rows, outer, own = p.read(reads), p.of(n.rows(source.total)), apart(cfg, p.context)
    linear(w, rows, (p.dim, inner), cfg.bias, n, "cross.q", True)
    merged(w, outer, p.dim, [("cross.k", kv), ("cross.v", kv)], cfg.bias, n, True)
    norm(w, cfg.qk_norm, rows * inner + outer * kv)
    w.backward.update({"bytes": 3 * source.total * p.dim * e, "calls": 1})  # added to the other blocks' gradient
    columns = source.padded()
    attend(w, p, own, (p.lengths.padded(), columns), not columns.full, (True, True, True))
    linear(w, rows, (inner, p.dim), cfg.out_bias, n, "cross.out", True)


def feed_forward(w: Work, p: Scene, cfg: c.FeedForward, rows: int, needs: bool) -> None:
    n, e, hidden = p.numbers, p.numbers.compute, rows * cfg.hidden
    if cfg.gated:
        merged(w, rows, p.dim, [("ffn.gate", cfg.hidden), ("ffn.up", cfg.hidden)], cfg.bias, n, needs)
        w.moves(3 * hidden * e, 6 * hidden * e)
    else:
        linear(w, rows, (p.dim, cfg.hidden), cfg.bias, n, "ffn.up", needs)
    w.each(cfg.act, hidden)
    dropout(w, cfg.dropout, hidden)
    below = needs or learns(n, "ffn.up") or (cfg.gated and learns(n, "ffn.gate"))
    linear(w, rows, (cfg.hidden, p.dim), cfg.bias, n, "ffn.down", below)


def residual(w: Work, p: Scene, cfg: c.Block, normed: bool, rows: int) -> None:
    """What stands around a layer: norm, dropout, the sum."""
    rows = p.here(rows)
    if normed:
        norm(w, cfg.norm, rows * p.dim)
    dropout(w, cfg.dropout, rows * p.dim)
    w.moves(3 * rows * p.dim * p.numbers.compute)


def halves(cfg: c.Block, p: Scene, reads: int | None, needs: bool) -> tuple[Work, Work]:
    """Of a block: up to its feed-forward, and that. `needs`: whether what it reads has a gradient."""
    rows = p.read(reads)
    first, second = Work(), Work()
    needs = attention(first, p, cfg.attention, reads, needs or p.numbers.learns) or needs
    residual(first, p, cfg, not cfg.skip_first_norm, p.rows)
    if cfg.cross is not None:
        cross(first, p, cfg.cross, reads)
        needs = True
        residual(first, p, cfg, True, rows)
    feed_forward(second, p, cfg.ffn, rows, needs)
    residual(second, p, cfg, True, rows)
    if cfg.norm_at == "pre" and not cfg.dropout:
        linear(last := Work(), rows, (cfg.ffn.hidden, p.dim), False, p.numbers, "", True)
        second.spared = last.forward
    return first, second


def embedding(model: c.Model, stack: c.Stack, lengths: Lengths, n: Numbers, sparse: bool) -> Work:
    """Vectors of tokens up to a stack's first block."""
    w, cfg, numbers, e = Work(), model.embedding, lengths.total * model.dim, n.weight
    learns = n.learns
    table = (4 * numbers if sparse else 2 * cfg.vocab * model.dim + 2 * numbers) * e
    w.moves(2 * numbers * e, table * learns)
    for _ in range((cfg.positions is not None) + bool(cfg.segments)):
        w.moves(5 * numbers * e, 3 * numbers * e * learns, 2)
    norm(w, cfg.norm, numbers)
    dropout(w, cfg.dropout, numbers)
    if n.compute != e:
        w.moves(numbers * (e + n.compute))
    dropout(w, stack.dropout, numbers)
    return w


def heads(model: c.Model, read: int, sequences: int, words: int, n: Numbers) -> Work:
    """Last norm, the head's own layer, the classifier, of so many states."""
    w, dim = Work(), model.dim
    norm(w, model.last.final_norm, read * dim)
    dropout(w, model.last.dropout, read * dim)
    if model.head is not None and (transform := model.head.transform) is not None:
        linear(w, words, (dim, dim), transform.bias, n, "", True)
        w.each(transform.act, words * dim)
        norm(w, transform.norm, words * dim)
    if (cfg := model.classifier) is not None:
        own = n.own
        rows = sequences if cfg.of == "sequence" else read
        if cfg.dense is not None:
            linear(w, rows, (dim, dim), cfg.dense_bias, own, "", True)
            w.each(cfg.dense, rows * dim)
            norm(w, cfg.norm, rows * dim)
        linear(w, rows // cfg.states, (dim * cfg.states, cfg.labels), cfg.bias, own, "", True)
        w.moves(rows * cfg.labels * 8, calls=6)
    return w


def vocabulary(model: c.Model, words: int, n: Numbers, rows: int) -> Work:
    """The loss of M positions, so many `rows` at a time, and, finished in the same pass, its gradients: logits once,
    two more products (one where the head is frozen). See `ronna.model.loss`."""
    w, vocab, e = Work(), model.embedding.vocab, n.compute
    table = vocab * model.dim
    inner = Work()
    inner.product("linear", (words, model.dim, vocab), e, 1 + n.learns)
    w.forward.update(inner.forward + inner.backward)
    w.forward.update({"words": words * vocab})
    chunks = -(-words // rows)
    if n.learns:
        w.forward.update({"bytes": table * ((e + n.weight) * (e != n.weight) + chunks * (e + 2 * n.weight))})
        w.backward.update({"bytes": 2 * table * n.weight, "calls": 2})
    w.forward.update({"calls": 12 * chunks})
    return w


def total(counts: Iterable[Counter[str]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for one in counts:
        found.update(one)
    return found
