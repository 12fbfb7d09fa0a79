"""Triples out of two models: which pairs of entities are asked of, and what comes out of the command line."""

import itertools
import json
import random
from pathlib import Path

import pytest

from ronna.cli import main
from ronna.model.families import preset
from ronna.model.folder import save_folder
from ronna.model.init import build
from ronna.tasks.labels import named_relation
from ronna.tasks.words import Sentence, joined, words_of
from ronna.text.tokenizer import TokenizerConfig, train_tokenizer
from ronna.verbs.triples import Triples, ends

DIRECTED, PLAIN = ["Made(e1,e2)", "Made(e2,e1)", "Other"], ["made", "no_relation"]


@pytest.mark.parametrize(
    ("label", "kind", "order"),
    [
        ("Cause-Effect(e2,e1)", "Cause-Effect", "e2,e1"),
        ("born_in", "born_in", None),
        ("Other", None, None),
        ("no-relation", None, None),
        ("无", None, None),
        ("f(x)", "f(x)", None),
    ],
)
def test_what_a_label_says(label, kind, order):
    assert named_relation(label) == (kind, order)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Dr. Who met Mr. X in the U.S. Army. They left!", ["Dr. Who met Mr. X in the U.S. Army.", "They left!"]),
        ('He said "Go." Then 3.5 came. 7 of them.', ['He said "Go."', "Then 3.5 came.", "7 of them."]),
        ("It costs ... a lot? yes. Élan (new).  A b", ["It costs ... a lot? yes.", "Élan (new).", "A b"]),
        ("她在北京。他说：“好！”然后走了", ["她在北京。", "他说：“好！”", "然后走了"]),
        ("A title\n \nand text", ["A title", "and text"]),
        ("", [""]),
    ],
)
def test_where_sentences_end(text, parts):
    edges = [0, *ends(text), len(text)]
    cut = [text[a:b].strip() for a, b in itertools.pairwise(edges)]
    assert [part for part in cut if part] == [part for part in parts if part]


def made(labels=DIRECTED, most=200, say="Made(e2,e1)"):
    """Models that take every word with a capital for an entity, and say one relation of any two."""
    asked = []

    def entities(rows):
        return [{"entities": [found(r, i) for i, (a, _) in enumerate(r.words) if r.text[a].isupper()]} for r in rows]

    def found(row, i):
        start, end = row.words[i]
        place = {"words": [i, i + 1]} if row.given else {"start": start, "end": end}
        return {"type": "X", "text": row.text[start:end], **place, "probability": 0.9}

    def relations(pairs):
        asked.extend((p.text, p.text[slice(*p.first)], p.text[slice(*p.second)]) for p in pairs)
        said = say if callable(say) else lambda pair: (say, 0.5)
        return [dict(zip(("relation", "probability"), said(p), strict=True)) for p in pairs]

    return Triples(entities, relations, labels, most), asked


def row(text: str) -> Sentence:
    return Sentence(text, tuple(words_of(text)), None, False)


def said(answer) -> list[tuple[str, str, str]]:
    return [(t["head"]["text"], t["relation"], t["tail"]["text"]) for t in answer["triples"]]


def test_two_entities_of_a_sentence_are_asked_of_once_where_labels_have_a_direction():
    triples, asked = made()
    text = "Ann saw Bo and Cy. Then Di left."
    [first, second] = triples.answer([row("Then nothing."), row(text)][::-1])
    assert [pair[1:] for pair in asked] == [("Ann", "Bo"), ("Ann", "Cy"), ("Bo", "Cy"), ("Then", "Di")]
    assert {pair[0] for pair in asked} == {"Ann saw Bo and Cy.", " Then Di left."}
    assert said(first)[0] == ("Bo", "Made", "Ann") and len(first["triples"]) == 4 and second["triples"] == []
    last = first["triples"][-1]
    assert last["head"] == {"type": "X", "text": "Di", "start": 24, "end": 26} and last["probability"] == 0.5
    assert first["entities"][0]["probability"] == 0.9
    assert triples.account.text(200) == "4 triples out of 4 pairs of entities in 2 records"


def test_each_order_is_asked_of_where_labels_have_none():
    triples, asked = made(PLAIN, say=lambda pair: ("made" if pair.first < pair.second else "no_relation", 0.7))
    [answer] = triples.answer([joined(["Ann", ".", "Then", "Bo"])])  # given words are one sentence
    assert [pair[1:] for pair in asked] == [
        (a, b) for a in ("Ann", "Then", "Bo") for b in ("Ann", "Then", "Bo") if a != b
    ]
    assert said(answer) == [("Ann", "made", "Then"), ("Ann", "made", "Bo"), ("Then", "made", "Bo")]
    assert answer["triples"][1]["tail"] == {"type": "X", "text": "Bo", "words": [3, 4]}


def test_the_surer_of_two_answers_that_say_the_same_counts():
    def say(pair):
        forward = pair.first < pair.second
        return f"Made({'e1,e2' if forward else 'e2,e1'})", 0.4 if forward else 0.8

    triples, asked = made([*DIRECTED, "near"], say=say)
    [answer] = triples.answer([row("Ann saw Bo")])
    assert len(asked) == 2 and said(answer) == [("Ann", "Made", "Bo")] and answer["triples"][0]["probability"] == 0.8


