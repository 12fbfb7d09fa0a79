"""Classification: what counts as a label, what fits, what is learnt, what comes back."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ronna.base.errors import RonnaError
from ronna.data.badrows import BadRow, BadRows
from ronna.data.sources import Record
from ronna.model.config import Classifier
from ronna.model.folder import load_folder
from ronna.peft.methods import adapt
from ronna.peft.prompt import PromptConfig
from ronna.tasks.base import like_lengths, read_rows
from ronna.tasks.classify import (
    Classify,
    ClassifyConfig,
    Example,
    Row,
    collect_labels,
    detect_problem,
)
from ronna.tasks.encoding import fit
from ronna.tasks.labels import usable_label
from ronna.tasks.schema import Columns, find_columns, overlap
from ronna.text.tokenizer import load_tokenizer


def task(folder: Path, problem: str = "single", labels: tuple[str, ...] = ("bad", "good"), **config) -> Classify:
    return Classify(ClassifyConfig(**config), load_tokenizer(folder), problem, list(labels), length=16)


@pytest.mark.parametrize(
    ("labels", "problem", "names"),
    [
        ([1, 0, 2, 10], "single", ["0", "1", "2", "10"]),
        (["pos", "neg"], "single", ["neg", "pos"]),
        ([1.0, 0.0], "single", ["0", "1"]),
        ([1.5, 0.0], "regression", ["score"]),
        ([["a", "b"], []], "multi", ["a", "b"]),
        (["1", "0"], "single", ["0", "1"]),
        (["2", "10", "-1"], "single", ["-1", "2", "10"]),
        (["--1", "²"], "single", ["--1", "²"]),
        ([["b"], "a"], "multi", ["a", "b"]),
    ],
)
def test_problem_and_label_names(labels, problem, names):
    assert detect_problem(labels) == problem
    assert collect_labels(labels, detect_problem(labels)) == names


@pytest.mark.parametrize("label", [None, "", float("nan"), float("inf"), {"a": 1}, ["a", None], [["a"]]])
def test_unusable_labels_are_bad_rows(label):
    with pytest.raises(BadRow):
        usable_label(label, "label")


def test_rows_are_kept_or_set_aside():
    bad = BadRows(limit=10)
    fields = [{"t": "good", "l": 1}, {"t": None, "l": 1}, {"t": " ", "l": 0}, {"t": "x", "l": None}, {"t": 3, "l": 1}]
    records = [Record(f, Path("f"), i) for i, f in enumerate(fields, 1)]
    bad.rows_in = len(records)
    assert list(read_rows(Classify, records, Columns("t", None, "l"), bad)) == [Row("good", None, 1)]
    assert bad.kept == 1 and bad.quarantined == 4
    assert set(bad.reasons) == {"text is not a string", "empty text", "no label"}


def test_one_id_with_two_labels_is_a_bad_row():
    bad = BadRows(limit=1)
    fields = [{"id": 7, "t": "a", "l": 1}, {"id": 7, "t": "a", "l": 0}, {"id": 7, "t": "a", "l": 1}]
    records = [Record(f, Path("f"), i) for i, f in enumerate(fields, 1)]
    bad.rows_in = len(records)
    assert [r.label for r in read_rows(Classify, records, Columns("t", None, "l"), bad)] == [1, 1]
    assert bad.places["same id, two labels"] == ["f:2"]


def test_unknown_labels_are_refused_by_name(tiny_bert):
    with pytest.raises(RonnaError, match="label 'ugly' is not among the 2 labels"):
        task(tiny_bert).check_labels([Row("a", None, "ugly")], "test.csv")


@pytest.mark.parametrize("score", ["good", "nan", 10**400, 1e308, [0.5], True])
def test_scores_that_are_no_numbers_are_refused(tiny_bert, score):
    scored = task(tiny_bert, "regression", ("score",))
    scored.check_labels([Row("a", None, "0.5"), Row("a", None, 2)], "file")
    assert [float(scored.target(label)) for label in ("0.5", 2)] == [0.5, 2]
    with pytest.raises(RonnaError, match=r"file: score .* is not a number"):
        scored.check_labels([Row("a", None, 0.5), Row("a", None, score)], "file")


def test_a_label_alone_is_one_of_several_and_several_are_none_alone(tiny_bert):
    several = task(tiny_bert, "multi", ("bad", "good", "7"))
    several.check_labels([Row("a", None, "good"), Row("a", None, 7)], "file")
    assert [several.target(label).tolist() for label in ("good", 7, ["bad", "7"], [])] == [
        [0, 1, 0], [0, 0, 1], [1, 0, 1], [0, 0, 0],
    ]  # fmt: skip
    with pytest.raises(RonnaError, match="where one label is asked for"):
        task(tiny_bert).check_labels([Row("a", None, ["good", "bad"])], "file")
    with pytest.raises(RonnaError, match="where one label is asked for"):
        config = ClassifyConfig(problem="single", class_weights="balanced")
        Classify.learn(config, [Row("a", None, ["good"])], load_tokenizer(tiny_bert), 16)
    with pytest.raises(RonnaError, match="no training row has a label"):
        Classify.learn(ClassifyConfig(), [Row("a", None, [])], load_tokenizer(tiny_bert), 16)


@pytest.mark.parametrize("lengths", [(30, 4), (4, 30), (20, 20), (5, None), (40, None)])
def test_truncation_cuts_the_longer_text_and_keeps_special_tokens(tiny_bert, lengths):
    tokenizer = load_tokenizer(tiny_bert)
    a, b = ("good " * lengths[0]).strip(), None if lengths[1] is None else ["bad " * lengths[1]]
    [whole] = tokenizer.encode_with_offsets([a], b)
    row = fit(whole, 16)
    if len(whole.ids) <= 16:
        assert not row.truncated and row.ids.tolist() == whole.ids.tolist()
        return
    assert row.truncated and len(row.ids) == 16
    assert int((row.ids == tokenizer.sep_id).sum()) == (1 if b is None else 2)
    assert row.ids[0] == tokenizer.cls_id and row.ids[-1] == tokenizer.sep_id
    if b is not None:
        first = int((row.segments == 0).sum()) - 2
        second = int((row.segments == 1).sum()) - 1
        assert abs(first - second) <= 1 or min(first, second) == min(lengths)


def test_what_is_cut_is_counted_or_refused(tiny_bert):
    account: dict[str, int] = {}
    rows = [Row("good " * 40, None, "good"), Row("bad", None, "bad")]
    examples = task(tiny_bert).encode(rows, account)
    assert account == {"cut": 1} and len(examples[0].tokens) == 16 and examples[1].target == 0
    with pytest.raises(RonnaError, match=r"1 rows are too long for 16 tokens .* the first is row 1"):
        task(tiny_bert, truncation="refuse").encode(rows)


def test_losses_are_the_usual_ones(tiny_bert):
    torch.manual_seed(0)
    scores = torch.randn(4, 3)
    names = ("a", "b", "c")
    classes, flags, numbers = torch.tensor([0, 2, 1, 1]), torch.randint(2, (4, 3)).float(), torch.randn(4)
    single = task(tiny_bert, "single", names).criterion(scores, classes)
    multi = task(tiny_bert, "multi", names).criterion(scores, flags)
    regression = task(tiny_bert, "regression", ("score",)).criterion(scores[:, :1], numbers)
    torch.testing.assert_close(single, torch.nn.functional.cross_entropy(scores, classes) * 4)
    torch.testing.assert_close(multi, torch.nn.functional.binary_cross_entropy_with_logits(scores, flags) * 4)
    torch.testing.assert_close(regression, ((scores[:, 0] - numbers) ** 2).sum())


def test_balanced_classes_weigh_the_same(tiny_bert):
    def learnt(labels, **config):
        rows = [Row("a", None, label) for label in labels]
        return Classify.learn(ClassifyConfig(**config), rows, load_tokenizer(tiny_bert), 16)

    labels = ["bad", "bad", "bad", "good"]
    weighed = learnt(labels, class_weights="balanced")
    assert weighed.weights.tolist() == pytest.approx([4 / 6, 2.0]) and learnt(labels).weights is None
    scores, gold = torch.zeros(4, 2), torch.tensor([0, 0, 0, 1])
    assert float(weighed.criterion(scores, gold)) == pytest.approx(4 * np.log(2))  # 2 log 2 for each class
    multi = learnt([["a"], [], [], ["a", "b"]], class_weights="balanced")
    assert multi.weights.tolist() == [1.0, 3.0]
    with pytest.raises(RonnaError, match="no classes to weigh"):
        learnt([0.5, 1.0], focal=1.0)


@pytest.mark.parametrize("problem", ["single", "multi"])
def test_the_focal_loss_is_its_formula(tiny_bert, problem):
    torch.manual_seed(0)
    scores = torch.randn(6, 2, requires_grad=True)
    gold = torch.tensor([0, 1, 1, 0, 1, 1]) if problem == "single" else torch.randint(2, (6, 2)).float()
    if problem == "single":
        p = scores.softmax(-1)[range(6), gold]
        expected = ((1 - p) ** 2 * -p.log()).sum()
    else:
        p = torch.where(gold > 0, scores.sigmoid(), 1 - scores.sigmoid())
        expected = ((1 - p) ** 2 * -p.log()).mean(-1).sum()
    found = task(tiny_bert, problem, focal=2.0).criterion(scores, gold)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert scores.grad.isfinite().all()
    certain = torch.tensor([[300.0, -300.0]], requires_grad=True)
    right = torch.tensor([0]) if problem == "single" else torch.tensor([[1.0, 0.0]])
    task(tiny_bert, problem, focal=0.5).criterion(certain, right).backward()
    assert certain.grad.isfinite().all()


def test_decoding(tiny_bert):
    scores = np.array([[2.0, 0.0], [-1.0, 3.0]], dtype=np.float32)
    rows = [Row("a", None, None)] * 2
    single = task(tiny_bert).decode(rows, [], scores)
    assert [a["label"] for a in single] == ["bad", "good"]
    assert single[0]["probability"] == pytest.approx(1 / (1 + np.exp(-2)), abs=1e-6)
    multi = task(tiny_bert, "multi", threshold=0.9).decode(rows, [], scores)
    assert [a["labels"] for a in multi] == [[], ["good"]]
    regression = task(tiny_bert, "regression", ("score",)).decode(rows, [], scores[:, :1])
    assert regression == [{"score": 2.0}, {"score": -1.0}]


def test_the_threshold_is_used_in_scores_too(tiny_bert):
    examples = [Example(np.array([2]), np.array([0]), np.array([1.0, 0.0], dtype=np.float32))]
    scores = np.array([[1.0, -3.0]], dtype=np.float32)
    low, high = (task(tiny_bert, "multi", threshold=t).measure(examples, scores) for t in (0.5, 0.9))
    assert low.metrics["micro_f1"].value == 1.0 and high.metrics["micro_f1"].value == 0.0


def test_like_lengths_hold_every_index_once():
    lengths = [5, 100, 3, 50, 50, 7]
    batches = list(like_lengths(lengths, 100))
    assert sorted(i for b in batches for i in b) == list(range(6))
    assert all(sum(lengths[i] for i in b) <= 100 for b in batches)
    assert (
        max(map(len, like_lengths([5] * 30, 100))) == 20 and max(map(len, like_lengths([5] * 30, 100, ahead=5))) == 10
    )


def test_virtual_tokens_count_in_a_batch(tiny_bert, monkeypatch):
    own = task(tiny_bert, "single")
    model = load_folder(tiny_bert, classifier=Classifier(2)).model
    adapt(model, PromptConfig(tokens=10), seed=0)
    sizes = []
    monkeypatch.setattr(
        model, "scores", lambda *a, scores=model.scores, **k: sizes.append(len(a[1])) or scores(*a, **k)
    )
    examples = [Example(np.array([2, 5, 6, 7, 3]), np.zeros(5, np.int64), None)] * 12
    own.reading(60).infer(model, examples)
    assert sizes == [4, 4, 4]


def test_columns_are_guessed_named_or_refused():
    record = Record({"sentence1": "a", "sentence2": "b", "score": 1.0}, Path("f"), 1)
    assert find_columns(record, text=None, pair=None, label=None) == Columns("sentence1", "sentence2", "score")
    assert find_columns(record, text="sentence2", pair=None, label=None) == Columns("sentence2", None, "score")
    with pytest.raises(RonnaError, match="did you mean 'sentence1'"):
        find_columns(record, text="sentnce1", pair=None, label=None)
    with pytest.raises(RonnaError, match=r"--set data\.label=COLUMN"):
        find_columns(Record({"text": "a", "y": 1}, Path("f"), 1), text=None, pair=None, label=None)


def test_overlap_counts_distinct_texts():
    assert overlap({"train": ["a", "b", "b"], "test": ["b", "c"], "validation": ["d"]}) == {"train/test": 1}
