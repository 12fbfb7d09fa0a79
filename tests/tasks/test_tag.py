"""Named entities: which records are sentences, how long ones are cut, what is learnt and what comes back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ronna.base.errors import RonnaError
from ronna.data.badrows import BadRow, BadRows
from ronna.data.sources import Record, read_records
from ronna.model.families import classifier_for, read_config
from ronna.model.folder import load_folder
from ronna.objectives.base import Sample, collate
from ronna.tasks.base import read_rows
from ronna.tasks.schema import Columns
from ronna.tasks.tag import Tag, TagConfig, WordScores, windows
from ronna.tasks.tags import Span, tag_names
from ronna.tasks.words import joined, read_sentence, words_of
from ronna.text.tokenizer import load_tokenizer

TOKENS, TEXT = Columns("tokens", None, "tags"), Columns("text", None, "entities")


def task(folder: Path, types=("LOC", "PER"), length=16, **config) -> Tag:
    own = TagConfig(**config)
    return Tag(own, load_tokenizer(folder), tag_names(types, own.scheme), length)


def record(**fields) -> Record:
    return Record(fields, Path("f.jsonl"), 3)


# Words and entities


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Phil Simmons, the all-rounder.", ["Phil", "Simmons", ",", "the", "all-rounder", "."]),
        ('"Oh!" (he said)', ['"', "Oh", "!", '"', "(", "he", "said", ")"]),
        ("在北京大学 2024年 used iPhone。", ["在", "北", "京", "大", "学", "2024", "年", "used", "iPhone", "。"]),
        ("$5.30 and 3°C -- e.g. U.S.", ["$5.30", "and", "3°C", "-", "-", "e.g", ".", "U.S", "."]),
        (" \t\n", []),
        ("𠀀𠀁a", ["𠀀", "𠀁", "a"]),
    ],
)
def test_words_of_a_text(text, words):
    assert [text[a:b] for a, b in words_of(text)] == words


@given(st.text(max_size=40))
def test_words_hold_every_character_but_spaces_once(text):
    extents = list(words_of(text))
    assert "".join(text[a:b] for a, b in extents) == "".join(text.split())
    assert all(a < b for a, b in extents) and extents == sorted(extents)


def test_words_are_joined_as_their_script_does_it():
    assert joined(["The", "U.S.", "won"]).text == "The U.S. won"
    assert joined(["北", "京", "1", "日"]).text == "北京1日"
    sentence = joined(["a", "bc"])
    assert [sentence.text[a:b] for a, b in sentence.words] == ["a", "bc"]
    assert joined([]).words == ()


def test_words_with_tags():
    sentence = read_sentence(record(tokens=["Phil", "S", "won"], tags=["B-PER", "I-PER", "O"]), TOKENS)
    assert sentence.label == (Span(0, 2, "PER"),) and sentence.given
    assert read_sentence(record(tokens="Phil S won", tags="B-PER I-PER O"), TOKENS) == sentence
    assert read_sentence(record(tokens=[], tags=[]), TOKENS).label == ()
    assert read_sentence(record(tokens=["a"], tags=["I-PER"]), TOKENS).repaired == 1


@pytest.mark.parametrize(
    "entities",
    [
        [{"start": 0, "end": 4, "label": "PER"}, {"start": 8, "end": 10, "type": "LOC", "text": "in"}],
        [[8, 10, "LOC"], [0, 4, "PER"]],
        {"PER": {"Phil": [[0, 3]]}, "LOC": {"in": [[8, 9]]}},
    ],
)
def test_a_text_with_entities_by_characters(entities):
    text = "Phil is in."
    sentence = read_sentence(record(text=text, entities=entities), TEXT)
    found = [(text[sentence.words[s.start][0] : sentence.words[s.end - 1][1]], s.type) for s in sentence.label]
    assert found == [("Phil", "PER"), ("in", "LOC")]


def test_words_are_cut_where_an_entity_ends():
    sentence = read_sentence(record(text="anti-Paris mood", entities=[[5, 10, "LOC"]]), TEXT)
    assert [sentence.text[a:b] for a, b in sentence.words] == ["anti-", "Paris", "mood"]
    assert sentence.label == (Span(1, 2, "LOC"),)


BAD = {
    "words and tags differ in number": {"tokens": ["a", "b"], "tags": ["O"]},
    "no label": {"tokens": ["a"], "tags": None},
    "a word is empty or not a string": {"tokens": ["a", None], "tags": ["O", "O"]},
    "neither words nor a text": {"tokens": 5, "tags": ["O"]},
    "empty text": {"tokens": " ", "tags": []},
    "entity outside its text": {"tokens": "abc", "tags": [[1, 9, "A"]]},
    "entity outside its text ": {"tokens": "abc", "tags": [[-1, 2, "A"]]},
    "entity outside its text  ": {"tokens": "abc", "tags": [[2, 1, "A"]]},
    "entities overlap": {"tokens": "abc", "tags": [[0, 2, "A"], [1, 3, "B"]]},
    "entity without a word": {"tokens": "a b", "tags": [[1, 2, "A"]]},
    "entity is not what its place says": {"tokens": "abc", "tags": [{"start": 0, "end": 1, "label": "A", "text": "b"}]},
    "entity without start, end and label": {"tokens": "abc", "tags": [{"start": 0, "end": 1}]},
    "entity without start, end and label ": {"tokens": "abc", "tags": 7},
    "entity without start, end and label  ": {"tokens": "abc", "tags": {"A": [1]}},
    "entity without start, end and label   ": {"tokens": "abc", "tags": {"A": {"a": [["x", "y"]]}}},
}


@pytest.mark.parametrize("reason", BAD)
def test_what_is_no_sentence_is_a_bad_row(reason):
    with pytest.raises(BadRow) as raised:
        read_sentence(record(**BAD[reason]), TOKENS)
    assert raised.value.reason == reason.strip()


def test_tags_of_no_scheme_are_refused_with_their_place():
    with pytest.raises(RonnaError, match="tag 'PER' is neither") as raised:
        read_sentence(record(tokens=["a"], tags=["PER"]), TOKENS)
    assert raised.value.where == "f.jsonl:3"


def test_conll_files(tmp_path):
    text = "-DOCSTART- -X- O O\n\nEU NNP B-ORG\nrejects VBZ O\n# . O\n\n\n# a remark\nPeter NNP B-PER\n\nno-tag\nx O\n"
    for name in ("a.conll", "a.txt"):
        (tmp_path / name).write_text(text.replace("no-tag", "a-tag O") if name == "a.txt" else text)
    bad = BadRows(limit=1)
    records = read_records(tmp_path / "a.conll", bad=bad)
    rows = list(read_rows(Tag, records, TOKENS, bad))
    assert [r.text for r in rows] == ["EU rejects #", "Peter"]
    assert [r.label for r in rows] == [(Span(0, 1, "ORG"),), (Span(0, 1, "PER"),)]
    assert bad.places == {"a word without a tag": [f"{tmp_path}/a.conll:11"]} and bad.kept == 2
    assert len(list(read_records(tmp_path / "a.txt", bad=BadRows()))) == 3  # known by its content
    (tmp_path / "plain.txt").write_text("So it is O\nAnd B-52 flew\n")
    assert next(r.fields for r in read_records(tmp_path / "plain.txt", bad=BadRows())) == {"text": "So it is O"}


# Windows


@given(st.lists(st.integers(1, 9), min_size=1, max_size=60), st.integers(4, 20))
def test_windows_hold_every_word_once_with_something_around_it(sizes, room):
    first = np.cumsum([0, *sizes[:-1]])
    total = sum(sizes)
    seen = []
    for start, end, own in windows(first, total, room):
        assert 0 < end - start <= room and end <= total
        words = list(range(*own.indices(len(sizes))))
        assert all(start <= first[w] < end for w in words)
        if end < total and len(words) and own.stop < len(sizes):  # neighbours show what stands around their border
            assert first[own.stop] >= start
        seen += words
    assert seen == list(range(len(sizes)))
    if total <= room:
        assert len(list(windows(first, total, room))) == 1


def test_a_long_sentence_is_windowed_and_counted_or_refused(tiny_bert):
    words = ["good", "bad", "film"] * 15
    rows = [Tag.row(record(tokens=words, tags=["B-PER", "O", "O"] * 15), TOKENS)]
    account: dict[str, int] = {}
    [example] = task(tiny_bert).encode(rows, account)
    assert account["windowed"] == 1 and len(example.pieces) > 3
    order = [w for p in example.pieces for w in p.words]
    assert sorted(order) == list(range(45))
    tokenizer = load_tokenizer(tiny_bert)
    for piece in example.pieces:
        assert len(piece.tokens) <= 16
        assert piece.tokens[0] == tokenizer.cls_id and piece.tokens[-1] == tokenizer.sep_id
        assert [tokenizer.tokens[i] for i in piece.tokens[piece.places]] == [words[w] for w in piece.words]
    samples = task(tiny_bert).samples(example, np.random.default_rng(0))
    assert np.concatenate([s.labels for s in samples]).tolist() == example.target[order].tolist()
    with pytest.raises(RonnaError, match=r"1 rows are too long for 16 tokens .* the first is row 1"):
        task(tiny_bert, truncation="refuse").encode(rows)


# Scores and answers


def tagger(folder: Path):
    family, cfg = read_config(folder)
    return load_folder(folder, head=False, classifier=classifier_for(family, cfg, 5, "tokens"), seed=1).model.eval()


def test_scores_are_those_of_each_words_first_token(tiny_bert):
    model, own = tagger(tiny_bert), task(tiny_bert, length=64)
    texts = ["the film xyzzy was good", "good", "\u200b bad"]
    rows = own.rows(texts, None)
    scores = own.infer(model, own.encode(rows)).words
    assert [len(s) for s in scores] == [5, 1, 2]
    tokenizer = load_tokenizer(tiny_bert)
    [whole] = tokenizer.encode_with_offsets(texts[:1])
    batch = collate(own, [Sample(whole.ids)])
    direct = torch.log_softmax(model.scores(batch.tokens, batch.sequences), -1).detach().numpy()
    firsts = [next(i for i in range(1, len(direct)) if whole.offsets[i, 0] == a) for a, _ in rows[0].words]
    np.testing.assert_allclose(scores[0], direct[firsts], atol=1e-5)


def test_answers_say_where_entities_stand(tiny_bert):
    own = task(tiny_bert)
    sure = np.full((3, 5), -10.0, np.float32)
    sure[[0, 1, 2], [3, 4, 0]] = -0.1  # B-PER I-PER O
    [by_text], [by_words] = own.rows(["Phil S won"], None), own.rows([["Phil", "S", "won"]], None)
    said = {"type": "PER", "text": "Phil S", "probability": pytest.approx(np.exp(-0.1), abs=1e-6)}
    assert own.decode([by_text], [], WordScores([sure])) == [{"entities": [said | {"start": 0, "end": 6}]}]
    assert own.decode([by_words], [], WordScores([sure])) == [
        {"entities": [said | {"words": [0, 2]}], "tags": ["B-PER", "I-PER", "O"]}
    ]
    illegal = np.full((1, 5), -10.0, np.float32)
    illegal[0, 4] = -0.1  # I-PER alone
    assert own.decode(own.rows([["Phil"]], None), [], WordScores([illegal]))[0]["tags"] != ["I-PER"]


def test_the_loss_is_a_cross_entropy_over_words(tiny_bert):
    model, own = tagger(tiny_bert), task(tiny_bert, length=64)
    pairs = (("good film", "B-PER O"), ("a", "O"))
    rows = [Tag.row(record(tokens=w.split(), tags=t.split()), TOKENS) for w, t in pairs]
    examples = own.encode(rows)
    samples = [s for e in examples for s in own.samples(e, np.random.default_rng(0))]
    batch = collate(own, samples)
    assert batch.counts == {"tag": 3}
    loss = float(own.loss(model, batch).sums["tag"].detach())
    assert own.mean_loss(examples, own.infer(model, examples)) == pytest.approx(loss / 3, rel=1e-5)


def test_types_only_in_evaluation_and_no_entity_at_all_are_refused(tiny_bert):
    own = task(tiny_bert)
    row = Tag.row(record(tokens=["a"], tags=["B-ORG"]), TOKENS)
    with pytest.raises(RonnaError, match="'ORG' is not among those"):
        own.check_labels([row], "test.conll")
    nothing = Tag.row(record(tokens=["a"], tags=["O"]), TOKENS)
    with pytest.raises(RonnaError, match="no entity"):
        Tag.learn(TagConfig(), [nothing], load_tokenizer(tiny_bert), 16)


def test_a_folder_of_other_labels_is_read_or_refused(tiny_bert):
    tokenizer = load_tokenizer(tiny_bert)
    labels = {"0": "O", "1": "S-A", "2": "B-A", "3": "M-A", "4": "E-A"}
    own = Tag.restore({"id2label": labels}, tokenizer, 16)
    assert own.types == ["A"] and not own.rules.last[2]
    with pytest.raises(RonnaError, match="NOUN"):
        Tag.restore({"id2label": {"0": "NOUN", "1": "O"}}, tokenizer, 16)


# From the command line


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    """Sentences in which two words in a row are a person, told by the first."""
    folder, rng = tmp_path_factory.mktemp("people"), np.random.default_rng(0)
    plain = ["the", "film", "was", "a", "plot", "with", "acting", "music"]
    for split, n in (("train", 240), ("validation", 40), ("test", 40)):
        rows = []
        for i in range(n):
            words = [*rng.choice(plain, 4 + i % 5), split, str(i)]
            at = int(rng.integers(0, 4))
            words[at:at] = ["great", "story"] if i % 3 else ["awful"]
            tags = ["O"] * len(words)
            tags[at : at + 2] = ["B-PER", "I-PER"] if i % 3 else ["B-LOC", "O"]
            rows.append("\n".join(f"{w} {t}" for w, t in zip(words, tags, strict=True)))
        (folder / f"{split}.conll").write_text("\n\n".join(rows) + "\n")
    return folder


def test_tag_from_the_command_line(tiny_bert, people, tmp_path, capsys):
    from ronna.cli import main

    out = tmp_path / "run"
    call = ["finetune", "--task", "tag", "--model", str(tiny_bert), "--train", str(people), "--out", str(out)]
    settings = ["--length", "32", "--lr", "3e-3", "--epochs", "8", "--precision", "fp32", "--batch", "16"]
    assert main([*call, *settings, "--set", "model.dropout=0.0"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["task"] == "tag" and report["test"]["f1"]["value"] > 0.95
    capsys.readouterr()
    assert main(["evaluate", "--model", f"{out}/model", "--data", f"{people}/test.conll", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"]["f1"] == report["test"]["f1"]
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "the film with great story, was", "id": 7}) + "\n")
    assert main(["predict", "--model", f"{out}/model", "--input", f"{tmp_path}/in.jsonl"]) == 0
    answer = json.loads(capsys.readouterr().out)
    [entity] = answer["prediction"]["entities"]
    assert (entity["type"], entity["text"], entity["start"], entity["end"]) == ("PER", "great story", 14, 25)

    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForTokenClassification.from_pretrained(out / "model")
    assert model.config.id2label == dict(enumerate(["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]))
