"""`prepare` on the workers of a Ray cluster: the same shards as in one process, to the byte."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ronna.base.errors import RonnaError
from ronna.runfile import PrepareRun
from ronna.text.clean import BANDS, CleanConfig, _near_duplicates, plain, sketch_of
from ronna.verbs import prepare as module
from ronna.verbs import spread
from ronna.verbs.prepare import prepare


def documents(count: int, seed: int = 0) -> list[str]:
    """Texts, many of which are others with some words changed, or nothing but case and spaces."""
    rng = random.Random(seed)
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrs"]
    made = list[str]()
    for i in range(count):
        kind = rng.random() if made else 1.0
        if kind < 0.15:
            made.append(rng.choice(made).upper().replace(" ", "  "))
        elif kind < 0.6:
            changed = rng.choice(made).split()
            for _ in range(rng.randrange(1, 4)):
                changed[rng.randrange(len(changed))] = rng.choice(words)
            made.append(" ".join(changed))
        else:
            made.append(" ".join(rng.choices(words, k=rng.randrange(20, 90))))
        if i % 29 == 0:
            made[-1] += "\x07 Cafe\u0301 中文也在这里"
        if i % 31 == 0:
            made[-1] = "kurz"
    return made


def test_alike_is_what_the_index_of_one_process_says():
    for threshold in (0.3, 0.6, 0.8, 0.95):  # at the first many that are alike share no bucket
        repeats, kept, said = _near_duplicates(threshold), list[np.ndarray](), list[bool]()
        for text in map(plain, documents(400)):
            mine = np.array(sketch_of(text).digest(), dtype="<u4")
            found = bool(kept) and spread.alike(mine, np.stack(kept), threshold)
            assert found == repeats(text), text
            said.append(found)
            if not found:
                kept.append(mine)
        assert 0.1 < np.mean(said) < 0.9


def test_documents_that_share_a_bucket_meet(monkeypatch):
    monkeypatch.setattr(spread, "value_of", lambda reference: reference)
    texts = ["a b c d e f g h", "a b c d e f g h", "p q r s t u v w", "too short", "a b c d e f g h"]
    (part,) = spread.portions(texts)
    looked = spread.look(part, CleanConfig(dedup="near", min_chars=10))
    assert looked["reason"].to_pylist() == [None, None, None, "too_short", None]
    kept = np.array([True, True, True, False, True])
    bands = spread.banded(looked, kept)
    assert len(bands) == 4 * BANDS
    pairs = spread.met(bands)
    assert list(zip(pairs["low"].to_pylist(), pairs["high"].to_pylist(), strict=True)) == [(0, 1), (1, 4)]
    assert spread.some_of(looked, kept, "digest")["number"].to_pylist() == [0, 1, 2, 4]
    assert len(spread.met(spread.banded(looked, np.zeros(5, dtype=bool)))) == 0


def test_lone_surrogates_travel():
    (part,) = spread.portions(["a\ud800b", ""])
    assert part["text"].to_pylist()[0].decode("utf-8", "surrogatepass") == "a\ud800b"
    looked = spread.look(part, CleanConfig(control=False))
    assert looked["text"].to_pylist()[0] == b"a\xed\xa0\x80b" and looked["reason"].to_pylist() == [None, "too_short"]
    assert not list(spread.portions([]))
    assert isinstance(part, pa.Table)


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(RonnaError, match="Ray is not installed"):
        next(spread.clean_and_encode(["text"], CleanConfig(), module.CleanReport(), "tokenizer"))


@pytest.mark.parametrize("dedup", ["near", "exact", "none"])
def test_the_shards_are_those_of_one_process(dedup, shards, tmp_path, monkeypatch, cluster):
    monkeypatch.setattr(spread, "join", lambda ray: None)
    monkeypatch.setattr(spread, "PART_CHARACTERS", 20_000)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(600)))
    reports = {}
    for engine in ("local", "ray"):
        asked = {
            "out": str(tmp_path / engine),
            "input": [str(rows)],
            "tokenizer": str(shards["wordpiece"] / "tokenizer"),
        }
        asked |= {
            "clean": {"dedup": dedup, "min_chars": 8, "max_top_ngram": 0.5},
            "engine": engine,
            "shard_tokens": 4096,
        }
        reports[engine] = prepare(PrepareRun.model_validate(asked | {"validation": 0.05}))
    assert reports["local"] == reports["ray"] == json.loads(json.dumps(reports["ray"]))
    dropped = reports["ray"]["train"]["cleaning"]["dropped"]
    assert dropped["too_short"] and bool(dropped.get("near_duplicate")) == (dedup == "near")
    assert bool(dropped.get("exact_duplicate")) == (dedup != "none")
    for split in ("train", "validation"):
        one, many = (files(tmp_path / engine / split) for engine in ("local", "ray"))
        assert one == many and len(one) > 3


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, logging_level="error")
        yield
        ray.shutdown()
