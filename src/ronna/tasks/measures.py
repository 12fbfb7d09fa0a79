"""The metrics themselves, each as a function of how often each distinct row is drawn.

Shapes: P distinct rows (gold, prediction), K classes, B resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from ronna.tasks.bootstrap import Counts, Measure, Times, Values

Statistic = Callable[[NDArray[Any], NDArray[Any], Times], Measure]
"""gold (P, ...), predicted (P, ...), times (P,) in the test set -> measure: counts (B, P) -> name -> (B,)."""


def single_label(gold: NDArray[Any], predicted: NDArray[Any], times: Times) -> Measure:
    """The metrics of one label a row; `gold`, `predicted`: (P,) class ids."""
    size = int(max(gold.max(), predicted.max())) + 1
    rows, each = np.arange(len(gold)), np.ones(len(gold))

    def members(ids: NDArray[Any], weight: NDArray[Any]) -> csr_array:
        return csr_array((weight, (rows, ids)), shape=(len(rows), size))

    right = members(gold, (gold == predicted).astype(np.float64))
    true, positive = members(gold, each), members(predicted, each)
    averages = _averages(*(times[None] @ part for part in (right, true, positive)))

    def measure(counts: Counts) -> Values:
        tp = counts @ right
        return {
            "accuracy": tp.sum(1) / counts.sum(1),
            **averages(tp, counts @ true, counts @ positive),
        }

    return measure


def multi_label(gold: NDArray[Any], predicted: NDArray[Any], times: Times) -> Measure:
    """The metrics of a set of labels a row; `gold`, `predicted`: (P, K) of 0 and 1."""
    same = (gold == predicted).all(1, keepdims=True)
    flags = np.hstack([gold & predicted, gold, predicted, same]).astype(np.float64)
    averages = _averages(*np.split(times[None] @ flags[:, :-1], 3, axis=1))

    def measure(counts: Counts) -> Values:
        sums = counts @ flags
        tp, true, positive = np.split(sums[:, :-1], 3, axis=1)
        hits, trues, positives = tp.sum(1), true.sum(1), positive.sum(1)
        return {
            "subset_accuracy": sums[:, -1] / counts.sum(1),
            "micro_precision": ratio(hits, positives),
            "micro_recall": ratio(hits, trues),
            "micro_f1": ratio(2 * hits, trues + positives),
            **averages(tp, true, positive),
        }

    return measure


def spans(tp: NDArray[Any], gold: NDArray[Any], predicted: NDArray[Any], times: Times) -> Measure:
    """The metrics of entities found: of each row how many of each of K types are right, true and predicted (P, K)."""
    size = tp.shape[1]
    counted = np.hstack([tp, gold, predicted]).astype(np.float64)
    averages = _averages(*np.split(times[None] @ counted, 3, axis=1))

    def measure(counts: Counts) -> Values:
        sums = counts @ counted
        tp, true, positive = sums[:, :size], sums[:, size : 2 * size], sums[:, 2 * size :]
        hits, trues, positives = tp.sum(1), true.sum(1), positive.sum(1)
        return {
            "precision": ratio(hits, positives),
            "recall": ratio(hits, trues),
            "f1": ratio(2 * hits, trues + positives),
            **averages(tp, true, positive),
        }

    return measure


def regression(gold: NDArray[Any], predicted: NDArray[Any], times: Times) -> Measure:
    """The metrics of a number a row; `gold`, `predicted`: (P,)."""
    error, x, y = predicted - gold, _scaled(gold), _scaled(predicted)
    columns = np.stack([error**2, np.abs(error), x, y, x * x, y * y, x * y], axis=1)
    rank_gold, rank_predicted = _ranker(gold), _ranker(predicted)

    def measure(counts: Counts) -> Values:
        rows = counts.sum(1)
        mse, mae, x, y, xx, yy, xy = (counts @ columns).T / rows
        ranks, spread = rank_gold(counts)
        others, other_spread = rank_predicted(counts)
        ranks *= counts
        return {
            "pearson": _correlation(xy - x * y, xx - x * x, yy - y * y),
            "spearman": _correlation(np.einsum("bp,bp->b", ranks, others) / rows, spread, other_spread),
            "mse": mse,
            "mae": mae,
        }

    return measure


def ratio(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    """part / whole, and 0 for 0/0."""
    return np.divide(part, whole, out=np.zeros(np.shape(part)), where=whole > 0)


def _averages(tp: Counts, gold: Counts, predicted: Counts) -> Callable[[Counts, Counts, Counts], Values]:
    """Macro and weighted scores (B,) of per-class sums (B, K), given those (1, K) of the whole test set.

    A macro average always runs over the classes of the whole set; one that a resample misses keeps its
    score of the whole. Else rare classes would come and go, and the interval could miss the value.
    """
    whole, occurs = _by_class(tp, gold, predicted), gold + predicted > 0
    number = max(1, int(occurs.sum()))

    def averages(tp: Counts, gold: Counts, predicted: Counts) -> Values:
        missed, rows, scores = gold + predicted == 0, gold.sum(1), _by_class(tp, gold, predicted)
        filled = {name: np.where(missed, whole[name], score) for name, score in scores.items()}
        macro = {f"macro_{name}": score.sum(1) / number for name, score in filled.items()}
        weighted = {f"weighted_{name}": ratio((x * gold).sum(1), rows) for name, x in scores.items()}
        return macro | weighted

    return averages


def _by_class(tp: Counts, gold: Counts, predicted: Counts) -> Values:
    return {
        "precision": ratio(tp, predicted),
        "recall": ratio(tp, gold),
        "f1": ratio(2 * tp, gold + predicted),
    }


def _correlation(covariance: Counts, var_x: Counts, var_y: Counts) -> Counts:
    """(B,), NaN where a side does not vary (beyond rounding: the sides are scaled to about 1)."""
    defined = (var_x > 1e-12) & (var_y > 1e-12)
    root = np.sqrt(np.where(defined, var_x * var_y, 1))
    return np.where(defined, np.clip(covariance / root, -1, 1), np.nan)


def _ranker(values: NDArray[Any]) -> Callable[[Counts], tuple[Counts, Counts]]:
    """counts -> ranks within each resample (B, P) in [-1/2, 1/2], ties at their mean, and variance (B,)."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))

    def rank(counts: Counts) -> tuple[Counts, Counts]:
        rows = counts.sum(1, keepdims=True)
        tied = np.add.reduceat(counts[:, order], starts, axis=1)
        ranks = np.cumsum(tied, axis=1)
        ranks -= (tied + rows) / 2
        ranks /= rows
        return ranks[:, group], np.einsum("bg,bg,bg->b", tied, ranks, ranks) / rows[:, 0]

    return rank


def _scaled(values: NDArray[Any]) -> NDArray[np.float64]:
    """Mean 0 and deviation 1, so that "does not vary" means the same for every unit; 0 if constant."""
    spread = values.std() if np.ptp(values) > 0 else 0.0
    return (values - values.mean()) / spread if spread > 0 else np.zeros(len(values))
