"""Relations: what marks two entities, what the model reads of them, how they are scored."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ronna.base.errors import RonnaError
from ronna.cli import main
from ronna.data.badrows import BadRow
from ronna.data.sources import Record
from ronna.model.families import classifier_for, read_config
from ronna.model.folder import load_folder
from ronna.model.sequences import Sequences
from ronna.tasks.metrics import relation_scores
from ronna.tasks.relation import Relation, RelationConfig, choose_markers, nearest, unmarked
from ronna.tasks.schema import Columns
from ronna.text.tokenizer import load_tokenizer

COLUMNS = Columns("text", None, "label")


def task(folder: Path, length: int = 32, **config) -> Relation:
    tokenizer = load_tokenizer(folder)
    labels = ["Made(e1,e2)", "Made(e2,e1)", "Other"]
    return Relation(RelationConfig(**config), tokenizer, labels, length, choose_markers(tokenizer))


def record(**fields) -> Record:
    return Record(fields, Path("f"), 1)


@pytest.mark.parametrize(
    ("text", "plain", "entities"),
    [
        ("The <e1> film </e1> by <e2> him </e2> .", "The film by him .", ("film", "him")),
        ("<e2>A b</e2>, (<e1>c</e1>)", "A b, (c)", ("c", "A b")),
        ("在<e1>北京</e1>的<e2>大学</e2>", "在北京的大学", ("北京", "大学")),
        ("<e1>new <e2>york</e2> times</e1>", "new york times", ("new york times", "york")),
    ],
)
def test_marks_are_taken_out_and_remembered(text, plain, entities):
    pair = unmarked(text)
    assert pair.text == plain
    assert tuple(pair.text[a:b] for a, b in (pair.first, pair.second)) == entities


BAD = {
    "not two marked entities": {"text": "a <e1>b</e1> c", "label": "x"},
    "not two marked entities ": {"text": "a b", "label": "x"},
    "entity marked twice": {"text": "<e1>a</e1> <e1>b</e1> <e2>c</e2>", "label": "x"},
    "an entity has no text": {"text": "a <e1> </e1> <e2>c</e2>", "label": "x"},
    "an entity has no text ": {"text": "</e1>a<e1> <e2>c</e2>", "label": "x"},
    "no label": {"text": "<e1>a</e1> <e2>c</e2>", "label": ""},
    "empty text": {"text": " ", "label": "x"},
    "text is not a string": {"text": 3, "label": "x"},
    "entity outside its text": {"text": "abc", "label": "x", "head": [0, 9], "tail": [1, 2]},
    "entity outside its text ": {"text": "abc", "label": "x", "e1": {"start": 2, "end": 1}, "e2": [1, 2]},
    "entity without start and end": {"text": "abc", "label": "x", "h": {"start": 2}, "t": [1, 2]},
}


@pytest.mark.parametrize("reason", BAD)
def test_what_is_no_pair_is_a_bad_row(reason):
    with pytest.raises(BadRow) as raised:
        Relation.row(record(**BAD[reason]), COLUMNS)
    assert raised.value.reason == reason.strip()


def test_offsets_do_as_well_as_marks():
    marked = Relation.row(record(text="the <e1>film</e1> by <e2>him</e2>", label="x"), COLUMNS)
    for fields in ({"e1": [4, 8], "e2": [12, 15]}, {"head": {"start": 4, "end": 8}, "tail": {"pos": [12, 15]}}):
        assert Relation.row(record(text="the film by him", label="x", **fields), COLUMNS) == marked


def test_what_the_model_reads(marked_bert):
    own = task(marked_bert)
    tokenizer = own.tokenizer
    assert own.markers == ("@", "#")
    pairs = own.rows(["the <e1>film</e1> was <e2>good</e2>", "<e2>bad @ plot</e2><e1>acting</e1>"], None)
    first, second = own.encode(pairs)
    assert tokenizer.decode(first.tokens, skip_special=False) == "[CLS] the @ film @ was # good # [SEP]"
    assert tokenizer.decode(second.tokens, skip_special=False) == "[CLS] # bad @ plot # @ acting @ [SEP]"
    for example in (first, second):
        assert [tokenizer.tokens[example.tokens[p]] for p in example.places] == ["@", "#"]
    assert second.places.tolist() == [6, 1]  # not the @ that the entity itself has


def test_what_is_far_from_both_is_cut_and_counted_or_refused(marked_bert):
    text = "the " * 40 + "<e1>film</e1> was " + "a " * 30 + "<e2>good</e2> " + "music " * 40
    account: dict[str, int] = {}
    [example] = task(marked_bert).encode(task(marked_bert).rows([text], None), account)
    assert account == {"cut": 1} and len(example.tokens) == 32
    kept = task(marked_bert).tokenizer.decode(example.tokens[1:-1])
    assert "@ film @ was a" in kept and "a # good # music" in kept
    assert [task(marked_bert).tokenizer.tokens[example.tokens[p]] for p in example.places] == ["@", "#"]
    with pytest.raises(RonnaError, match="1 rows are too long for 32 tokens"):
        task(marked_bert, truncation="refuse").encode(task(marked_bert).rows([text], None))
    ids, places = nearest(np.arange(10), np.array([1, 8]), 4)
    assert ids.tolist() == [0, 1, 2, 8]
    assert ids[places].tolist() == [1, 8]


def test_scores_are_made_of_the_states_at_both_openings(marked_bert):
    family, cfg = read_config(marked_bert)
    classifier = classifier_for(family, cfg, 3, "pair")
    model = load_folder(marked_bert, head=False, classifier=classifier, seed=1).model.eval()
    assert model.cfg.params() == sum(p.numel() for p in model.parameters())
    own = task(marked_bert)
    examples = own.encode(own.rows(["the <e1>film</e1> was <e2>good</e2>", "<e2>bad</e2> a <e1>plot</e1>"], None))
    scores = own.infer(model, examples)
    for example, row in zip(examples, scores, strict=True):
        tokens = torch.from_numpy(example.tokens.astype(np.int64))
        states = model.hidden(tokens, Sequences.of([len(tokens)]))[example.places].flatten()
        torch.testing.assert_close(torch.from_numpy(row), model.classifier.out(states).detach(), atol=1e-5, rtol=1e-4)
    tokens, sequences = torch.arange(24) % 9, Sequences.of([8, 8, 8])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.scores(tokens, sequences, at=torch.tensor([1, 5, 9, 14, 22, 17]))
    assert model.cfg.flops(3, 8) == counter.get_total_flops()


def test_macro_f1_is_the_task_s_by_hand():
    """Two relations, both ways, and Other. By hand from the definition of the shared task's scorer."""
    labels = ["A(e1,e2)", "A(e2,e1)", "B(e1,e2)", "B(e2,e1)", "Other"]
    gold = ["A(e1,e2)", "A(e1,e2)", "A(e2,e1)", "B(e1,e2)", "B(e2,e1)", "Other", "Other"]
    said = ["A(e1,e2)", "A(e2,e1)", "A(e2,e1)", "Other", "B(e2,e1)", "B(e1,e2)", "Other"]
    scores = relation_scores([labels.index(x) for x in gold], [labels.index(x) for x in said], labels)
    # A: 2 right (one the wrong way round), 3 predicted, 3 there. B: 1 right, 2 predicted, 2 there. Other: no class.
    a, b = 2 / 3, 1 / 2
    assert scores.metrics["macro_f1"].value == pytest.approx((a + b) / 2)
    assert scores.metrics["f1"].value == pytest.approx(2 * 3 / (5 + 5))
    assert scores.metrics["accuracy"].value == pytest.approx(4 / 7)
    assert [row.label for row in scores.classes] == ["A", "B"]


