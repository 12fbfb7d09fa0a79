"""Which tokens share a sequence (pre-training), and which items of like length a batch (fine-tuning)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ronna.base.errors import RonnaError
from ronna.data.philox import Purpose, permutation, philox

WINDOW_BATCHES = 50  # sorted by length within so many batches: like lengths, still a random mixture


@dataclass(frozen=True)
class Packing:
    """Bins of pieces of documents. Piece p is `length[p]` tokens of `document[p]` from `start[p]` on.

    Bin b holds pieces `bins[b] : bins[b + 1]`. Arrays are int64: three of (pieces,), `bins` of (bins + 1,).
    """

    bins: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    capacity: int
    overhead: int

    def __len__(self) -> int:
        return len(self.bins) - 1

    def __getitem__(self, bin: int) -> list[tuple[int, int, int]]:
        """The (document, start, length) of each piece of a bin. Raises IndexError outside the bins."""
        if not 0 <= bin < len(self):
            raise IndexError(f"bin {bin} of {len(self)}")
        pieces = slice(self.bins[bin], self.bins[bin + 1])
        columns = (self.document[pieces], self.start[pieces], self.length[pieces])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    @property
    def fill(self) -> float:
        """Tokens read over positions there are; the EOS, CLS and SEP of `overhead` are read like others."""
        used = int(self.length.sum()) + self.overhead * len(self.length)
        return used / (len(self) * self.capacity) if len(self) else 1.0


def chunk_and_pack(lengths: np.ndarray | Sequence[int], capacity: int, *, overhead: int = 0) -> Packing:
    """Packs documents of `lengths` tokens into bins of `capacity` positions, each token exactly once.

    Only a document too long for a bin is cut: into pieces that fill a bin and one shorter rest. Rests,
    however short, and whole documents are then placed best-fit, longest first (Ding et al. 2024, "Fewer
    Truncations Improve Language Modeling"). `overhead` positions are added to every piece (1 for EOS,
    2 for CLS and SEP). Empty documents have no piece. Bins come in no useful order: draw
    them by `loader.Order`.

    Time: sorting, plus one step for each pair of (length, free space) met; 10 million documents take seconds.
    Raises RonnaError when the capacity has no room for a token.
    """
    room = capacity - overhead
    if room < 1:
        raise RonnaError(
            f"a sequence of {capacity} positions has no room beside {overhead} special tokens",
            fix="raise the sequence length",
        )
    document, start, length = _cut(np.asarray(lengths, dtype=np.int64), room)
    longest_first = np.argsort(-length, kind="stable")
    bin_of = np.empty_like(length)
    bin_of[longest_first] = _best_fit(length[longest_first] + overhead, capacity)
    by_bin = np.lexsort((start, document, bin_of))
    count = int(bin_of.max()) + 1 if len(bin_of) else 0
    bins = np.searchsorted(bin_of[by_bin], np.arange(count + 1))
    return Packing(bins, document[by_bin], start[by_bin], length[by_bin], capacity, overhead)


def _cut(lengths: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pieces = -(-lengths // room)
    document = np.repeat(np.arange(len(lengths)), pieces)
    within = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = within * room
    return document, start, np.minimum(lengths[document] - start, room)


def _best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each item; sizes (items,) fall from `capacity` to 1.

    An item goes to the fullest bin that takes it, and that bin, still the fullest, takes the next of equal
    size too. So items of one size are placed bucket by bucket: all bins with one free space at a time.
    """
    bin_of = np.empty(len(sizes), dtype=np.int64)
    buckets: dict[int, list[np.ndarray]] = {}  # free space -> bins that have it
    open_spaces = 0  # bit r is set when buckets[r] is not empty
    bins = 0
    groups = np.flatnonzero(np.diff(sizes, prepend=capacity + 1, append=0))
    for at, end in zip(groups[:-1].tolist(), groups[1:].tolist(), strict=True):
        size = int(sizes[at])
        while at < end:
            fitting = open_spaces >> size
            if fitting:
                space = size + (fitting & -fitting).bit_length() - 1
                candidates = np.concatenate(buckets.pop(space))
                open_spaces ^= 1 << space
            else:
                space = capacity
                candidates = np.arange(bins, bins - (at - end) // (capacity // size))
            each = space // size
            used = candidates[: -((at - end) // each)]
            filled = np.repeat(used, each)[: end - at]
            bin_of[at : at + len(filled)] = filled
            at += len(filled)
            last = len(filled) - each * (len(used) - 1)
            left = ((space - each * size, used[:-1]), (space - last * size, used[-1:]))
            for free, which in (*left, (space, candidates[len(used) :])):
                if free and len(which):
                    buckets.setdefault(free, []).append(which)
                    open_spaces |= 1 << free
            bins = max(bins, int(used[-1]) + 1)
    return bin_of


def length_batches(
    lengths: np.ndarray | Sequence[int],
    *,
    seed: int,
    epoch: int,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
) -> list[np.ndarray]:
    """Batches of item indices of like length, every index once; a function of (seed, epoch) alone.

    Items are shuffled, sorted by length within windows of about 50 batches, cut, and the batches shuffled.
    A batch holds `batch_size` items (the last cut fewer), or items of at most `batch_tokens` tokens together
    (one longer item stands alone). Raises ValueError unless exactly one of the two is given.
    """
    by_tokens = batch_size is None
    limit = batch_tokens if by_tokens else batch_size
    if limit is None or (batch_tokens is None) == by_tokens:
        raise ValueError("give batch_size or batch_tokens")
    lengths = np.asarray(lengths, dtype=np.int64)
    if not len(lengths):
        return []
    bits = philox(seed, epoch, Purpose.BATCHES)
    order = permutation(len(lengths), bits)
    per_batch = max(1, int(limit / max(1.0, lengths.mean()))) if by_tokens else limit
    order = _sort_windows(order, lengths, WINDOW_BATCHES * per_batch)
    cuts = _cuts_by_tokens(lengths[order], limit) if by_tokens else list(range(limit, len(order), limit))
    batches = np.split(order, cuts)
    return [batches[i] for i in permutation(len(batches), bits)]


def _sort_windows(order: np.ndarray, lengths: np.ndarray, window: int) -> np.ndarray:
    number = np.arange(len(order)) // window
    # Rising, then falling: where windows meet lengths are alike, so a batch across the border is no worse.
    sign = np.where(number % 2 == 0, 1, -1)
    return order[np.lexsort((sign * lengths[order], number))]


def _cuts_by_tokens(lengths: np.ndarray, batch_tokens: int) -> list[int]:
    total = np.concatenate(([0], np.cumsum(lengths)))
    cuts, at = [0], 0
    while at < len(lengths):
        fitting = int(np.searchsorted(total, total[at] + batch_tokens, side="right")) - 1
        at = max(fitting, at + 1)
        cuts.append(at)
    return cuts[1:-1]
