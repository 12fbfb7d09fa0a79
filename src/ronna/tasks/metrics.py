"""Scores of a task on a test set, each with a 95% interval.

measures.py holds the formulas, bootstrap.py the intervals; here are the doors: what goes in, what
is checked, and the tables that come out. Shapes: N rows, K classes.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.cells import cell_len

from ronna.base.errors import RonnaError
from ronna.tasks.bootstrap import Counts, Metric, Values, bootstrap, finite
from ronna.tasks.labels import named_relation
from ronna.tasks.measures import Statistic, multi_label, ratio, regression, single_label, spans


@dataclass(frozen=True)
class ClassRow:
    """One line of the per-class table; `support` counts the gold rows."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Scores:
    """What was measured on `rows` rows (tokens, for a language model)."""

    rows: int
    metrics: Mapping[str, Metric]
    classes: tuple[ClassRow, ...] = ()
    averages: tuple[ClassRow, ...] = ()
    labels: tuple[str, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()  # [gold][predicted], over all labels
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, dict[str, float | None]]:
        """Metric -> {"value", "low", "high"}, and "p" for a difference; null where undefined."""
        return {name: metric.to_json() for name, metric in self.metrics.items()}

    def details(self) -> dict[str, Any]:
        """The rest, ready for JSON: rows, labels, classes, averages, confusion, notes."""
        return {name: value for name, value in asdict(self).items() if name != "metrics"}

    def text(self) -> str:
        """The tables for a terminal; the per-class one is laid out as scikit-learn's."""
        tables = [_class_table(self)] if self.classes else []
        return "\n".join([*tables, _metric_table(self.metrics), *(f"note: {visible(x)}" for x in self.notes)])


def classification_scores(gold: ArrayLike, predicted: ArrayLike, labels: Sequence[str], *, seed: int = 0) -> Scores:
    """One label a row: accuracy; macro and weighted precision, recall, F1; per class; confusion.

    `gold`, `predicted`: (N,) class ids below len(labels). As in scikit-learn, 0/0 counts as 0 and a
    class found in neither gold nor predictions takes no part in a macro average (both are noted).
    Raises RonnaError when empty, of unequal length, or out of range.
    """
    confusion = _confusion(gold, predicted, len(labels))
    true, guess = np.nonzero(confusion)
    times = confusion[true, guess]
    metrics, notes = bootstrap(single_label(true, guess, times), times, seed=seed)
    sums = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    return Scores(
        rows=int(confusion.sum()),
        metrics=metrics,
        classes=_class_rows(labels, *sums),
        averages=tuple(_average_row(kind, metrics, int(confusion.sum())) for kind in ("macro", "weighted")),
        labels=tuple(labels),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        notes=(*_absences(labels, *sums), *notes),
    )


def multilabel_scores(gold: ArrayLike, predicted: ArrayLike, labels: Sequence[str], *, seed: int = 0) -> Scores:
    """Any number of labels a row: micro, macro and weighted scores, subset accuracy, per label.

    `gold`, `predicted`: (N, K) of 0 and 1. Raises RonnaError when empty or of another shape.
    """
    gold, predicted = _pair(_flags(gold, "gold", len(labels)), _flags(predicted, "predicted", len(labels)))
    rows, times = np.unique(np.hstack([gold, predicted]), axis=0, return_counts=True)
    left, right = np.hsplit(rows, 2)
    metrics, notes = bootstrap(multi_label(left, right, times), times, seed=seed)
    tp, true, positive = (x.sum(0, dtype=np.int64) for x in (gold & predicted, gold, predicted))
    support = int(true.sum())
    return Scores(
        rows=len(gold),
        metrics=metrics,
        classes=_class_rows(labels, tp, true, positive),
        averages=tuple(_average_row(kind, metrics, support) for kind in ("micro", "macro", "weighted")),
        labels=tuple(labels),
        notes=(*_absences(labels, tp, true, positive), *notes),
    )


