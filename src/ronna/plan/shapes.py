"""How many rows and columns a step computes, in which precision, and what of the model learns.

Legend: T tokens, B sequences, R rows and L columns of an attention view, M positions read.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from ronna.model.config import Activation

Dtype = Literal["fp32", "bf16"]
BYTES: dict[Dtype, int] = {"fp32": 4, "bf16": 2}


def few_sizes(n: int, least: int) -> int:
    """As `ronna.model.sequences` rounds the sides of a rectangle, on a CPU."""
    step = max(least, 2 ** (n.bit_length() - 4)) if n > 8 else least
    return -(-n // step) * step


def computed_rows(tokens: int, cuda: bool) -> int:
    """As `ronna.model.sequences` rounds the rows of linear maps."""
    if cuda or tokens < 64:
        return tokens
    step = min(64, 2 ** (tokens.bit_length() - 5))
    return -(-tokens // step) * step


@dataclass(frozen=True)
class Lengths:
    """One micro-batch: so many sequences, the longest of `length` tokens, `tokens` in all (None: all are as long).

    rows: of the rectangle that attention works on where it needs one, several sequences to a row, as in the full rows
    of pre-training on documents. None: as many as sequences of the mean length need.
    """

    sequences: int
    length: int
    tokens: int | None = None
    rows: int | None = None

    @classmethod
    def of(cls, lengths: list[int]) -> "Lengths":
        """Of sequences in this order, with the rows that a CPU computes."""
        longest, rows, used = max(lengths), 1, 0
        columns = longest if sum(lengths) == len(lengths) * longest else few_sizes(longest, 8)
        for n in lengths:
            if used + n > columns:
                rows, used = rows + 1, 0
            used += n
        return cls(len(lengths), longest, sum(lengths), rows)

    @cached_property
    def total(self) -> int:
        return self.sequences * self.length if self.tokens is None else self.tokens

    def ahead(self, tokens: int) -> "Lengths":
        """With so many more before every sequence."""
        return replace(self, length=self.length + tokens, tokens=self.total + self.sequences * tokens, rows=None)

    def padded(self) -> "View":
        return View(self.sequences, self.length, self.total, True)

    def packed(self, cuda: bool) -> "View":
        exact = cuda or self.total == self.sequences * self.length
        columns = self.length if exact else few_sizes(self.length, 8)
        rows = self.rows
        if rows is None:
            rows = -(-self.sequences // max(1, columns * self.sequences // self.total))
        return View(rows if exact else few_sizes(rows, 1), columns, self.total, rows == self.sequences)


@dataclass(frozen=True)
class View:
    """A rectangle with a place for each of T tokens; `single`: no row holds two sequences."""

    rows: int
    columns: int
    tokens: int
    single: bool

    @property
    def cells(self) -> int:
        return self.rows * self.columns

    @property
    def full(self) -> bool:
        return self.cells == self.tokens


@dataclass(frozen=True)
class Adapter:
    """What learns beside a frozen base and a classifier.

    lora: matrices of this rank, houlsby: bottlenecks as wide and all norms, on or behind the linear maps of the blocks
    that are called so ("q", "ffn.up"; "all": every one). bitfit: the biases of the blocks. prompt: as many virtual
    tokens before every text; prefix: as many keys and values, which a network `hidden` wide may make.
    """

    rank: int
    targets: tuple[str, ...] = ("all",)
    kind: Literal["lora", "houlsby", "bitfit", "prompt", "prefix"] = "lora"
    act: Activation = "gelu"
    hidden: int | None = None

    @property
    def virtual(self) -> int:
        """Tokens that take positions of a text."""
        return self.rank if self.kind in ("prompt", "prefix") else 0

    def on(self, path: str) -> bool:
        if self.kind not in ("lora", "houlsby"):
            return False
        return "all" in self.targets or any(f".{path}".endswith(f".{target}") for target in self.targets)


@dataclass(frozen=True)
class Numbers:
    """Bytes of an activation and of a weight, and what learns: all, or an adapter and the classifier alone.

    four_bit: the linear maps of blocks are made out of 4 bits whenever they are read. away: activations wait elsewhere.
    compiled: blocks but for their attention, and the softmax of the loss.
    """

    compute: int
    weight: int
    cuda: bool
    adapter: Adapter | None = None
    four_bit: bool = False
    away: bool = False
    compiled: bool = False

    @property
    def learns(self) -> bool:
        return self.adapter is None

    def trains(self, kind: str) -> bool:
        return self.adapter is not None and self.adapter.kind == kind

    def tables(self, normed: bool) -> "Numbers":
        """Of embedding tables: what a norm reads that learns stays wide."""
        return replace(self, weight=4) if normed and self.trains("houlsby") else self

    @property
    def own(self) -> "Numbers":
        """Of an adapter's own weights, such as its classifier's, which all learn and lie in fp32."""
        return self if self.learns else replace(self, weight=4, adapter=None)

    @property
    def norms(self) -> "Numbers":
        """Of norms, of which Houlsby's adapters have their own."""
        return self.own if self.trains("houlsby") else self

    def rows(self, tokens: int) -> int:
        return computed_rows(tokens, self.cuda)
