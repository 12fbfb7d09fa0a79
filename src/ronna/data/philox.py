"""Random numbers that follow from (seed, number, purpose) alone, never from what was drawn before."""

from enum import IntEnum

import numpy as np

WORD = 2**64 - 1


class Purpose(IntEnum):
    """Keeps streams of one seed apart; values are part of what a seed means, so they never change."""

    SAMPLE = 0
    ORDER = 1
    BATCHES = 2


def philox(seed: int, number: int, purpose: Purpose) -> np.random.Philox:
    """The counter-based Philox 4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    The key is (seed, number); the purpose is the highest word of the counter, which no stream grows into.
    """
    key = np.array([seed & WORD, number & WORD], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, purpose], dtype=np.uint64))


def permutation(n: int, bits: np.random.Philox) -> np.ndarray:
    """A random order of range(n), int64 (n,).

    Sorting Philox's own words rather than `Generator.permutation`: NumPy may change the latter between
    versions, and a resumed run must see the old order.
    """
    return np.argsort(bits.random_raw(n), kind="stable")
