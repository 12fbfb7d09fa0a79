"""What stands before and behind the blocks, and the loss: their memory, without numbers.

Legend: T tokens, C channels, M positions read, V vocabulary, B sequences.
"""

from ronna.model import config as c
from ronna.plan.heap import Heap
from ronna.plan.layers import activation, dropout, linear, norm
from ronna.plan.shapes import Lengths, Numbers
from ronna.plan.tape import Events, Profile, Tape, Value, most

CHUNK_ELEMENTS, TILE_ELEMENTS = 2**26, 2**21  # as in ronna.model.loss
CARD_ELEMENTS, CARD_ROWS = 2**28, 256
CHUNKS = 8  # after so many they find the holes of those before


def embedding(
    model: c.Model,
    stack: c.Stack,
    lengths: Lengths,
    n: Numbers,
    table: int,
    there: bool,
    share: int = 1,
    led: bool = True,
) -> tuple[Tape, Value]:
    """Vectors of tokens up to a stack's first block; `table` bytes are those of a dense gradient of the token table,
    which is new or, if one is `there` already, goes once it has been added to that. led: whether virtual tokens, where
    there are some, stand here."""
    cfg, dim, tokens = model.embedding, model.dim, lengths.total
    t, n = Tape(0, False), n.tables(cfg.norm is not None)
    size, learns = tokens * dim * n.weight, n.learns
    x = t.op(size=size, needs=learns, back=table if there else 0, leaf=0 if there else table)
    if led and n.adapter is not None and n.trains("prompt"):
        x = t.op(x, size=size, needs=True, leaf=n.adapter.rank * dim * 4)
    if cfg.scale != 1.0:
        x = t.op(x)
    if isinstance(cfg.positions, c.LearnedPositions):
        leaf = cfg.positions.params(dim) * n.weight
        x = t.op(x, t.op(size=size, needs=learns, leaf=leaf), through=True)
    elif cfg.positions is not None:
        x = t.op(x, through=True)
    if cfg.segments:
        leaf = cfg.segments * dim * n.weight
        x = t.op(x, t.op(size=size, needs=learns, leaf=leaf), through=True)
    x = norm(t, x, cfg.norm, tokens, dim, n, n.weight)
    x = dropout(t, x, cfg.dropout, n, n.weight)
    if n.weight != n.compute:
        x = t.op(x, size=tokens * dim * n.compute)
    x = dropout(t, x, stack.dropout, n)
    rows = n.rows(tokens)
    x = x if rows == tokens else t.op(x, size=rows * dim * n.compute)
    return t, x if share == 1 else t.op(x, size=-(-rows // share) * dim * n.compute)


def ending(
    stack: c.Stack, dim: int, rows: int, read: int, needs: bool, n: Numbers, share: int = 1
) -> tuple[Tape, Value]:
    """A stack's last norm, of the first `read` of so many rows, which `share` ranks divide."""
    t = Tape(-(-rows // share) * dim * n.compute, needs)
    size = read * dim * n.compute
    x = t.start if share == 1 else t.op(t.start, size=rows * dim * n.compute)
    x = x if rows == read else t.op(x, size=size, view=True, grads=[x.size])
    x = norm(t, x, stack.final_norm, read, dim, n)
    return t, dropout(t, x, stack.dropout, n)


def heads(
    t: Tape, x: Value, model: c.Model, read: int, sequences: int, all_read: bool, predicted: int | None, n: Numbers
) -> list[Value]:
    """States (read, C) to what the losses begin with: of the words, of the classifier, or of both."""
    outs, size = [], x.size // read
    words = read if predicted is None else predicted
    if model.head is not None:
        if all_read:
            x = t.op(x, size=words * size)
        part = x if model.classifier is None else t.op(x, size=words * size, view=True, grads=[x.size])
        outs.append(vocabulary(t, part, model.head, model.dim, words, n))
    if model.classifier is not None:
        rest = x
        if model.head is not None:
            rest, read = t.op(x, size=sequences * size, view=True, grads=[x.size]), sequences
        outs.append(classifier(t, rest, model.classifier, model.dim, read, sequences, n.own))
    return outs or [x]


def vocabulary(t: Tape, x: Value, cfg: c.Head, dim: int, words: int, n: Numbers) -> Value:
    """(M, C) up to what the chunked loss reads."""
    if (transform := cfg.transform) is not None:
        x = linear(t, x, words, (dim, dim), transform.bias, n)
        x = norm(t, activation(t, x, transform.act), transform.norm, words, dim, n)
    return x if cfg.scale == 1.0 else t.op(x)


def classifier(t: Tape, x: Value, cfg: c.Classifier, dim: int, tokens: int, sequences: int, n: Numbers) -> Value:
    """States (tokens, C) to scores in fp32, and their cross entropy."""
    e, rows = n.compute, tokens
    if cfg.of == "sequence" and cfg.pool == "mean":
        rows = sequences
        x = t.op(x, size=rows * dim * e, keeps=[x])
        x = t.op(x, extra=rows * e)
    if cfg.dense is not None:
        x = dropout(t, x, cfg.dense_dropout, n)
        x = activation(t, linear(t, x, rows, (dim, dim), cfg.dense_bias, n), cfg.dense)
        x = norm(t, x, cfg.norm, rows, dim, n)
    x = dropout(t, x, cfg.dropout, n)
    rows //= cfg.states
    x = linear(t, x, rows, (dim * cfg.states, cfg.labels), cfg.bias, n)
    if e != 4:
        x = t.op(x, size=rows * cfg.labels * 4)
    return t.op(x, keep_out=True, extra=4)


def vocabulary_loss(vocab: int, dim: int, words: int, bias: bool, n: Numbers) -> tuple[Profile, int]:
    """Of M states, the gradients of which it makes at once (see `ronna.model.loss`), and the holes in the heap. `leaf`
    is the gradient of the head's weights, which the forward pass leaves."""
    states = words * dim * n.compute
    gradient = vocab * dim * n.weight if n.learns else 0
    parts = list(chunks(vocab, dim, words, n))
    fullest, heap = most(iter(parts), {}), Heap()
    heap.play(iter(parts), {})
    kept = states + (vocab * n.weight if bias and n.learns else 0)
    profile = Profile(states + fullest, kept, 0, kept + gradient, gradient, states, 0, False)
    return profile, 0 if n.cuda else max(0, heap.high - fullest)


def chunk_rows(vocab: int, cuda: bool) -> int:
    """As `ronna.model.loss` has it."""
    return max(1, CARD_ELEMENTS // vocab // CARD_ROWS) * CARD_ROWS if cuda else max(64, CHUNK_ELEMENTS // vocab)


def chunks(vocab: int, dim: int, words: int, n: Numbers) -> Events:
    """What the loss makes, by name, and its bytes; 0 where it goes. Of the `states` and of the head's weights, the
    gradients stay."""
    e, table, narrow = n.compute, vocab * dim, n.compute != n.weight
    rows = min(words, chunk_rows(vocab, n.cuda))
    if n.cuda:
        vocab = -(-vocab // 64) * 64
    added = n.cuda and narrow  # each product to the gradient, as it is worked out
    if narrow:
        yield "cast", table * e
    yield "states", words * dim * e
    count = min(CHUNKS, -(-words // rows))
    for i in range(count):
        part = min(rows, words - i * rows)
        yield f"logits {i}", part * vocab * e
        if i:
            yield f"logits {i - 1}", 0
        at_once = min(part, max(1, (CHUNK_ELEMENTS if n.cuda else TILE_ELEMENTS) // vocab))
        if not n.compiled:
            # The probabilities of a tile, before them its logits in fp32, and the last tile's, which still have a name.
            yield "tiles", at_once * vocab * 4 * (1 + (e != 4) + (at_once < part))
            yield "tiles", 0
        if not n.learns:
            continue
        if added:
            if i == 0:
                yield "gradient", table * n.weight
            continue
        yield f"product {i}", table * e
        if i > (not narrow):  # the first product is the gradient, if it has its precision
            yield f"product {i - 1}", 0
        if narrow:  # the first one is cast and stays; the others are cast to be added
            yield "gradient" if i == 0 else "wide", table * n.weight
            if i:
                yield "wide", 0
    if narrow:
        yield "cast", 0
    yield f"logits {count - 1}", 0
    if n.learns and not added and (narrow or count > 1):
        yield f"product {count - 1}", 0