def test_no_direction_and_no_other_is_a_plain_macro_f1():
    scores = relation_scores([0, 0, 1, 1], [0, 1, 1, 1], ["born_in", "works_for"])
    assert scores.metrics["macro_f1"].value == pytest.approx((2 / 3 + 4 / 5) / 2)


def test_a_vocabulary_without_marks_is_refused(tiny_bert):
    with pytest.raises(RonnaError, match="vocabulary has no two"):
        choose_markers(load_tokenizer(tiny_bert))


def test_relation_from_the_command_line(marked_bert, tmp_path, capsys):
    rng = random.Random(0)
    for split, n in (("train", 240), ("validation", 40), ("test", 40)):
        rows = []
        for i in range(n):
            verb = ["made", "by", "in"][i % 3]
            a, b = rng.sample(["film", "plot", "music", "acting"], 2)
            text = f"the <e1>{a}</e1> {verb} the <e2>{b}</e2> {split} {i}"
            rows.append({"text": text, "label": ["Made(e1,e2)", "Made(e2,e1)", "Other"][i % 3]})
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    out = tmp_path / "run"
    call = ["finetune", "--task", "relation", "--model", str(marked_bert), "--train", str(tmp_path), "--out", str(out)]
    settings = ["--lr", "3e-3", "--epochs", "6", "--batch", "16", "--set", "model.dropout=0.0", "--length", "32"]
    assert main([*call, *settings, "--precision", "fp32"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["task"] == "relation" and report["test"]["macro_f1"]["value"] > 0.95
    capsys.readouterr()
    use = ["--model", f"{out}/model", "--precision", "fp32"]
    assert main(["evaluate", *use, "--data", f"{tmp_path}/test.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"] == report["test"]
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "a <e1>plot</e1> by a <e2>film</e2>"}) + "\n")
    assert main(["predict", *use, "--input", f"{tmp_path}/in.jsonl"]) == 0
    answer = json.loads(capsys.readouterr().out)["prediction"]
    assert answer["relation"] == "Made(e2,e1)" and answer["e1"] == {"text": "plot", "start": 2, "end": 6}
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": "a plot by a film"}) + "\n")
    assert main(["predict", *use, "--input", f"{tmp_path}/bad.jsonl"]) == 2
    assert "not two marked entities" in capsys.readouterr().err
