"""What ranks that divide the matrices of a model give each other on the way through it."""

from typing import Literal

from torch import Tensor


class Group:
    """One rank alone, which gives nothing; `ronna.parallel.tensor` has more of them.

    Legend: R rows of the states between blocks, C channels, V vocabulary, n ranks.
    """

    size = 1

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
        """(R, V / n) -> (R, V)."""
        return logits

    def reduced(self, x: Tensor, how: Literal["sum", "max", "min"]) -> Tensor:
        """What no gradient is taken of, over the ranks."""
        return x

    def shared(self, w: Tensor) -> Tensor:
        """A tensor that every rank has whole, and uses for a part of all rows or channels: gradients are summed."""
        return w