def test_the_nearest_pairs_are_kept_and_it_is_said():
    triples, asked = made(most=3)
    few, many = triples.answer([row("Ann saw Bo"), row("Ann Bo said that Cy and then Di Ed")])
    assert [pair[1:] for pair in asked] == [("Ann", "Bo"), ("Ann", "Bo"), ("Cy", "Di"), ("Di", "Ed")]
    assert many["pairs_left_out"] == 7 and "pairs_left_out" not in few
    assert "1 records had more than 3 pairs, of which the nearest were asked (7 left out" in triples.account.text(3)


def test_a_sentence_does_not_end_within_an_entity():
    triples, asked = made()
    triples.entities = lambda rows: [
        {"entities": [{"type": "X", "text": r.text[a:b], "start": a, "end": b} for a, b in ((0, 10), (15, 18))]}
        for r in rows
    ]
    triples.answer([row("Yahoo! Inc met Bob")])
    assert [pair[1:] for pair in asked] == [("Yahoo! Inc", "Bob")]


# From the command line


def write(folder: Path, rows) -> Path:
    folder.mkdir(exist_ok=True)
    for split, some in rows.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, some)) + "\n")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    """A tag model that finds works, and a relation model that reads the verb between two of them."""
    root, rng = tmp_path_factory.mktemp("graph"), random.Random(0)
    works, verbs = ["film", "plot", "music", "acting"], ["made", "by", "in"]
    vocabulary = ["the", "was", "good", "a", "with", "@", "#", ".", *works, *verbs]
    config = TokenizerConfig(kind="wordpiece", vocab=300, lowercase=True)
    tokenizer = train_tokenizer([" ".join(vocabulary)] * 5, config)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    family, cfg = preset("bert-tiny", vocab_size=tokenizer.vocab_size, max_position_embeddings=64, **sizes)
    save_folder(build(cfg, seed=0), family, root / "base")
    tokenizer.save(root / "base")
    tags, relations = {"train": [], "validation": []}, {"train": [], "validation": []}
    for i in range(180):
        split, (a, b), verb = "train" if i < 160 else "validation", rng.sample(works, 2), i % 3
        words = ["the", a, verbs[verb], "the", b, *(["with", "the", rng.choice(works)] if i % 2 else []), split, str(i)]
        tags[split].append({"tokens": words, "tags": ["B-ART" if w in works else "O" for w in words]})
        text = f"the <e1>{a}</e1> {verbs[verb]} the <e2>{b}</e2> {split} {i}"
        relations[split].append({"text": text, "label": DIRECTED[verb]})
    for task, rows in (("tag", tags), ("relation", relations)):
        data = write(root / f"{task}-data", rows)
        call = ["finetune", "--task", task, "--model", f"{root}/base", "--train", str(data), "--out", f"{root}/{task}"]
        settings = ["--lr", "3e-3", "--epochs", "6", "--batch", "16", "--length", "32", "--precision", "fp32"]
        assert main([*call, *settings, "--set", "model.dropout=0.0", "--set", "train.evaluate_every=60"]) == 0
    return f"{root}/tag/model", f"{root}/relation/model"


def test_a_graph_from_the_command_line(folders, tmp_path, capsys):
    tagger, relations = folders
    texts = ["the film made the plot", "the music by the acting", "the plot in the film", "the film"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(texts)))
    call = ["predict", "--model", tagger, "--relations", relations, "--input", f"{tmp_path}/in.jsonl"]
    capsys.readouterr()
    assert main([*call, "--precision", "fp32", "--set", "batch=3"]) == 0
    out, err = capsys.readouterr()
    answers = [json.loads(line) for line in out.splitlines()]
    assert [a["id"] for a in answers] == [0, 1, 2, 3]
    assert [len(a["prediction"]["entities"]) for a in answers] == [2, 2, 2, 1]
    assert [said(a["prediction"]) for a in answers] == [
        [("film", "Made", "plot")],
        [("acting", "Made", "music")],
        [],
        [],
    ]
    [triple] = answers[1]["prediction"]["triples"]
    assert triple["head"] == {"text": "acting", "type": "ART", "start": 17, "end": 23}
    assert 0.5 < triple["probability"] <= 1
    assert "2 triples out of 3 pairs of entities in 4 records" in err

    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "the film made the plot with the music"}) + "\n")
    assert main([*call, "--output", f"{tmp_path}/out.jsonl", "--set", "pairs=1", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)["triples"]
    assert (summary["pairs"], summary["left_out"], summary["cut_records"]) == (1, 2, 1)
    [answer] = [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert answer["pairs_left_out"] == 2 and said(answer) == [("film", "Made", "plot")]


def test_folders_of_other_tasks_are_refused(folders, tmp_path, capsys):
    tagger, relations = folders
    (tmp_path / "in.jsonl").write_text('{"text": "the film"}\n')
    given = ["--input", f"{tmp_path}/in.jsonl"]
    assert main(["predict", "--model", relations, "--relations", relations, *given]) == 2
    assert f"ronna: {relations}: finds no entities" in capsys.readouterr().err
    assert main(["predict", "--model", tagger, "--relations", tagger, *given]) == 2
    assert f"ronna: {tagger}: finds no relations" in capsys.readouterr().err
    assert main(["predict", "--model", tagger, "--relations", f"{tmp_path}/none", *given]) == 2
    assert "no such folder" in capsys.readouterr().err