def span_scores(
    gold: Sequence[Collection[Any]], predicted: Sequence[Collection[Any]], types: Sequence[str], *, seed: int = 0
) -> Scores:
    """Entities found in N sentences, each a (start, end, type): right where all three are (CoNLL's strict measure).

    precision, recall and f1 are over all entities; macro and weighted ones average over the types that occur. As in
    seqeval, 0/0 counts as 0. Raises RonnaError when there is no sentence, or not as many of both.
    """
    if not gold and not predicted:
        raise _empty("test set")
    if len(gold) != len(predicted):
        raise RonnaError(f"{len(gold)} gold sentences but {len(predicted)} predictions", where="metrics")
    place, size = {name: i for i, name in enumerate(types)}, len(types)
    counts = np.zeros((len(gold), 3, size), np.int64)
    for row, true, found in zip(counts, gold, predicted, strict=True):
        for part, entities in zip(row, (set(true) & set(found), set(true), set(found)), strict=True):
            for *_, kind in entities:
                part[place[kind]] += 1
    rows, times = np.unique(counts.reshape(len(gold), -1), axis=0, return_counts=True)
    tp, true, positive = np.split(rows, 3, axis=1)
    metrics, notes = bootstrap(spans(tp, true, positive, times), times, seed=seed)
    sums = tuple(counts.sum(0))
    support = int(sums[1].sum())
    precision, recall, f1 = (metrics[name].value or 0.0 for name in ("precision", "recall", "f1"))
    micro = ClassRow("micro avg", precision, recall, f1, support)
    return Scores(
        rows=len(gold),
        metrics=metrics,
        classes=_class_rows(types, *sums),
        averages=(micro, *(_average_row(kind, metrics, support) for kind in ("macro", "weighted"))),
        labels=tuple(types),
        notes=(*_absences(types, *sums), *notes),
    )


def mean_scores(values: Mapping[str, ArrayLike], *, notes: Sequence[str] = (), seed: int = 0) -> Scores:
    """Metrics that are means over rows: name -> (N,). Raises RonnaError when empty."""
    names, table = list(values), np.stack([np.asarray(v, np.float64) for v in values.values()], axis=1)
    if not len(table):
        raise _empty("test set")
    rows, times = np.unique(table, axis=0, return_counts=True)

    def measure(counts: Counts) -> Values:
        return dict(zip(names, ((counts @ rows) / counts.sum(1, keepdims=True)).T, strict=True))

    metrics, more = bootstrap(measure, times, seed=seed)
    return Scores(len(table), metrics, notes=(*notes, *more))


def relation_scores(gold: ArrayLike, predicted: ArrayLike, labels: Sequence[str], *, seed: int = 0) -> Scores:
    """Relations of N pairs, as SemEval-2010 Task 8 counts them (Hendrickx et al. 2010, section 4).

    `gold`, `predicted`: (N,) label ids. "R(e1,e2)" and "R(e2,e1)" are one relation R: one found the wrong way round
    counts among those predicted and those there, but not among those right. Pairs without a relation (Other,
    no_relation) are no class of their own. macro_f1 is the task's official figure; precision, recall and f1 are over
    all relations; accuracy is over all labels. Raises RonnaError when empty, of unequal length, or out of range.
    """
    confusion = _confusion(gold, predicted, len(labels))
    true, guess = np.nonzero(confusion)
    times = confusion[true, guess]
    named = [named_relation(label).kind for label in labels]
    kinds = sorted({kind for kind in named if kind is not None})
    member = np.array([[name == kind for kind in kinds] for name in named])  # (labels, kinds)
    parts = member[true] & (true == guess)[:, None], member[true], member[guess]
    inner, same = spans(*parts, times), (true == guess).astype(np.float64)

    def measure(counts: Counts) -> Values:
        return {"accuracy": counts @ same / counts.sum(1)} | inner(counts)

    metrics, notes = bootstrap(measure, times, seed=seed)
    sums = tuple((times[:, None] * part).sum(0) for part in parts)
    support = int(sums[1].sum())
    return Scores(
        rows=int(confusion.sum()),
        metrics=metrics,
        classes=_class_rows(kinds, *sums),
        averages=(_average_row("macro", metrics, support),),
        labels=tuple(labels),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        notes=(*_absences(kinds, *sums), *notes),
    )


def regression_scores(gold: ArrayLike, predicted: ArrayLike, *, seed: int = 0) -> Scores:
    """A number a row: Pearson, Spearman (ties share their mean rank), mean squared and absolute error.

    `gold`, `predicted`: (N,). A correlation with a constant side is undefined: None, and noted.
    Raises RonnaError when empty, of unequal length, or not finite.
    """
    gold, predicted = _pair(_reals(gold, "gold"), _reals(predicted, "predicted"))
    once = np.ones(len(gold), np.int64)
    metrics, notes = bootstrap(regression(gold, predicted, once), once, seed=seed)
    sides = (("gold", gold), ("predicted", predicted))
    constant = [f"{name} is constant: its correlation is undefined" for name, x in sides if np.ptp(x) == 0]
    return Scores(rows=len(gold), metrics=metrics, notes=(*constant, *notes))


