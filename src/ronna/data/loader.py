"""Order as a function of (seed, step): which samples a step takes is computed, never remembered."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from typing import TypeVar

import numpy as np

from ronna.base.errors import RonnaError
from ronna.data.philox import Purpose, permutation, philox

T = TypeVar("T")


class Order:
    """A fresh random order of the items in every epoch, looked up at any position.

    The permutations kept (at most two, 8 bytes an item each) are a cache, not state: (seed, epoch) give them.
    """

    def __init__(self, n_items: int, seed: int):
        """Raises RonnaError when there is nothing to order."""
        if n_items < 1:
            raise RonnaError("no items to draw from", fix="check the data and the filters before it")
        self.n_items, self.seed = n_items, seed
        self._epochs: dict[int, np.ndarray] = {}

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Item indices, int64 (N,), at global sample positions (N,); epoch = position // n_items."""
        epochs, within = np.divmod(np.asarray(positions, dtype=np.int64), self.n_items)
        items = np.empty_like(within)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            items[chosen] = self._permutation(epoch)[within[chosen]]
        return items

    def _permutation(self, epoch: int) -> np.ndarray:
        order = self._epochs.get(epoch)
        if order is None:
            order = permutation(self.n_items, philox(self.seed, epoch, Purpose.ORDER))
            # Assigning a new dict keeps a reader in another thread safe.
            newest = list(self._epochs.items())[-1:]
            self._epochs = dict(newest) | {epoch: order}
        return order


def positions_for(
    step: int, *, batch: int, micro: int = 0, accumulation: int = 1, rank: int = 0, world: int = 1
) -> np.ndarray:
    """Global sample positions, int64 (about batch / (world * accumulation),), of one micro-batch on one rank.

    Micro-batches in turn, and ranks within each, take consecutive parts of
    [step * batch, (step + 1) * batch): a step sees the same samples in the same order however it is divided.
    Parts differ by at most one sample. Raises RonnaError when some part would be empty.
    """
    parts = world * accumulation
    if parts > batch:
        raise RonnaError(
            f"a batch of {batch} cannot be divided over {world} ranks x {accumulation} micro-batches",
            fix="raise the batch, or lower the accumulation or the number of ranks",
        )
    part = micro * world + rank
    return step * batch + np.arange(batch * part // parts, batch * (part + 1) // parts)


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The random numbers of one sample (its masks, its crops), whichever rank or worker prepares it."""
    return np.random.Generator(philox(seed, position, Purpose.SAMPLE))


def prefetch(make: Callable[[int], T], start: int, *, stop: int | None = None, depth: int = 2) -> Iterator[T]:
    """Yields make(start), make(start + 1), ... computed up to `depth` ahead in one thread.

    What `make` raises is raised here, at its step, with its own traceback. Leaving the loop (or closing the
    iterator) ends the thread after the call it is in. Raises ValueError for depth < 1.
    """
    if depth < 1:
        raise ValueError(f"depth {depth}: at least one step ahead")
    steps = count(start) if stop is None else iter(range(start, stop))
    with ThreadPoolExecutor(1, "prefetch") as pool:
        waiting = deque(pool.submit(make, step) for step in islice(steps, depth))
        try:
            while waiting:
                made = waiting.popleft().result()
                waiting.extend(pool.submit(make, step) for step in islice(steps, 1))
                yield made
        finally:
            for future in waiting:
                future.cancel()
