"""Extractive question answering: what is a question, how contexts are cut, what is learnt and answered."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from ronna.base.errors import RonnaError
from ronna.cli import main
from ronna.data.badrows import BadRow, BadRows
from ronna.data.sources import Record, read_records
from ronna.model.families import classifier_for, read_config
from ronna.model.folder import load_folder
from ronna.objectives.base import collate
from ronna.tasks.answers import best_of, cmrc_tokens, counting_of, exact, f1, longest_run, squad_tokens
from ronna.tasks.base import read_rows, unfolded
from ronna.tasks.schema import Columns
from ronna.tasks.span_qa import Answer, Example, Question, SpanQA, SpanQAConfig, unfold
from ronna.tasks.truncation import UNFIT
from ronna.text.tokenizer import load_tokenizer

COLUMNS = Columns("question", "context", "answers")
CONTEXT = "the film was good and the plot was bad with great acting"


def task(folder: Path, length: int = 64, optional: bool = False, **config) -> SpanQA:
    return SpanQA(SpanQAConfig(**config), load_tokenizer(folder), length, optional)


def record(**fields) -> Record:
    return Record(fields, Path("f"), 1)


def asked(answers, question: str = "was the film good", context: str = CONTEXT) -> Question:
    return SpanQA.row(record(question=question, context=context, answers=answers), COLUMNS)


# Questions


def test_questions_are_unfolded_from_every_layout():
    qa = {"id": "1", "question": "q", "answers": [{"text": "a", "answer_start": 0}]}
    paragraph = {"context": "a b", "qas": [qa, qa | {"id": "2"}]}
    article = {"title": "t", "paragraphs": [paragraph, paragraph]}
    assert len(list(unfold(record(version="1.1", data=[article, article])))) == 8
    assert [r.fields["id"] for r in unfold(record(**paragraph))] == ["1", "2"]
    one = next(unfold(record(**article)))
    assert one.fields == {"title": "t", "context": "a b", **qa}
    alone = record(**qa, context="a b")
    assert list(unfold(alone)) == [alone]


def test_each_question_is_a_row_of_the_account(tmp_path):
    good = {"question": "q", "answers": [{"text": "a", "answer_start": 0}]}
    bad_one = {"question": "q", "answers": [{"text": "a", "answer_start": 2}]}
    (tmp_path / "a.json").write_text(
        json.dumps({"data": [{"paragraphs": [{"context": "a b", "qas": [good, bad_one, 7]}]}]})
    )
    bad = BadRows(limit=5)
    records = unfolded(SpanQA, read_records(tmp_path / "a.json", bad=bad), bad)
    rows = list(read_rows(SpanQA, records, COLUMNS, bad))
    assert len(rows) == 1 and (bad.rows_in, bad.kept, bad.quarantined) == (3, 1, 2)
    assert set(bad.reasons) == {"wrong answer_start", "text is not a string"}


@pytest.mark.parametrize(
    "answers",
    [
        [{"text": "good", "answer_start": 13}],
        {"text": ["good"], "answer_start": [13]},
        {"text": "good", "answer_start": 13},
        "good",
        ["good"],
        [{"text": "good", "answer_start": -1}],
    ],
)
def test_answers_in_every_layout(answers):
    assert asked(answers).label == (Answer("good", 13),)


def test_no_answer_is_one_too():
    assert asked([]).label == () and asked({"text": [], "answer_start": []}).label == ()
    row = record(question="q", context="c", answers=[{"text": "c", "answer_start": 0}], is_impossible=True)
    assert SpanQA.row(row, COLUMNS).label == ()


BAD = {
    "answer not in the context": {"answers": "terrible"},
    "wrong answer_start": {"answers": [{"text": "good", "answer_start": 14}]},
    "answer is not a text": {"answers": [{"text": 5, "answer_start": 0}]},
    "answer is not a text ": {"answers": 5},
    "answers and their starts differ in number": {"answers": {"text": ["good"], "answer_start": []}},
    "text is not a string": {"question": None, "answers": []},
    "empty text": {"context": " ", "answers": []},
}


@pytest.mark.parametrize("reason", BAD)
def test_what_is_no_question_is_a_bad_row(reason):
    with pytest.raises(BadRow) as raised:
        SpanQA.row(record(**{"question": "q", "context": CONTEXT, **BAD[reason]}), COLUMNS)
    assert raised.value.reason == reason.strip()
    with pytest.raises(BadRow, match="no label"):
        SpanQA.row(record(question="q", context="c"), COLUMNS)


# Windows


def test_one_window_holds_a_short_context(tiny_bert):
    own = task(tiny_bert)
    [example] = own.encode([asked("good and the plot")])
    [window] = example.windows
    first, last = window.target
    assert CONTEXT[window.offsets[first, 0] : window.offsets[last, 1]] == "good and the plot"
    tokens = own.tokenizer
    assert window.tokens[0] == tokens.cls_id and int((window.tokens == tokens.sep_id).sum()) == 2
    assert window.segments.tolist() == sorted(window.segments.tolist()) and window.places[0] == 0
    words = [tokens.tokens[i] for i in window.tokens[window.places[first : last + 1]]]
    assert words == ["good", "and", "the", "plot"]


def test_windows_overlap_and_hold_every_token_and_the_answer_where_it_is_whole(tiny_bert):
    context = " ".join(f"the film was {w}" for w in ["good", "bad"] * 12) + " great acting"
    own = task(tiny_bert, length=32, overlap=8)
    account: dict[str, int] = {}
    [example] = own.encode([asked("great acting", context=context)], account)
    assert len(example.windows) > 3 and account == {"windowed": 1, "cut": 0, UNFIT: 0}
    assert all(len(w.tokens) <= 32 for w in example.windows)
    seen = np.unique(np.concatenate([w.offsets[1:, 0] for w in example.windows]))
    assert len(seen) == len(own.tokenizer.encode(context))
    for before, after in zip(example.windows, example.windows[1:], strict=False):
        shared = set(before.offsets[1:, 0].tolist()) & set(after.offsets[1:, 0].tolist())
        assert len(shared) >= 8
    whole = [w for w in example.windows if w.target != (0, 0)]
    assert len(whole) >= 1 and whole[-1] is example.windows[-1]
    items = own.items(example)
    assert [len(own.samples(item, np.random.default_rng(0))) for item in items] == [1] * len(example.windows)
    assert [item.windows[0] for item in items] == example.windows


def test_an_answer_longer_than_every_window_is_counted_and_not_learnt(tiny_bert):
    context = " ".join(["the film was good"] * 20)
    account: dict[str, int] = {}
    own = task(tiny_bert, length=32)
    [example] = own.encode([asked(context[:200].strip(), context=context)], account)
    assert account[UNFIT] == 1 and own.items(example) == []


def test_a_question_is_cut_and_too_little_room_refused(tiny_bert):
    long = asked("good", question="was the film good " * 10)
    [example] = task(tiny_bert, question=8).encode([long])
    assert int((example.windows[0].segments == 0).sum()) == 10
    with pytest.raises(RonnaError, match="no room for a context"):
        task(tiny_bert, length=12, question=40).encode([long])


# Scores and answers


def model_of(folder: Path):
    family, cfg = read_config(folder)
    return load_folder(folder, head=False, classifier=classifier_for(family, cfg, 2, "spans"), seed=1).model.eval()


def test_the_loss_is_two_cross_entropies_over_each_window(tiny_bert):
    own, model = task(tiny_bert, length=32, overlap=8), model_of(tiny_bert)
    context = " ".join(["the film was bad and"] * 8) + " good"
    examples = own.encode([asked("good"), asked("good", context=context), asked([])])
    samples = [s for e in examples for s in own.samples(e, np.random.default_rng(0))]
    batch = collate(own, samples)
    found = float(own.loss(model, batch).sums["span"].detach())
    expected = 0.0
    for sample in samples:
        one = collate(own, [sample])
        scores = model.scores(one.tokens, one.sequences, one.segments)[sample.predict]
        for k in (0, 1):
            expected -= float(scores[:, k].log_softmax(0)[sample.target[k]].detach()) / 2
    assert found == pytest.approx(expected, rel=1e-5)
    assert own.mean_loss(examples, own.infer(model, examples)) == pytest.approx(expected / len(samples), rel=1e-5)
    assert batch.counts == {"span": len(samples)}


def scored(own: SpanQA, example: Example, *chosen) -> list[np.ndarray]:
    """Scores that favour (window, start, end, how much)."""
    scores = [np.zeros((len(w.places), 2), np.float32) for w in example.windows]
    for window, start, end, height in chosen:
        scores[window][start, 0] += height
        scores[window][end, 1] += height
    return scores


def test_the_best_span_over_windows_or_none(tiny_bert):
    own = task(tiny_bert)
    [example] = own.encode([asked("good")])
    [answer] = own.decode([], [example], [scored(own, example, (0, 4, 4, 9.0))])
    assert (answer["answer"], answer["start"], answer["end"]) == ("good", 13, 17) and answer["probability"] > 0.99
    backwards = scored(own, example, (0, 6, 3, 9.0), (0, 1, 2, 5.0))
    assert own.best(example, backwards)["answer"] == "the film was"  # 5 + 9; an end before its start is no answer
    wide = scored(own, example, (0, 1, 9, 9.0), (0, 1, 2, 8.0))
    assert own.best(example, wide)["answer"].startswith("the film was good and")
    assert task(tiny_bert, answer=3).best(example, wide)["answer"] == "the film"
    nothing = scored(own, example, (0, 0, 0, 9.0), (0, 1, 2, 5.0))
    assert own.best(example, nothing)["answer"] == "the film"
    assert task(tiny_bert, optional=True).best(example, nothing)["answer"] == ""


def test_windows_compete(tiny_bert):
    own = task(tiny_bert, length=32, overlap=8, answer=4)
    context = " ".join(f"the film was {w}" for w in ["good", "bad"] * 12) + " great acting"
    [example] = own.encode([asked("great acting", context=context)])
    last = len(example.windows) - 1
    first, end = example.windows[last].target
    scores = scored(own, example, (0, 1, 1, 5.0), (last, first, end, 6.0))
    assert own.best(example, scores)["answer"] == "great acting"
    assert own.measure([example], [scores]).metrics["exact_match"].value == 1.0


# Counting


def test_squad_counts_words_without_articles_and_punctuation():
    assert squad_tokens("The  Eiffel-Tower, a tower!") == ["eiffeltower", "tower"]
    assert exact("the U.S.", "US", "squad") == 1.0 and exact("two", "2", "squad") == 0.0
    assert f1("in the year 1973", "1973", "squad") == pytest.approx(2 * (1 / 3) * 1 / (1 / 3 + 1))
    assert f1("a", "the", "squad") == 1.0 and f1("", "x", "squad") == 0.0
    assert best_of("1973", ["October 1973", "1973"], "squad") == (1.0, 1.0) and best_of("", [], "squad") == (1.0, 1.0)


def test_cmrc_counts_characters_in_the_longest_run():
    assert cmrc_tokens("《北京》 2008年 NBA!") == ["北", "京", "2008", "年", "nba"]
    assert exact("北京大学。", "北京大学", "cmrc") == 1.0
    assert longest_run("abcde", "xbcdy") == 3
    assert f1("在北京大学", "北京师范大学", "cmrc") == pytest.approx(2 * 2 / (5 + 6))
    assert f1("北京大学", "北京大学", "cmrc") == 1.0 and f1("上海", "北京", "cmrc") == 0.0
    assert counting_of(["北京", "中 a"]) == "cmrc" and counting_of(["a", "b 中", "c"]) == "squad"


# From the command line


@pytest.fixture(scope="module")
def quiz(tmp_path_factory) -> Path:
    """The word behind "great" answers every question; some contexts have none."""
    folder, rng = tmp_path_factory.mktemp("quiz"), random.Random(0)
    plain = ["the", "film", "was", "a", "plot", "with", "acting", "music", "bad"]
    for split, n in (("train", 300), ("validation", 40), ("test", 40)):
        paragraphs = []
        for i in range(n):
            words = rng.choices(plain, k=rng.randint(6, 14))
            at = rng.randrange(len(words) - 1)
            answers = []
            if i % 4:
                words[at] = "great"
                start = len(" ".join(words[: at + 1])) + 1
                answers = [{"text": words[at + 1], "answer_start": start}]
            context = f"{' '.join(words)} {split} {i}"
            paragraphs.append(
                {"context": context, "qas": [{"id": f"{split}{i}", "question": "what was good", "answers": answers}]}
            )
        (folder / f"{split}.json").write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    return folder


def test_span_qa_from_the_command_line(tiny_bert, quiz, tmp_path, capsys):
    out = tmp_path / "run"
    call = ["finetune", "--task", "span_qa", "--model", str(tiny_bert), "--train", str(quiz), "--out", str(out)]
    settings = ["--lr", "5e-3", "--epochs", "15", "--batch", "16", "--set", "model.dropout=0.0", "--precision", "fp32"]
    assert main([*call, *settings]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["task"] == "span_qa" and report["test"]["f1"]["value"] > 0.7
    assert report["data"]["rows_in"] == 300
    capsys.readouterr()
    use = ["--model", f"{out}/model", "--precision", "fp32"]
    assert main(["evaluate", *use, "--data", f"{quiz}/test.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"] == report["test"]
    line = {"question": "what was good", "context": "the film was a great plot with bad acting", "id": 9}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    assert main(["predict", *use, "--input", f"{tmp_path}/in.jsonl"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["id"] == 9 and set(said["prediction"]) >= {"answer", "probability"}
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(out / "model")
    assert type(model).__name__ == "BertForQuestionAnswering"
    (tmp_path / "bad.jsonl").write_text(json.dumps({"question": "what"}) + "\n")
    assert main(["predict", *use, "--input", f"{tmp_path}/bad.jsonl"]) == 2
    assert "no column looks like a context" in capsys.readouterr().err


def test_a_missing_column_is_called_by_what_it_is():
    with pytest.raises(RonnaError, match="looks like a question"):
        SpanQA.columns(record(title="t", context="c"), text=None, pair=None, label=None)


def test_training_rows_with_nothing_to_learn_are_refused(tiny_bert, tmp_path, capsys):
    context = " ".join(["the film was good"] * 20)
    long = context[:200].strip()
    rows = [{"question": "what", "context": f"{context} {i}", "answers": long} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    call = ["finetune", "--task", "span_qa", "--model", str(tiny_bert), "--train", f"{tmp_path}/train.jsonl"]
    assert main([*call, "--out", f"{tmp_path}/run", "--length", "32"]) == 2
    assert "no training row gives anything to learn" in capsys.readouterr().err
