"""What attention, blocks, embedding and heads do with memory: `ronna.model.transformer`, without numbers.

Legend: T tokens, R rows and L columns of an attention view, H heads, K key/value heads, D head size, C channels, M
positions read.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from ronna.model import config as c
from ronna.plan.layers import dropout, feed_forward, linear, merged, norm
from ronna.plan.ranks import apart
from ronna.plan.shapes import Lengths, Numbers, View
from ronna.plan.tape import Tape, Value

WRITTEN_OUT = 512  # columns up to which a CPU computes attention as its formula says


@dataclass(frozen=True)
class Scene:
    """What a stack's blocks have in common. context: ranks that share the tokens of a text, and have as many rows each.
    share: ranks that divide those of one of them between the parts of blocks. ahead: keys of a prefix."""

    dim: int
    lengths: Lengths
    source: Lengths | None
    causal: bool
    bias: c.RelativeBias | None
    numbers: Numbers
    share: int = 1
    context: int = 1
    ahead: int = 0

    @property
    def rows(self) -> int:
        """That this rank's maps have, with those that divide them."""
        return self.of(self.numbers.rows(self.lengths.total))

    def of(self, rows: int) -> int:
        """The part of so many that is this context rank's."""
        return -(-rows // self.context)

    def read(self, reads: int | None) -> int:
        """Rows of those that somebody reads (None: all)."""
        return self.rows if reads is None else self.of(self.numbers.rows(reads))

    def here(self, rows: int) -> int:
        """Those of so many of the context rank's that stay here between parts of blocks."""
        return -(-rows // self.share)


def attention(t: Tape, x: Value, cfg: c.Attention, scene: Scene, reads: int | None) -> Value:
    """Of x (rows, C), or of its `reads` positions that somebody reads."""
    n, dim, tokens, rows = scene.numbers, scene.dim, scene.lengths.total, scene.rows
    inner, kv, whole = cfg.heads * cfg.head_dim, cfg.kv * cfg.head_dim, n.rows(tokens)
    own = apart(cfg, scene.context)  # what this rank attends with
    wide, narrow = own.heads * own.head_dim * n.compute, own.kv * own.head_dim * n.compute
    paths = [("attention.k", kv), ("attention.v", kv)]
    if reads is None:
        q, k, v = merged(t, x, rows, dim, [("attention.q", inner), *paths], cfg.bias, n)
        q, k, v = all_exchanged(t, [(q, wide), (k, narrow), (v, narrow)], whole, scene)
        q = cut(t, q, whole, tokens)
        q = norm(t, q, cfg.qk_norm, tokens * own.heads, cfg.head_dim, n)
    else:
        few, all_x = n.rows(reads), exchanged(t, x, whole * dim * n.compute, scene)
        picked = pick(t, all_x, whole, reads, n)
        mine = exchanged(t, picked, scene.of(few) * dim * n.compute, scene)
        q = linear(t, mine, scene.of(few), (dim, inner), cfg.bias, n, "attention.q")
        q = exchanged(t, q, few * wide, scene)
        q = norm(t, q, cfg.qk_norm, few * own.heads, cfg.head_dim, n)
        k, v = merged(t, x, rows, dim, paths, cfg.bias, n)
        k, v = all_exchanged(t, [(k, narrow), (v, narrow)], whole, scene)
        q = spread(t, cut(t, q, few, reads), tokens * wide)
    k, v = (cut(t, y, whole, tokens) for y in (k, v))
    k = norm(t, k, cfg.qk_norm, tokens * own.kv, cfg.head_dim, n)
    if cfg.rotary:
        q, k = rotate(t, q, tokens, cfg.head_dim, n), rotate(t, k, tokens, cfg.head_dim, n)
    names = [x, q, k, v]
    view = scene.lengths.packed(n.cuda)
    if n.cuda and n.compute == 2 and scene.bias is None and not cfg.dropout and not scene.ahead:
        y = t.op(q, k, v, size=q.size, keeps=[q, k, v], keep_out=True, extra=tokens * own.heads * 4)
    else:
        mask = mask_bytes(view, scene.causal, cfg.window)
        y = rectangles(t, (q, k, v), own, (view, view), mask, scene, scene.bias is not None, scene.ahead)
    y = pick(t, y, tokens, reads, n) if reads is not None else widen(t, y, tokens, whole)
    y = exchanged(t, y, scene.read(reads) * inner * n.compute, scene)
    y = linear(t, y, scene.read(reads), (inner, dim), cfg.out_bias, n, "attention.out")
    t.hold(*names)
    return y


def all_exchanged(t: Tape, maps: list[tuple[Value, int]], rows: int, scene: Scene) -> list[Value]:
    """Maps, each with the bytes of a row that this rank gets of it, exchanged as one, and views of what comes."""
    if scene.context == 1:
        return [y for y, _ in maps]
    size = rows * sum(width for _, width in maps)
    whole = t.op(*(y for y, _ in maps), size=size, work=2 * size, back=2 * size)
    return [t.op(whole, size=rows * width, view=True, grads=[size]) for _, width in maps]


def exchanged(t: Tape, x: Value, size: int, scene: Scene) -> Value:
    """So many bytes of it, from the ranks that share a text or to these, by way of a copy."""
    return x if scene.context == 1 else t.op(x, size=size, work=size, back=x.size)


def cross(t: Tape, x: Value, cfg: c.Attention, scene: Scene, reads: int | None) -> Value:
    """Of x (rows, C), which are `reads` positions already if somebody reads no more."""
    n, dim, tokens, source = scene.numbers, scene.dim, scene.lengths.total, scene.source
    assert source is not None
    inner, kv = cfg.heads * cfg.head_dim, cfg.kv * cfg.head_dim
    own = apart(cfg, scene.context)
    wide, narrow = own.heads * own.head_dim * n.compute, own.kv * own.head_dim * n.compute
    rows, whole = scene.read(reads), n.rows(tokens if reads is None else reads)
    q = linear(t, x, rows, (dim, inner), cfg.bias, n, "cross.q")
    q = exchanged(t, q, whole * wide, scene)
    q = norm(t, q, cfg.qk_norm, whole * own.heads, cfg.head_dim, n)
    q = cut(t, q, whole, tokens) if reads is None else spread(t, cut(t, q, whole, reads), tokens * wide)
    outer = n.rows(source.total)
    memory = t.memory(source.total * dim * n.compute)
    memory = widen(t, memory, source.total, outer)
    memory = exchanged(t, memory, scene.of(outer) * dim * n.compute, scene)
    paths = [("cross.k", kv), ("cross.v", kv)]
    k, v = merged(t, memory, scene.of(outer), dim, paths, cfg.bias, n)
    k, v = all_exchanged(t, [(k, narrow), (v, narrow)], outer, scene)
    k, v = (cut(t, y, outer, source.total) for y in (k, v))
    k = norm(t, k, cfg.qk_norm, source.total * own.kv, cfg.head_dim, n)
    names = [x, q, k, v]
    columns = source.padded()
    mask = 0 if columns.full else columns.cells
    y = rectangles(t, (q, k, v), own, (scene.lengths.padded(), columns), mask, scene, False)
    y = pick(t, y, tokens, reads, n) if reads is not None else widen(t, y, tokens, whole)
    y = exchanged(t, y, rows * inner * n.compute, scene)
    y = linear(t, y, rows, (inner, dim), cfg.out_bias, n, "cross.out")
    t.hold(*names)
    return y


def mask_bytes(view: View, causal: bool, window: int | None) -> int:
    """Of who sees whom in a view, a byte a pair; 0 where no mask is needed beside a causal one."""
    bounded = window is not None and window < view.columns - 1
    if view.single and not bounded and (causal or view.full):
        return 0
    return view.rows * view.columns**2


def rectangles(
    t: Tape,
    qkv: tuple[Value, Value, Value],
    cfg: c.Attention,
    views: tuple[View, View],
    mask: int,
    scene: Scene,
    bias: bool,
    ahead: int = 0,
) -> Value:
    """Attention over views of queries and of keys, so many of a prefix `ahead` of each row: spread, scores, gathered
    again, (T, H D)."""
    n, (rows, columns) = scene.numbers, views
    e, wide = n.compute, cfg.heads * cfg.head_dim * n.compute
    narrow = cfg.kv * cfg.head_dim * e
    q = qkv[0] if rows.full else spread(t, qkv[0], rows.cells * wide)
    k, v = (y if columns.full else spread(t, y, columns.cells * narrow) for y in qkv[1:])
    if ahead:
        columns = replace(columns, columns=columns.columns + ahead)
        k, v = (t.op(y, size=columns.cells * narrow, needs=True, leaf=4 * ahead * cfg.kv * cfg.head_dim)
                for y in (k, v))  # fmt: skip
        mask = mask // rows.columns * columns.columns
    tokens = rows.tokens
    plain = not n.cuda and (cfg.dropout or (q.needs and columns.columns <= WRITTEN_OUT))
    if not plain:
        bits = e * mask
        logs = rows.cells * cfg.heads * 4
        y = t.op(q, k, v, size=rows.cells * wide, keeps=[q, k, v], keep_out=True, extra=logs + bits)
        return y if rows.full else t.op(y, size=tokens * wide)
    causal = scene.causal and rows is views[1]
    y = written_out(t, (q, k, v), cfg, (rows, columns), mask or rows.columns * columns.columns * causal, bias, n)
    y = t.op(y)  # heads and tokens change places
    return y if rows.full else t.op(y, size=tokens * wide)


def written_out(
    t: Tape,
    qkv: tuple[Value, Value, Value],
    cfg: c.Attention,
    views: tuple[View, View],
    mask: int,
    bias: bool,
    n: Numbers,
) -> Value:
    q, k, v = qkv
    rows, columns = views
    pairs = rows.cells * cfg.heads * columns.columns * n.compute
    if repeated := cfg.kv != cfg.heads:
        k, v = (t.op(y, size=y.size * cfg.heads // cfg.kv) for y in (k, v))
    copies = rows.rows > 1  # heads and tokens lie the other way round
    scaled = t.op(q)
    scaled = t.op(scaled) if copies else scaled
    turned = t.op(k) if copies and not repeated else k
    keeps = ([scaled] if k.needs else []) + ([turned] if q.needs else [])
    scores = t.op(scaled, turned, size=pairs, keeps=keeps)
    if bias:
        added = pairs // (rows.rows if rows.single else 1)
        scores = t.op(scores, through=True, extra=mask, work=added if mask else 0, back=2 * added)
    elif mask:
        scores = t.op(scores, extra=mask)
    p = dropout(t, t.op(scores, keep_out=True), cfg.dropout, n)
    v = t.op(v) if copies and not repeated else v
    y = t.op(p, v, size=rows.cells * cfg.heads * cfg.head_dim * n.compute, keeps=([p] if v.needs else []) + [v])
    t.hold(scores, k, v)
    return y


def rotate(t: Tape, x: Value, tokens: int, head: int, n: Numbers) -> Value:
    """Angles are kept in the precision of x."""
    return t.op(x, extra=tokens * head * n.compute if n.compute != 4 else 0, work=2 * x.size, back=x.size)


def spread(t: Tape, x: Value, size: int) -> Value:
    return t.op(x, size=size, keeps=[x], work=size)


def cut(t: Tape, x: Value, rows: int, tokens: int) -> Value:
    """The first `tokens` of `rows`."""
    return x if rows == tokens else t.op(x, size=x.size // rows * tokens, view=True, grads=[x.size])


def widen(t: Tape, x: Value, tokens: int, rows: int) -> Value:
    return x if rows == tokens else t.op(x, size=x.size // tokens * rows)


def pick(t: Tape, x: Value, rows: int, reads: int, n: Numbers) -> Value:
    picked = t.op(x, size=x.size // rows * reads)
    return widen(t, picked, reads, n.rows(reads))


def passed(t: Tape, x: Value, rows: int, scene: Scene) -> Value:
    """So many rows of x, from the ranks that divide them or to these."""
    return x if scene.share == 1 else t.op(x, size=rows * scene.dim * scene.numbers.compute)


def attention_half(cfg: c.Block, scene: Scene, reads: int | None, needs: bool) -> tuple[Tape, Value]:
    """A block up to its feed-forward: x (rows, C), with a gradient if it `needs` one, and what it becomes."""
    t = Tape(scene.here(scene.rows) * scene.dim * scene.numbers.compute, needs)
    first = None if cfg.skip_first_norm else cfg.norm
    x = residual(t, t.start, cfg, first, scene, reads, lambda h: attention(t, h, cfg.attention, scene, reads))
    if (other := cfg.cross) is not None:
        rows = scene.read(reads)
        x = residual(t, x, cfg, cfg.norm, scene, None, lambda h: cross(t, h, other, scene, reads), rows)
    return t, x


def feed_half(cfg: c.Block, scene: Scene, reads: int | None, needs: bool) -> tuple[Tape, Value]:
    n = scene.numbers
    rows = scene.read(reads)
    t = Tape(scene.here(rows) * scene.dim * n.compute, needs)
    return t, residual(
        t, t.start, cfg, cfg.norm, scene, None, lambda h: feed_forward(t, h, cfg.ffn, rows, scene.dim, n), rows
    )


def residual(
    t: Tape,
    x: Value,
    cfg: c.Block,
    by: c.Norm | None,
    scene: Scene,
    reads: int | None,
    layer: Callable[[Value], Value],
    whole: int | None = None,
) -> Value:
    """x and what a layer makes of it, at the positions that it picks if some are read. whole: rows of the ranks that
    divide the layer (None: all that these have)."""
    n, dim = scene.numbers, scene.dim
    rows, whole = x.size // (dim * n.compute), scene.rows if whole is None else whole
    pre = cfg.norm_at == "pre"
    y = layer(passed(t, norm(t, x, by, rows, dim, n, inside=True) if pre else x, whole, scene))
    y = dropout(t, passed(t, y, scene.here(y.size // (dim * n.compute)), scene), cfg.dropout, n)
    if reads is not None:
        every = n.rows(scene.lengths.total)
        x = pick(t, exchanged(t, passed(t, x, whole, scene), every * dim * n.compute, scene), every, reads, n)
        x = passed(t, exchanged(t, x, scene.read(reads) * dim * n.compute, scene), scene.here(scene.read(reads)), scene)
    total = t.op(y, x, through=True)
    if pre:
        return total
    out = norm(t, total, by, total.size // (dim * n.compute), dim, n, inside=True)
    t.hold(y, total)
    return out
