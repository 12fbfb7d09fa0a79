"""How the ranks of a run divide the batches that they only look at."""

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class Among(Protocol):
    """One of `parts` that compute at the same time: a model in shards takes all of them for each of its calls, so each
    makes as many calls, in the same order, as the others. `ronna.parallel.world.World` is one."""

    @property
    def part(self) -> int: ...

    @property
    def parts(self) -> int: ...

    def any(self, here: bool) -> bool:
        """Whether it is so somewhere."""
        ...

    def from_parts(self, mine: Tensor) -> list[Tensor]:
        """(n, ...) of each part, in order; n may differ."""
        ...


class Single:
    """One process, which does everything."""

    part, parts = 0, 1

    def any(self, here: bool) -> bool:
        return here

    def from_parts(self, mine: Tensor) -> list[Tensor]:
        return [mine]


SINGLE = Single()


def turns(batches: Sequence[T], among: Among) -> Iterator[tuple[T, bool]]:
    """The batches of one part, and whether each is its own: one that has none left does the last of all once more, and
    nobody needs what comes out."""
    for first in range(0, len(batches), among.parts):
        place = first + among.part
        yield batches[min(place, len(batches) - 1)], place < len(batches)


def owned(batches: Sequence[T], part: int, among: Among) -> Sequence[T]:
    """Those that `turns` calls its own in this part."""
    return batches[part :: among.parts]
