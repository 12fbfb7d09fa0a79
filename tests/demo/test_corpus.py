"""The embedded corpus: enough of it, nothing seen twice, and its areas can be learned."""

import json
import re
import sysconfig
from collections import Counter

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score

from ronna.base.errors import RonnaError
from ronna.demo.corpus import AREAS, LICENCE, build_corpus

SPLITS = ("train", "validation", "test")
NOTICE = "# Copyright (c) 1999 A. Person\n#\n# Permission to use this is granted.\n\n"
MODULE = '''"""{name} keeps colours, and says which are warm and which are cold."""
# Colours are compared by their hue, never by their name.
def warm(hue):
    """Whether {name} counts this hue among the warm colours."""
    text = """
# A line of a string that looks like a comment, and is none at all.
"""
    # x = 1; y = 2; z[0] = (x, y); w[1] = {{}}
    return hue < 180
'''


def words(text):
    return re.sub(r"[\W\d_]+", " ", text.casefold()).split()


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def folder(out, name):
    return {path.stem: rows(path) for path in sorted((out / name).iterdir())}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus")
    return out, build_corpus(out)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of 40 small modules and one topic."""
    root = tmp_path / "lib"
    (root / "site-packages").mkdir(parents=True)
    (root / "site-packages" / "foreign.py").write_text('"""Not of the library, whatever it may say."""')
    (root / "pydoc_data").mkdir()
    (root / "pydoc_data" / "topics.py").write_text('import sys\ntopics = {"assert": "The assert statement."}\n')
    (root / "broken.py").write_text('print "for an older Python"\n')
    for area, modules in AREAS.items():
        for module in modules.split()[:3]:
            (root / f"{module}.py").write_text(NOTICE + MODULE.format(name=f"{area} {module}"))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    return root


def test_running_python_gives_enough_text(built):
    out, summary = built
    assert 6e6 < sum(summary.text_bytes.values()) <= 8e6
    assert 0.05 < summary.text_bytes["validation"] / sum(summary.text_bytes.values()) < 0.1
    found = folder(out, "text")
    assert {split: len(documents) for split, documents in found.items()} == summary.documents
    for split, documents in found.items():
        assert summary.text_bytes[split] == sum(len(row["text"].encode()) for row in documents)
    kinds = Counter(row["source"].partition("/")[0] for row in found["train"])
    assert min(kinds["topic"], kinds["prose"], kinds["code"]) > 30


def test_validation_modules_are_unseen(built):
    found = folder(built[0], "text")
    tops = {
        split: {row["source"].partition("/")[2].partition(".")[0] for row in documents if "topic" not in row["source"]}
        for split, documents in found.items()
    }
    assert tops["train"] and tops["validation"] and not tops["train"] & tops["validation"]
    texts = [row["text"] for documents in found.values() for row in documents if len(row["text"]) > 200]
    assert len(texts) == len(set(texts))


def test_areas_are_enough_and_disjoint(built):
    out, summary = built
    found = folder(out, "areas")
    assert set(found) == set(SPLITS)
    assert 8 <= len(summary.areas["train"]) <= 12 and min(summary.areas["train"].values()) >= 60
    assert set(summary.areas["train"]) == set(summary.areas["validation"]) == set(summary.areas["test"])
    assert {s: dict(Counter(row["label"] for row in found[s])) for s in SPLITS} == summary.areas
    keys = [tuple(words(row["text"])) for split in SPLITS for row in found[split]]
    assert len(keys) == len(set(keys))
    starts = {split: {tuple(words(row["text"])[:8]) for row in found[split]} for split in SPLITS}
    assert not starts["train"] & starts["test"] and not starts["train"] & starts["validation"]
    assert min(len(row["text"]) for split in SPLITS for row in found[split]) >= 40


def test_areas_can_be_learned(built):
    found = folder(built[0], "areas")
    text = {split: [row["text"] for row in found[split]] for split in SPLITS}
    gold = {split: [row["label"] for row in found[split]] for split in SPLITS}
    tfidf = TfidfVectorizer(sublinear_tf=True, min_df=2)
    model = LogisticRegression(C=10, max_iter=300).fit(tfidf.fit_transform(text["train"]), gold["train"])
    predicted = model.predict(tfidf.transform(text["test"]))
    accuracy = accuracy_score(gold["test"], predicted)
    majority = np.mean([label == Counter(gold["train"]).most_common(1)[0][0] for label in gold["test"]])
    macro = f1_score(gold["test"], predicted, average="macro")
    print(f"accuracy {accuracy:.3f}, macro F1 {macro:.3f}, majority class {majority:.3f}")
    assert majority < 0.3 and accuracy > majority + 0.3 and macro > 0.4


def test_same_seed_same_files_and_another_seed_another_split(library, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_corpus(tmp_path / name, seed=seed)
    assert folder(tmp_path / "a", "text") == folder(tmp_path / "b", "text")
    assert folder(tmp_path / "a", "text")["validation"] != folder(tmp_path / "c", "text")["validation"]


def test_prose_and_code_of_a_module(library, tmp_path):
    build_corpus(tmp_path / "out")
    found = [row for documents in folder(tmp_path / "out", "text").values() for row in documents]
    text = {row["source"]: row["text"] for row in found}
    assert "topic/assert" in text and not any("foreign" in source or "broken" in source for source in text)
    assert text["prose/html"].split("\n\n") == [
        "markup html keeps colours, and says which are warm and which are cold.",
        "Colours are compared by their hue, never by their name.",
        "Whether markup html counts this hue among the warm colours.",
    ]
    assert text["code/html"] == MODULE.format(name="markup html")
    assert not any(LICENCE.search(row["text"]) for row in found)


def test_size_is_a_limit_and_prose_comes_first(library, tmp_path):
    summary = build_corpus(tmp_path / "out", max_megabytes=0.012)
    train = folder(tmp_path / "out", "text")["train"]
    assert 0.01e6 < sum(summary.text_bytes.values()) <= 0.012e6
    kinds = [row["source"].partition("/")[0] for row in train]
    assert "code" in kinds and kinds == sorted(kinds, key=lambda kind: kind == "code")


def test_what_the_user_can_mend(library, tmp_path, monkeypatch):
    with pytest.raises(RonnaError, match="0 megabytes"):
        build_corpus(tmp_path / "out", max_megabytes=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(RonnaError, match="cannot write"):
        build_corpus(tmp_path / "file")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "nowhere")})
    with pytest.raises(RonnaError, match="nowhere"):
        build_corpus(tmp_path / "out")
