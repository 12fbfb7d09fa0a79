"""Weighted sources: which source, and which of its items, a global position draws."""

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np

from ronna.base.errors import RonnaError

MAX_PERIOD = 2**16
ROUNDING = 1e-12


class Mixture:
    """Draws from sources by weight, so evenly that every prefix of N draws holds N * weight within one.

    A pure function of the position: one period of the schedule is worked out at the start, the rest is
    arithmetic, O(1) a draw. Weights in a simple ratio are exact (0.7 and 0.3 repeat after 10 draws); those
    that need a period over 65,536 are rounded to about 1/65,536, and `weights` says what they became.

    Of the sources behind their share, the schedule serves the one whose deadline is nearest (Tijdeman 1980,
    "The chairman assignment problem"; Baruah et al. 1996, "Proportionate progress").
    """

    def __init__(self, weights: Sequence[float]):
        """Raises RonnaError for no weights, and for one that is not positive and finite."""
        for number, weight in enumerate(weights):
            if not 0 < weight < float("inf"):
                raise RonnaError(f"weight {weight}", where=f"source {number}", fix="give it a positive number")
        if not weights:
            raise RonnaError("a mixture of no sources", fix="name at least one source")
        counts = _counts(weights)
        self.period = sum(counts)
        self.weights = [count / self.period for count in counts]
        self._counts = np.asarray(counts, dtype=np.int64)
        self._source = _schedule(self._counts)
        self._ordinal = np.empty(self.period, dtype=np.int64)
        for source, count in enumerate(counts):
            self._ordinal[self._source == source] = np.arange(count)

    def draw(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For positions (N,): the source of each, and how often it was drawn before; both int64 (N,)."""
        rounds, within = np.divmod(np.asarray(positions, dtype=np.int64), self.period)
        source = self._source[within]
        return source, rounds * self._counts[source] + self._ordinal[within]


def _counts(weights: Sequence[float]) -> list[int]:
    """Draws of each source in one period."""
    total = sum(map(Fraction, weights))
    shares = [Fraction(weight) / total for weight in weights]
    # The ratios that were meant: 0.35 and 0.01 are not quite 35 to 1 in binary.
    meant = [share.limit_denominator(MAX_PERIOD) for share in shares]
    period = lcm(*(share.denominator for share in meant))
    close = all(abs(near - share) < ROUNDING for near, share in zip(meant, shares, strict=True))
    if close and sum(meant) == 1 and period <= MAX_PERIOD:
        return [int(share * period) for share in meant]
    counts = [int(share * MAX_PERIOD) for share in shares]
    remainders = [share * MAX_PERIOD - count for share, count in zip(shares, counts, strict=True)]
    by_remainder = sorted(range(len(counts)), key=lambda source: remainders[source], reverse=True)
    for source in by_remainder[: MAX_PERIOD - sum(counts)]:
        counts[source] += 1
    return [max(1, count) for count in counts]


def _schedule(counts: np.ndarray) -> np.ndarray:
    """One period of sources, in whole numbers so that no rounding decides."""
    period = int(counts.sum())
    drawn = np.zeros_like(counts)
    schedule = np.empty(period, dtype=np.int64)
    for slot in range(period):
        behind = drawn * period < (slot + 1) * counts
        deadline = -(-(drawn + 1) * period // counts)
        source = int(np.argmin(np.where(behind, deadline, period + 1)))
        schedule[slot] = source
        drawn[source] += 1
    return schedule
