"""The bootstrap: how far a score would move on another test set of the same kind.

A resample is nothing but *how often each row was drawn*. A measure takes such counts, so the value
(each row once), its interval (1,000 draws) and the difference of two systems (the same draws for
both) come from one formula, and rows that look alike are drawn together.

Shapes: P distinct rows, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.float64]
Times = NDArray[np.int64]
Values = dict[str, NDArray[np.float64]]
Measure = Callable[[Counts], Values]
"""counts (B, P) -> metric name -> (B,), NaN where undefined."""


@dataclass(frozen=True)
class Metric:
    """A value, its 95% interval and, for a difference of two systems, its p. None: undefined."""

    value: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None

    def to_json(self) -> dict[str, float | None]:
        keys = ("value", "low", "high") if self.p is None else ("value", "low", "high", "p")
        return {key: getattr(self, key) for key in keys}


def bootstrap(
    measure: Measure,
    times: Times,
    *,
    seed: int = 0,
    resamples: int = 1000,
    test_zero: bool = False,
) -> tuple[dict[str, Metric], tuple[str, ...]]:
    """Values with percentile intervals (Efron and Tibshirani 1993, ch. 13), and notes on what is not.

    `times` (P,): how often each distinct row stands in the test set. `test_zero` adds the
    two-sided p of a difference.
    """
    values = {name: float(value[0]) for name, value in measure(times[None].astype(np.float64)).items()}
    if times.sum() < 2:
        return {name: Metric(finite(value)) for name, value in values.items()}, ("one row: no interval",)
    blocks = [measure(counts) for counts in _draws(times, resamples, seed)]
    metrics, notes = {}, []
    for name, value in values.items():
        drawn = np.concatenate([block[name] for block in blocks])
        defined = drawn[np.isfinite(drawn)]
        if not math.isfinite(value) or not len(defined):
            metrics[name] = Metric(None)
            continue
        if len(defined) < resamples:
            notes.append(f"{name}: undefined in {resamples - len(defined)} of {resamples} resamples, left out")
        low, high = np.quantile(defined, [0.025, 0.975]).tolist()
        tail = min((defined <= 0).sum(), (defined >= 0).sum())
        p = min(1.0, 2 * float(tail + 1) / (len(defined) + 1)) if test_zero else None
        metrics[name] = Metric(value, low, high, p)
    return metrics, tuple(notes)


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _draws(times: Times, resamples: int, seed: int) -> Iterator[Counts]:
    """Counts (b, P) of rows drawn with replacement, in blocks of some 2 MB to stay in the cache.

    Few distinct rows are drawn as a multinomial, many one by one: the same law, whichever is cheaper.
    """
    rng, total, size = np.random.default_rng(seed), int(times.sum()), len(times)
    row_of = np.repeat(np.arange(size), times) if 4 * size > total else None
    step = max(1, 2**18 // size)
    for start in range(0, resamples, step):
        block = min(step, resamples - start)
        if row_of is None:
            yield rng.multinomial(total, times / total, size=block).astype(np.float64)
        else:
            drawn = (row_of[rng.integers(0, total, total)] for _ in range(block))
            yield np.stack([np.bincount(ids, minlength=size) for ids in drawn]).astype(np.float64)
