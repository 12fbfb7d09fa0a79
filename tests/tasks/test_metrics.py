"""Scores against scikit-learn and scipy, intervals against theory, and the edges."""

import json
import math
import time
import warnings

import numpy as np
import pytest
from rich.cells import cell_len
from scipy import stats
from sklearn import metrics as sk

from ronna.base.errors import RonnaError
from ronna.tasks.bootstrap import _draws
from ronna.tasks.measures import multi_label, regression, single_label
from ronna.tasks.metrics import (
    classification_scores,
    masked_accuracy,
    multilabel_scores,
    paired_difference,
    perplexity_scores,
    regression_scores,
)


@pytest.fixture(autouse=True)
def _no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def noisy_labels(rows=400, classes=5, right=0.7, seed=0):
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, classes, rows)
    return gold, np.where(rng.random(rows) < right, gold, rng.integers(0, classes, rows))


def value(scores, name):
    return scores.metrics[name].value


def test_single_label_equals_scikit_learn():
    gold, predicted = noisy_labels()
    scores = classification_scores(gold, predicted, list("abcde"))
    assert value(scores, "accuracy") == pytest.approx(sk.accuracy_score(gold, predicted))
    for kind in ("macro", "weighted"):
        expected = sk.precision_recall_fscore_support(gold, predicted, average=kind)[:3]
        ours = [value(scores, f"{kind}_{name}") for name in ("precision", "recall", "f1")]
        assert ours == pytest.approx(expected)
    assert np.array_equal(scores.confusion, sk.confusion_matrix(gold, predicted))


def test_table_is_the_layout_of_scikit_learn():
    gold, predicted = noisy_labels()
    names = ["alpha", "beta", "a label with a long name", "d", "e"]
    expected = sk.classification_report(gold, predicted, target_names=names, digits=4)
    assert classification_scores(gold, predicted, names).text().startswith(expected)


def test_macro_leaves_out_a_class_that_never_occurs_and_says_so():
    gold, predicted = [0, 0, 1, 4], [0, 2, 1, 1]
    scores = classification_scores(gold, predicted, ["a", "b", "c", "unused", "d"])
    expected = sk.f1_score(gold, predicted, average="macro", zero_division=0)
    assert value(scores, "macro_f1") == pytest.approx(expected)
    assert [row.label for row in scores.classes] == ["a", "b", "c", "d"]
    assert np.shape(scores.confusion) == (5, 5)
    notes = "\n".join(scores.notes)
    assert "precision 0/0 set to 0: d" in notes
    assert "recall 0/0 set to 0: c" in notes
    assert "left out of the averages: unused" in notes


def test_chinese_labels_align_and_control_characters_are_shown():
    text = classification_scores([0, 1, 2], [0, 1, 1], ["正面评价", "负面", "x\x1b[31m\r\n"]).text()
    table = text.split("\n\n")[1].splitlines()
    assert len({cell_len(line) for line in table}) == 1
    assert "\x1b" not in text and "\r" not in text and "x␛[31m␍␊" in text


def test_multi_label_equals_scikit_learn():
    rng = np.random.default_rng(1)
    gold = (rng.random((300, 4)) < 0.3).astype(int)
    predicted = np.where(rng.random((300, 4)) < 0.8, gold, 1 - gold)
    scores = multilabel_scores(gold, predicted, list("wxyz"))
    for kind in ("micro", "macro", "weighted"):
        expected = sk.precision_recall_fscore_support(gold, predicted, average=kind)[:3]
        ours = [value(scores, f"{kind}_{name}") for name in ("precision", "recall", "f1")]
        assert ours == pytest.approx(expected)
    assert value(scores, "subset_accuracy") == pytest.approx(sk.accuracy_score(gold, predicted))
    spare = np.zeros((300, 1), int)
    wider = multilabel_scores(np.hstack([spare, gold]), np.hstack([spare, predicted]), list("vwxyz"))
    assert value(wider, "macro_f1") == pytest.approx(value(scores, "macro_f1"))
    report = sk.classification_report(gold, predicted, target_names=list("wxyz"), digits=4, zero_division=0)
    ours = scores.text().splitlines()
    assert [line.split() for line in ours[:9]] == [line.split() for line in report.splitlines()[:9]]


