"""What a batch itself takes: ids, places, and what every layer reads of it, made once and held to the step's end.

Legend: T tokens, R rows and L columns of an attention view, H heads, D head size, C channels.
"""

from ronna.model import config as c
from ronna.plan.blocks import mask_bytes
from ronna.plan.shapes import Lengths, Numbers, View

ID = 8  # bytes of an id or a place


def inputs(model: c.Model, lengths: Lengths, source: Lengths | None, predicted: int | None, n: Numbers) -> int:
    total = 0
    for stack, own in ((model.encoder, source or lengths), (model.decoder, lengths)):
        if stack is not None:
            total += of_stack(model, stack, own, n)
    words = lengths.total if predicted is None else predicted
    return total + 3 * ID * words * (model.head is not None)


def of_stack(model: c.Model, stack: c.Stack, lengths: Lengths, n: Numbers) -> int:
    view, tokens = lengths.packed(n.cuda), lengths.total
    places = 2 * view.cells + (0 if view.full else tokens)
    total = ID * (
        (3 + bool(model.embedding.segments) + isinstance(model.embedding.positions, c.LearnedPositions)) * tokens
        + places
    )
    kinds = {(b.attention.window, b.attention.rotary, b.attention.head_dim) for b in stack.blocks}
    total += sum(mask_bytes(view, stack.causal, window) for window in {window for window, _, _ in kinds})
    total += sum(4 * tokens * head for rotary, head in {(r, head) for _, r, head in kinds} if rotary)
    if isinstance(model.embedding.positions, c.SinusoidalPositions):
        total += 4 * tokens * model.dim
    if stack.relative_bias is not None:
        total += relative(view, stack.blocks[0].attention.heads, n)
    return total


def relative(view: View, heads: int, n: Numbers) -> int:
    """T5's bias of every pair, and the bucket that each came from."""
    pairs = view.columns**2 * (1 if view.single else view.rows)
    return pairs * (heads * n.compute + ID)
