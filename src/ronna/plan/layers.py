"""What the parts of a block that look at one token at a time do with memory: `ronna.model.layers`, without numbers.

Legend: T rows, C channels, I inputs and O outputs of a linear map, r rank of an adapter.
"""

from ronna.model import config as c
from ronna.plan.shapes import Numbers
from ronna.plan.tape import Tape, Value

MERGED, TOGETHER = 64, 2**22  # rows from which, and weights up to which, maps of one input are one product


def linear(t: Tape, x: Value, rows: int, sides: tuple[int, int], bias: bool, n: Numbers, path: str = "") -> Value:
    """A map of `sides` (I, O). Weights of another precision are cast, and the cast is kept for the gradient of x."""
    weights = sides[0] * sides[1]
    narrow = cast(t, weights, n)
    leaf = 0 if narrow else weights * n.weight
    made = weights * n.compute if n.four_bit and path else 0
    tuned = bias and bool(path) and n.trains("bitfit")
    return changed(t, x, product(t, x, rows, sides[1], narrow, leaf, bias, n, made, tuned), rows, sides, n, path)


def cast(t: Tape, weights: int, n: Numbers) -> Value | None:
    """What a product reads in the place of its weights; None: themselves."""
    if not n.learns or n.compute == n.weight:
        return None
    return t.op(size=weights * n.compute, needs=True, cast=True, leaf=weights * n.weight)


def product(
    t: Tape,
    x: Value,
    rows: int,
    outputs: int,
    weights: Value | None,
    leaf: int,
    bias: bool,
    n: Numbers,
    made: int = 0,
    tuned: bool = False,
) -> Value:
    """`leaf` bytes are the gradient of weights that it reads as they are or, joined, as views of it. `made` are those
    of weights that are made to be read and go again. tuned: whether the bias learns alone."""
    kept = [x] if n.learns else []
    reads = [x] if weights is None else [x, weights]
    if x.needs:
        kept += reads[1:]
    leaf = leaf + outputs * n.weight * bias if n.learns else outputs * 4 * tuned
    needs = x.needs or n.learns or tuned
    return t.op(*reads, size=rows * outputs * n.compute, keeps=kept, needs=needs, leaf=leaf, work=made, back=made)


def merged(
    t: Tape, x: Value, rows: int, inputs: int, outputs: list[tuple[str, int]], bias: bool, n: Numbers
) -> list[Value]:
    """Several maps of one input, by (path, O), as one product of their joined weights."""
    total = sum(o for _, o in outputs)
    if rows < MERGED or inputs * total > TOGETHER or n.four_bit:
        return [linear(t, x, rows, (inputs, o), bias, n, path) for path, o in outputs]
    casts = [narrow for _, o in outputs if (narrow := cast(t, inputs * o, n)) is not None]
    joined = t.op(*casts, size=inputs * total * n.compute, needs=bool(casts), cast=True, through=True)
    tuned = bias and n.trains("bitfit")
    whole = product(t, x, rows, total, joined, 0 if casts else inputs * total * n.weight, bias, n, tuned=tuned)
    made = []
    for path, o in outputs:
        part = t.op(whole, size=rows * o * n.compute, view=True, grads=[whole.size])
        made.append(changed(t, x, part, rows, (inputs, o), n, path))
    return made


def changed(t: Tape, x: Value, y: Value, rows: int, sides: tuple[int, int], n: Numbers, path: str) -> Value:
    """What an adapter makes of the output y."""
    if n.adapter is None or not path or not n.adapter.on(path):
        return y
    e, r = n.compute, n.adapter.rank
    if n.adapter.kind == "houlsby":
        h = activation(t, linear(t, y, rows, (sides[1], r), True, n.own), n.adapter.act)
        return t.op(y, linear(t, h, rows, (r, sides[1]), True, n.own), through=True)
    a = low_rank(t, sides[0] * r, n)
    keeps = [x, a] if x.needs and a else [x]
    leaf = 0 if a else sides[0] * r * 4
    reads = [x, a] if a else [x]
    h = t.op(*reads, size=rows * r * e, keeps=keeps, needs=True, leaf=leaf)
    b = t.op(size=sides[1] * r * 4, needs=True, cast=True, leaf=sides[1] * r * 4)
    if e != 4:
        b = t.op(b, size=sides[1] * r * e, cast=True)
    return t.op(y, h, b, keeps=[h, b], grads=[0, h.size, b.size])