def perplexity_scores(nll_sum_nats: float, tokens: int, bytes: int | None = None) -> Scores:
    """Loss (nats a token), perplexity, and bits per UTF-8 byte where the text's bytes are known.

    Only bits per byte may be compared between tokenizers. Raises RonnaError with no token.
    """
    if tokens < 1 or (bytes is not None and bytes < 1):
        raise _empty("text")
    loss = nll_sum_nats / tokens
    if not math.isfinite(loss):
        notes: tuple[str, ...] = ("the loss is not finite",)
    else:
        notes = ("the perplexity is beyond the range of a float",) if loss > 700 else ()
    values = {"loss": loss, "perplexity": math.exp(loss) if loss <= 700 else math.inf}
    if bytes is not None:
        values["bits_per_byte"] = nll_sum_nats / math.log(2) / bytes
    return Scores(tokens, {name: Metric(finite(value)) for name, value in values.items()}, notes=notes)


def masked_accuracy(correct: int, masked: int, *, seed: int = 0) -> Scores:
    """The share of `masked` tokens predicted exactly (BERT's masked-LM accuracy)."""
    if masked < 1:
        raise _empty("masked tokens")
    if not 0 <= correct <= masked:
        raise ValueError(f"{correct} correct of {masked} masked")
    times = np.array([correct, masked - correct])
    metrics, notes = bootstrap(lambda counts: {"masked_accuracy": counts[:, 0] / masked}, times, seed=seed)
    return Scores(masked, metrics, notes=notes)


def paired_difference(
    statistic: Statistic, gold: ArrayLike, first: ArrayLike, second: ArrayLike, *, seed: int = 0
) -> Scores:
    """first - second for every metric of `statistic` (single_label, multi_label or regression).

    Both systems are scored on the same draws of the same test rows (N, ...), so what makes a row hard
    for both cancels (Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation").
    p is two-sided: twice the smaller share of draws on either side of 0; p < 0.05 agrees with an
    interval that excludes 0. Its floor is 2 / (draws + 1).
    """
    truth, one, two = np.asarray(gold), np.asarray(first), np.asarray(second)
    _pair(truth, one)
    _pair(truth, two)
    joint = np.stack([truth, one, two], axis=1)
    rows, times = np.unique(joint, axis=0, return_counts=True)
    truth, one, two = rows[:, 0], rows[:, 1], rows[:, 2]

    score_one, score_two = statistic(truth, one, times), statistic(truth, two, times)

    def difference(counts: Counts) -> Values:
        other = score_two(counts)
        return {name: value - other[name] for name, value in score_one(counts).items()}

    metrics, notes = bootstrap(difference, times, seed=seed, test_zero=True)
    return Scores(int(times.sum()), metrics, notes=notes)


def _confusion(gold: ArrayLike, predicted: ArrayLike, size: int) -> NDArray[np.int64]:
    """(K, K) rows by gold and predicted class, once both are checked."""
    true, guess = _pair(_ids(gold, "gold", size), _ids(predicted, "predicted", size))
    confusion = np.zeros((size, size), dtype=np.int64)
    np.add.at(confusion, (true, guess), 1)
    return confusion


def _class_rows(
    labels: Sequence[str], tp: NDArray[Any], gold: NDArray[Any], predicted: NDArray[Any]
) -> tuple[ClassRow, ...]:
    columns = ratio(tp, predicted), ratio(tp, gold), ratio(2 * tp, gold + predicted)
    table = zip(labels, *(column.tolist() for column in columns), gold.tolist(), strict=True)
    present = (gold + predicted > 0).tolist()
    return tuple(ClassRow(*row) for row, kept in zip(table, present, strict=True) if kept)


def _average_row(kind: str, metrics: Mapping[str, Metric], support: int) -> ClassRow:
    precision, recall, f1 = (metrics[f"{kind}_{name}"].value or 0.0 for name in ("precision", "recall", "f1"))
    return ClassRow(f"{kind} avg", precision, recall, f1, support)


