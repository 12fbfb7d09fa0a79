"""A batch without padding: one flat run of tokens, and the only word on which token may see which.

Legend: T tokens in all, B sequences, R rows and L columns of an attention view.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class View:
    """A rectangle (R, L) that attention kernels without variable lengths can work on.

    A row holds one or more whole sequences, so short ones share a row instead of being padded.
    """

    rows: int
    columns: int
    slots: Tensor | None  # (T,) place of each token in the flattened rectangle; None: they fill it in order
    sequence: Tensor  # (R, L) number of the sequence a cell belongs to, -1 in an empty cell
    position: Tensor  # (R, L) position of the cell's token in its sequence
    single: bool  # every row holds one sequence only

    def spread(self, x: Tensor) -> Tensor:
        """(T, ...) -> (R, L, ...), zeros in empty cells."""
        if self.slots is None:
            return x.unflatten(0, (self.rows, self.columns))
        empty = x.new_zeros(self.rows * self.columns, *x.shape[1:])
        return empty.index_copy(0, self.slots, x).unflatten(0, (self.rows, self.columns))

    def gather(self, y: Tensor) -> Tensor:
        """(R, L, ...) -> (T, ...)."""
        y = y.flatten(0, 1)
        return y if self.slots is None else y.index_select(0, self.slots)


def few_sizes(n: int, least: int) -> int:
    """n rounded up by an eighth at most (or to a multiple of `least`), to one of eight sizes an octave."""
    step = max(least, 2 ** (n.bit_length() - 4)) if n > 8 else least
    return -(-n // step) * step


def computed_rows(tokens: int, device: torch.device) -> int:
    """Rows that linear maps compute for so many tokens: on a CPU rounded up, by a sixteenth at most.

    oneDNN makes a kernel for every new shape and keeps the last thousand: batches of all lengths would fill
    the memory with kernels that are hardly ever used again (1.67 GB resident where this holds 1.44).
    """
    if device.type != "cpu" or tokens < 64:
        return tokens
    step = min(64, 2 ** (tokens.bit_length() - 5))
    return -(-tokens // step) * step


def widened(x: Tensor, tokens: int) -> Tensor:
    rows = computed_rows(tokens, x.device)
    return x if rows == tokens else F.pad(x, (0, 0, 0, rows - tokens))


@dataclass(frozen=True)
class Reads:
    """The positions of a flat batch whose last states somebody reads: the last block needs no other queries.

    index: (M,) places among the T tokens, each at most once.
    """

    index: Tensor
    tokens: int  # T

    def pick(self, x: Tensor) -> Tensor:
        """(T or more, C) -> (M, C), widened as `computed_rows` says."""
        return widened(x.index_select(0, self.index), len(self.index))

    def spread(self, x: Tensor) -> Tensor:
        """(M or more, ...) -> (T, ...), zeros where nobody reads."""
        empty = x.new_zeros(self.tokens, *x.shape[1:])
        return empty.index_copy(0, self.index, x[: len(self.index)])


class Sequences:
    """Where each sequence of a flat batch starts and at which position it begins.

    lengths: (B,) int64, each at least 1. past: (B,) tokens of each sequence that a cache already holds, or keys that
    stand for some. front: the first so many places of every sequence, counted in its length, are for virtual tokens.
    Device tensors are made once per batch and shared by all layers.
    """

    def __init__(self, lengths: Tensor, past: Tensor | None = None, device: torch.device | str = "cpu", front: int = 0):
        self.lengths = lengths.cpu()
        self.past = past
        self.device = torch.device(device)
        self.front = front
        self._memo: dict[Hashable, Any] = {}

    def memo(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returns, made once per batch: masks and rotary angles are the same in every layer."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    @classmethod
    def of(cls, lengths: list[int], device: torch.device | str = "cpu") -> "Sequences":
        return cls(torch.tensor(lengths, dtype=torch.long), device=device)

    def __len__(self) -> int:
        return len(self.lengths)

    def behind(self, past: int, front: int) -> "Sequences":
        """The same tokens with so many keys that nobody computes and then so many virtual tokens before each sequence.

        A cache that is in use holds both.
        """
        if self.past is not None:
            return Sequences(self.lengths, self.past + past + front, self.device)
        before = torch.full_like(self.lengths, past).to(self.device) if past else None
        return Sequences(self.lengths + front, before, self.device, front)

    @cached_property
    def text(self) -> Tensor:
        """(T - B front,) places of the tokens that are not virtual."""
        return (torch.arange(self.tokens, device=self.device) - self.starts[self.owner] >= self.front).nonzero()[:, 0]

    def places(self, at: Tensor | None) -> Tensor | None:
        """Where the tokens `at` (M,) of the text (None: all of it) lie; None where that is everywhere."""
        if not self.front:
            return at
        return self.text if at is None else self.text[at]

    def lead(self, front: Tensor, x: Tensor) -> Tensor:
        """(front, ...) before each sequence of a text's (T - B front, ...) -> (T, ...), the finer of their dtypes."""
        dtype = torch.promote_types(front.dtype, x.dtype)
        whole = x.new_zeros(self.tokens, *x.shape[1:], dtype=dtype).index_copy(0, self.text, x.to(dtype))
        virtual = (self.starts[:, None] + torch.arange(self.front, device=self.device)).flatten()
        return whole.index_copy(0, virtual, front.to(dtype).repeat(len(self), *[1] * (x.ndim - 1)))

    @cached_property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @cached_property
    def longest(self) -> int:
        return int(self.lengths.max())

    @cached_property
    def starts(self) -> Tensor:
        """(B,) index of each sequence's first token."""
        return (torch.cumsum(self.lengths, 0) - self.lengths).to(self.device)

    @cached_property
    def last(self) -> Tensor:
        """(B,) index of each sequence's last token."""
        return (torch.cumsum(self.lengths, 0) - 1).to(self.device)

    @cached_property
    def bounds(self) -> Tensor:
        """(B + 1,) int32 cumulative lengths, as variable-length kernels want them."""
        ends = torch.cumsum(self.lengths, 0)
        return torch.cat([ends.new_zeros(1), ends]).to(self.device, torch.int32)

    @cached_property
    def owner(self) -> Tensor:
        """(T,) number of the sequence each token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self)), self.lengths).to(self.device)

    @cached_property
    def positions(self) -> Tensor:
        """(T,) place of each token in its own sequence, counting what a cache already holds."""
        inside = torch.arange(self.tokens, device=self.device) - self.starts[self.owner]
        return inside if self.past is None else inside + self.past[self.owner]

    def widen(self, x: Tensor) -> Tensor:
        """(T, C) -> (rows, C), with zeros behind the tokens: see `computed_rows`."""
        return widened(x, self.tokens)

    @cached_property
    def reach(self) -> int:
        """One more than the highest position: waits for the device once a batch, not once a layer."""
        return int(self.positions.max()) + 1

    @cached_property
    def padded(self) -> View:
        """One sequence per row."""
        count = len(self)
        return self._view(torch.arange(count), torch.zeros(count, dtype=torch.long), self.longest, count)

    @cached_property
    def packed(self) -> View:
        """Consecutive sequences share a row while they fit into the length of the longest.

        On a CPU that length and the number of rows are rounded up, unless every cell holds a token without that:
        six products see them, and a kernel for a new pair of them takes 3 to 4 ms to make.
        """
        exact = self.device.type != "cpu" or self.tokens == len(self) * self.longest
        columns = self.longest if exact else few_sizes(self.longest, least=8)
        rows, offsets, row, used = [], [], 0, 0
        for n in self.lengths.tolist():
            if used + n > columns:
                row, used = row + 1, 0
            rows.append(row)
            offsets.append(used)
            used += n
        count = row + 1 if exact else few_sizes(row + 1, least=1)
        return self._view(torch.tensor(rows), torch.tensor(offsets), columns, count)

    def _view(self, rows: Tensor, offsets: Tensor, columns: int, count: int) -> View:
        single = int(rows[-1]) + 1 == len(self)
        rows, offsets = rows.to(self.device), offsets.to(self.device)
        inside = torch.arange(self.tokens, device=self.device) - self.starts[self.owner]
        slots = rows[self.owner] * columns + offsets[self.owner] + inside
        sequence = torch.full((count * columns,), -1, device=self.device).index_copy_(0, slots, self.owner)
        position = torch.zeros_like(sequence).index_copy_(0, slots, self.positions)
        full = self.tokens == count * columns
        shape = (count, columns)
        return View(*shape, None if full else slots, sequence.view(shape), position.view(shape), single)

    def mask(self, view: View, *, causal: bool, window: int | None) -> Tensor | None:
        """Who sees whom inside a view: bool (R or 1, 1, L, L), True where a query may look at a key.

        None where no mask is needed besides a causal one. Empty cells see themselves, so that no row of
        scores is wholly masked; nobody sees them.
        """
        return self.memo(("mask", view.rows, causal, window), lambda: self._mask(view, causal, window))

    def _mask(self, view: View, causal: bool, window: int | None) -> Tensor | None:
        bounded = window is not None and window < view.columns - 1
        # Right padding stands behind every real token, so causality alone hides it.
        if view.single and not bounded and (causal or view.slots is None):
            return None
        sequence = view.sequence
        see = sequence[:, None, :, None] == sequence[:, None, None, :]
        distance = torch.arange(view.columns, device=self.device)
        distance = distance[:, None] - distance[None, :]
        if causal:
            see = see & (distance >= 0)
        if bounded and window is not None:
            see = see & (distance.abs() <= window)
        return see