def test_regression_equals_scipy_with_ties():
    rng = np.random.default_rng(2)
    gold = rng.integers(0, 6, 200).astype(float)
    predicted = np.round(gold + rng.normal(size=200), 1)
    scores = regression_scores(gold, predicted)
    assert value(scores, "pearson") == pytest.approx(stats.pearsonr(gold, predicted)[0])
    assert value(scores, "spearman") == pytest.approx(stats.spearmanr(gold, predicted)[0])
    assert value(scores, "mse") == pytest.approx(sk.mean_squared_error(gold, predicted))
    assert value(scores, "mae") == pytest.approx(sk.mean_absolute_error(gold, predicted))


def test_each_resample_is_scored_as_if_its_rows_were_written_out():
    gold, predicted = noisy_labels(rows=60)
    x, y = np.round(np.random.default_rng(3).normal(size=(2, 60)), 1)
    once = np.ones(60, np.int64)
    for counts in _draws(once, 5, seed=0):
        for row in counts:
            at = np.repeat(np.arange(60), row.astype(int))
            classes = single_label(gold, predicted, once)(row[None])
            assert classes["macro_f1"][0] == pytest.approx(sk.f1_score(gold[at], predicted[at], average="macro"))
            numbers = regression(x, y, once)(row[None])
            assert numbers["pearson"][0] == pytest.approx(stats.pearsonr(x[at], y[at])[0])
            assert numbers["spearman"][0] == pytest.approx(stats.spearmanr(x[at], y[at])[0])


@pytest.mark.parametrize("times", [np.ones(40, np.int64), np.array([3000, 1000])])
def test_draws_keep_the_number_of_rows_and_their_law(times):
    counts = np.concatenate(list(_draws(times, 4000, seed=0)))
    total = times.sum()
    assert counts.shape == (4000, len(times)) and (counts.sum(1) == total).all()
    assert counts.mean(0) == pytest.approx(times, rel=0.1)
    variance = times * (1 - times / total)
    assert counts.var(0) == pytest.approx(variance, rel=0.2)