def _absences(labels: Sequence[str], tp: NDArray[Any], gold: NDArray[Any], predicted: NDArray[Any]) -> Iterator[str]:
    absent = {
        "never predicted, precision 0/0 set to 0": (gold > 0) & (predicted == 0),
        "not in the gold, recall 0/0 set to 0": (gold == 0) & (predicted > 0),
        "in neither gold nor predictions, left out of the averages": (gold + predicted) == 0,
    }
    for what, flags in absent.items():
        names = [labels[int(index)] for index in np.flatnonzero(flags)]
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            yield f"{what}: {', '.join(names[:5])}{more}"


def visible(text: str, keep: str = "") -> str:
    """`text` with control and text-direction characters made harmless symbols, but for those in `keep`."""
    if text.isprintable():
        return text

    def show(char: str) -> str:
        if char in keep or unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp"):
            hidden = "\u202a" <= char <= "\u202e" or "\u2066" <= char <= "\u2069"
            return f"<U+{ord(char):04X}>" if hidden else char
        return chr(0x2400 + ord(char)) if ord(char) < 32 else f"<U+{ord(char):04X}>"

    return "".join(map(show, text))


def _class_table(scores: Scores) -> str:
    """scikit-learn's classification_report, columns aligned by width on screen (a Chinese character: 2)."""
    rows = [(visible(row.label), row) for row in (*scores.classes, *scores.averages)]
    width = max(cell_len(name) for name, _ in rows)
    width = max(width, len("weighted avg"))

    def line(name: str, *cells: str) -> str:
        return " " * (width - cell_len(name)) + name + " " + "".join(f" {cell:>9}" for cell in cells)

    lines = [
        line(name, *(f"{x:.4f}" for x in (row.precision, row.recall, row.f1)), str(row.support)) for name, row in rows
    ]
    at = len(scores.classes)
    middle = [""]
    if accuracy := scores.metrics.get("accuracy"):
        middle.append(line("accuracy", "", "", f"{accuracy.value:.4f}", str(scores.rows)))
    header = line("", "precision", "recall", "f1-score", "support")
    return "\n".join([header, "", *lines[:at], *middle, *lines[at:], ""])


def _metric_table(metrics: Mapping[str, Metric]) -> str:
    width = max(map(len, metrics), default=0)
    lines = [f"{'':<{width}}  {'value':>12}  95% interval"]
    for name, metric in metrics.items():
        low_high = f"{metric.low:.4f} to {metric.high:.4f}" if metric.low is not None else ""
        p = f"  p = {metric.p:.3f}" if metric.p is not None else ""
        value = "undefined" if metric.value is None else f"{metric.value:.4f}"
        lines.append(f"{name:<{width}}  {value:>12}  {low_high}{p}".rstrip())
    return "\n".join(lines)


def _ids(values: ArrayLike, name: str, size: int) -> NDArray[np.int64]:
    ids = np.asarray(values)
    if ids.size and not (ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer)):
        raise RonnaError("class ids must be one whole number a row", where=name)
    if ids.size and not (ids.min() >= 0 and ids.max() < size):
        row = int(np.flatnonzero((ids < 0) | (ids >= size))[0])
        raise RonnaError(
            f"class id {ids[row]} in row {row}, but there are {size} labels",
            where=name,
            fix="use the label list the model was trained with",
        )
    return ids.astype(np.int64)


def _flags(values: ArrayLike, name: str, size: int) -> NDArray[np.int64]:
    flags = np.asarray(values)
    if flags.size and (flags.shape[1:] != (size,) or not np.isin(flags, (0, 1)).all()):
        raise RonnaError(f"multi-label rows must hold {size} numbers, each 0 or 1", where=name)
    return flags.astype(np.uint8)


def _reals(values: ArrayLike, name: str) -> NDArray[np.float64]:
    reals = np.asarray(values, dtype=np.float64)
    if reals.size and not (reals.ndim == 1 and np.isfinite(reals).all()):
        raise RonnaError("targets must be one finite number a row", where=name, fix="drop the bad rows")
    return reals


def _pair(gold: NDArray[Any], predicted: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    if not len(gold) and not len(predicted):
        raise _empty("test set")
    if gold.shape != predicted.shape:
        raise RonnaError(
            f"{len(gold)} gold rows but {len(predicted)} predictions",
            where="metrics",
            fix="give one prediction for each row, in the same order",
        )
    return gold, predicted


def _empty(what: str) -> RonnaError:
    return RonnaError(f"nothing to score: the {what} is empty", where="metrics", fix="give at least one row")
