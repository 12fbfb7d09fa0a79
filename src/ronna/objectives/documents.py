"""Packed pieces of documents: what the language-modelling objectives learn from."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ronna.data.packing import Packing, chunk_and_pack
from ronna.data.shards import Shards


class Piece(NamedTuple):
    """Tokens of one document; `before` and `after` are its neighbours there, None at the document's ends."""

    tokens: np.ndarray
    document: int
    before: int | None
    after: int | None


class PackedDocuments(Sequence[list[Piece]]):
    """Item i is a bin of pieces that fill a row of `capacity` tokens; an objective adds `overhead` to each."""

    def __init__(self, shards: Shards, capacity: int, overhead: int):
        self.shards = shards
        self.packing: Packing = chunk_and_pack(shards.lengths, capacity, overhead=overhead)

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, i: int) -> list[Piece]:  # type: ignore[override]
        return [self.piece(*place) for place in self.packing[i]]

    def piece(self, document: int, start: int, length: int) -> Piece:
        stop, end = start + length, int(self.shards.lengths[document])
        wide = self.shards.slice(document, max(0, start - 1), min(end, stop + 1)).astype(np.int64)
        lead = 1 if start > 0 else 0
        before = int(wide[0]) if lead else None
        after = int(wide[-1]) if stop < end else None
        return Piece(wide[lead : lead + length], document, before, after)