def low_rank(t: Tape, weights: int, n: Numbers) -> Value | None:
    """The cast of an adapter's matrix, which is held in fp32."""
    return t.op(size=weights * n.compute, needs=True, cast=True, leaf=weights * 4) if n.compute != 4 else None


def norm(
    t: Tape, x: Value, cfg: c.Norm | None, rows: int, dim: int, n: Numbers, e: int | None = None, inside: bool = False
) -> Value:
    """Of `rows` vectors of `dim` numbers; `e` bytes each (None: as activations have)."""
    if cfg is None:
        return x
    e, tuned = n.compute if e is None else e, inside and cfg.bias and n.trains("bitfit")
    n = n.norms
    leaf = cfg.params(dim) * n.weight if n.learns else dim * 4 * tuned
    needs = x.needs or n.learns or tuned
    if cfg.kind == "layer":
        mixed = n.weight == 4 and cfg.bias
        own = 0 if n.weight == e or (mixed and not n.cuda) else dim * e * (1 + cfg.bias)
        statistics = 2 * rows * (4 if mixed or n.cuda else e)
        return t.op(x, size=rows * dim * e, keeps=[x], extra=own + statistics, needs=needs, leaf=leaf)
    own = 0 if n.weight == e else dim * e
    if n.cuda:
        return t.op(x, size=rows * dim * e, keeps=[x], extra=own + 4 * rows, needs=needs, leaf=leaf)
    wide = x if e == 4 else t.op(x, size=rows * dim * 4)
    size = rows * dim * 4
    root = t.op(wide, size=4 * rows, keeps=[wide], keep_out=True, work=size, back=size)
    y = t.op(wide, root, size=size, keeps=[wide, root])
    y = t.op(y, keeps=[y] if n.learns else [], extra=own, needs=needs, leaf=leaf, back=size if n.learns else 0)
    return y if e == 4 else t.op(y, size=rows * dim * e)


def dropout(t: Tape, x: Value, rate: float, n: Numbers, e: int | None = None) -> Value:
    """On a CPU with a mask out of 16 random bits an element, which go at once."""
    if rate == 0.0:
        return x
    elements = x.size // (n.compute if e is None else e)
    return t.op(x, extra=elements, work=0 if n.cuda else 2 * elements)


def feed_forward(t: Tape, x: Value, cfg: c.FeedForward, rows: int, dim: int, n: Numbers) -> Value:
    if cfg.gated:
        paths = [("ffn.gate", cfg.hidden), ("ffn.up", cfg.hidden)]
        gate, up = merged(t, x, rows, dim, paths, cfg.bias, n)
        # Compiled, the activation is worked out anew for the backward pass.
        acted = gate if n.compiled else activation(t, gate, cfg.act)
        h = t.op(acted, up, keeps=[acted, up])
        names = [x, gate, up, h]
    else:
        h = activation(t, linear(t, x, rows, (dim, cfg.hidden), cfg.bias, n, "ffn.up"), cfg.act)
        names = [x, h]
    y = linear(t, dropout(t, h, cfg.dropout, n), rows, (cfg.hidden, dim), cfg.bias, n, "ffn.down")
    t.hold(*names)
    return y


def activation(t: Tape, x: Value, act: c.Activation) -> Value:
    """Those of which the output says the slope keep it, the others their input."""
    return t.op(x, keep_out=True) if act in ("relu", "tanh") else t.op(x, keeps=[x])
