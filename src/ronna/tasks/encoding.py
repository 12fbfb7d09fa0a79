"""From texts to a model's input of bounded length."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ronna.text.tokenizer import Encoded, Tokenizer


class Input(NamedTuple):
    ids: np.ndarray  # (L,)
    segments: np.ndarray  # (L,)
    truncated: bool


def encode_inputs(
    tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str] | None, length: int, chunk: int = 1024
) -> list[Input]:
    """Texts or pairs with their special tokens, each at most `length` tokens, in order."""
    inputs: list[Input] = []
    for i in range(0, len(texts), chunk):
        rows = tokenizer.encode_with_offsets(texts[i : i + chunk], pairs and pairs[i : i + chunk])
        inputs += [fit(row, length) for row in rows]
    return inputs


def fit(row: Encoded, length: int) -> Input:
    """Cut the end of the longer text, token by token until all fits; special tokens stay."""
    excess = len(row.ids) - length
    if excess <= 0:
        return Input(row.ids, row.segments, False)
    places = [np.flatnonzero(row.text_index == i) for i in (0, 1)]
    long, short = sorted((len(p) for p in places), reverse=True)
    first = min(excess, long - short)  # down to the shorter one's length, then in turn from both
    cuts = [first + (excess - first + 1) // 2, (excess - first) // 2]
    if len(places[0]) < len(places[1]):
        cuts.reverse()
    keep = np.ones(len(row.ids), dtype=bool)
    for place, cut in zip(places, cuts, strict=True):
        keep[place[len(place) - cut :]] = False
    return Input(row.ids[keep], row.segments[keep], True)
