"""What ranks that divide the matrices of a model give each other on the way through it."""

from typing import Literal

from torch import Tensor


class Group:
    """One rank alone, which gives nothing; `ronna.parallel.tensor` has more of them.

    Some divide the matrices of a model (n of them), others the rows of a text (m of them; `ronna.parallel.context`).

    Legend: R rows of the states between blocks, C channels, H heads, V vocabulary.
    """

    size = 1  # ranks that divide matrices

    def split(self, x: Tensor) -> Tensor:
        """What is whole on every rank, (R, C) -> the rows that stay here, (R / n, C) where they are divided at all."""
        return x

    def join(self, x: Tensor) -> Tensor:
        """The other way round."""
        return x

    def into(self, x: Tensor) -> Tensor:
        """The rows that are here -> all that a divided map reads, (R, C)."""
        return x

    def out(self, y: Tensor) -> Tensor:
        """What this rank's part of a map adds to all rows, (R, C) -> the sums of the rows that stay here."""
        return y

    def total(self, x: Tensor) -> Tensor:
        """The sum of what each rank has, which all of them go on with."""
        return x

    def words(self, logits: Tensor, vocab: int) -> Tensor:
        """Logits, (R, V / n) -> (R, V)."""
        return logits

    def reduced(self, x: Tensor, how: Literal["sum", "max", "min"]) -> Tensor:
        """What no gradient is taken of, over the ranks."""
        return x

    def heads(self, size: int, *maps: Tensor) -> tuple[Tensor, ...]:
        """The rows that are here of all heads, each of `size` channels, (R / m, C) -> all rows of some, (R, C / m).

        Heads of keys and values that are fewer than the ranks come to several of them.
        """
        return maps

    def rows(self, y: Tensor) -> Tensor:
        """The other way round."""
        return y

    def channels(self, table: Tensor) -> Tensor:
        """(..., H) -> (..., H / m), of the heads that `heads` leaves here."""
        return table

    def some(self, x: Tensor) -> Tensor:
        """(R, ...) -> (R / m, ...): what this rank computes of something that all have, for a sum over all."""
        return x

    def all_of(self, sums: Tensor) -> Tensor:
        """The sum of what each rank has of `some`."""
        return sums

    def shared(self, w: Tensor) -> Tensor:
        """A tensor that every rank has whole, and uses for a part of all rows or channels: gradients are summed."""
        return w