def test_interval_is_that_of_the_binomial_and_is_repeatable():
    gold = np.zeros(1000, int)
    predicted = (np.arange(1000) >= 800).astype(int)
    scores = classification_scores(gold, predicted, ["a", "b"])
    half = 1.96 * math.sqrt(0.8 * 0.2 / 1000)
    accuracy = scores.metrics["accuracy"]
    assert accuracy.low == pytest.approx(0.8 - half, abs=0.004)
    assert accuracy.high == pytest.approx(0.8 + half, abs=0.004)
    noisy, letters = noisy_labels(), list("abcde")
    first, again, other = (classification_scores(*noisy, letters, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("right", [False, True])
def test_rare_classes_do_not_push_the_value_out_of_its_interval(right):
    gold = np.arange(300) % 3
    predicted = np.where(np.arange(300) % 10 == 9, 0, gold)
    predicted[:30] = 3 + np.arange(30)  # thirty classes of one row each
    gold[:30] = predicted[:30] if right else gold[:30]
    scores = classification_scores(gold, predicted, [str(i) for i in range(33)])
    macro = scores.metrics["macro_f1"]
    assert macro.low < macro.value < macro.high


def test_paired_difference_sees_what_two_intervals_hide():
    gold = np.zeros(1000, int)
    first = (np.arange(1000) >= 720).astype(int)
    second = (np.arange(1000) >= 700).astype(int)
    accuracy = paired_difference(single_label, gold, first, second).metrics["accuracy"]
    assert accuracy.value == pytest.approx(0.02)
    assert accuracy.low > 0 and accuracy.p < 0.05
    apart = [classification_scores(gold, system, ["a", "b"]).metrics["accuracy"] for system in (first, second)]
    assert apart[0].low < apart[1].high
    same = paired_difference(single_label, gold, first, first).metrics["macro_f1"]
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_p_is_two_sided():
    gold, first, second = np.zeros(200, int), np.zeros(200, int), np.zeros(200, int)
    first[:9], second[9:24] = 1, 1  # 9 against 15 rows only one of them gets wrong
    p = paired_difference(single_label, gold, first, second).metrics["accuracy"].p
    assert p == pytest.approx(2 * stats.norm.sf(6 / math.sqrt(24)), abs=0.05)


def test_paired_difference_takes_every_statistic():
    rng = np.random.default_rng(4)
    gold = rng.normal(size=200)
    near, far = gold + 0.1 * rng.normal(size=200), gold + rng.normal(size=200)
    metric = paired_difference(regression, gold, near, far).metrics["spearman"]
    assert metric.value == pytest.approx(stats.spearmanr(gold, near)[0] - stats.spearmanr(gold, far)[0])
    assert metric.to_json().keys() == {"value", "low", "high", "p"}
    flags = (rng.random((100, 3)) < 0.5).astype(int)
    assert paired_difference(multi_label, flags, flags, 1 - flags).metrics["micro_f1"].value == 1


def test_constant_predictions_leave_the_correlation_undefined():
    scores = regression_scores([1.0, 2.0, 3.0], [0.1, 0.1, 0.1])
    assert scores.to_json()["pearson"] == {"value": None, "low": None, "high": None}
    assert value(scores, "spearman") is None and value(scores, "mae") == pytest.approx(1.9)
    assert any("predicted is constant" in note for note in scores.notes)
    assert "undefined" in scores.text()
    assert any("resamples, left out" in note for note in regression_scores([1, 1, 2], [1, 2, 3]).notes)


def test_one_row_has_values_and_no_interval():
    scores = classification_scores([1], [1], ["a", "b"])
    assert scores.to_json()["accuracy"] == {"value": 1.0, "low": None, "high": None}
    assert "one row: no interval" in scores.notes
    assert value(regression_scores([1.0], [2.0]), "pearson") is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: classification_scores([], [], ["a"]), "empty"),
        (lambda: multilabel_scores(np.zeros((0, 2)), np.zeros((0, 2)), ["a", "b"]), "empty"),
        (lambda: regression_scores([], []), "empty"),
        (lambda: perplexity_scores(0.0, 0), "empty"),
        (lambda: masked_accuracy(0, 0), "empty"),
        (lambda: paired_difference(single_label, [], [], []), "empty"),
        (lambda: classification_scores([0, 1], [0], ["a", "b"]), "2 gold rows but 1 predictions"),
        (lambda: classification_scores([0, 7], [0, 0], ["a", "b"]), "class id 7 in row 1"),
        (lambda: classification_scores([0.5], [0], ["a"]), "whole number"),
        (lambda: multilabel_scores([[2, 0]], [[0, 0]], ["a", "b"]), "0 or 1"),
        (lambda: regression_scores([1.0, math.nan], [1.0, 2.0]), "finite"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_the_reason(call, words):
    with pytest.raises(RonnaError, match=words):
        call()


def test_perplexity_and_bits_per_byte():
    scores = perplexity_scores(nll_sum_nats=1000 * math.log(16), tokens=1000, bytes=4000)
    assert value(scores, "loss") == pytest.approx(math.log(16))
    assert value(scores, "perplexity") == pytest.approx(16)
    assert value(scores, "bits_per_byte") == pytest.approx(1.0)
    assert "bits_per_byte" not in perplexity_scores(1.0, 1).metrics
    far = perplexity_scores(1e6, 10)
    assert value(far, "perplexity") is None and "beyond the range" in far.notes[0]
    assert value(perplexity_scores(math.nan, 10), "loss") is None


def test_masked_accuracy_of_many_tokens_is_quick():
    metric = masked_accuracy(700_000, 1_000_000).metrics["masked_accuracy"]
    assert metric.value == 0.7 and metric.high - metric.low == pytest.approx(0.0018, abs=4e-4)


def test_to_json_is_strict_and_details_hold_the_rest():
    scores = classification_scores(*noisy_labels(), list("abcde"))
    assert json.loads(json.dumps(scores.to_json(), allow_nan=False))["accuracy"].keys() == {
        "value",
        "low",
        "high",
    }
    details = json.loads(json.dumps(scores.details(), allow_nan=False))
    assert details["classes"][0].keys() == {"label", "precision", "recall", "f1", "support"}
    assert details["rows"] == 400 and "metrics" not in details


def test_25000_rows_take_seconds_not_minutes():
    start = time.process_time()
    x, noise = np.random.default_rng(0).normal(size=(2, 25_000))
    regression_scores(x, x + noise)
    classification_scores(*noisy_labels(25_000, 77), [str(i) for i in range(77)])
    assert time.process_time() - start < 6
