"""The n-gram peer: true distributions, equal to a word-for-word reading of the formula."""

import importlib.util
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ronna.base.errors import RonnaError

PATH = Path(__file__).parents[2] / "benchmarks" / "ngram.py"
VOCABULARY = 12
TEXT = "the cat sat on the mat, the dog sat on the log, and the hen sat on the cat.\n" * 20


@pytest.fixture(scope="module")
def ngram():
    spec = importlib.util.spec_from_file_location("ngram", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(size=400, seed=0):
    """Zipf's counts, so that some n-grams are rare and some contexts are never met."""
    rng = np.random.default_rng(seed)
    weight = 1 / np.arange(1, VOCABULARY) ** 1.3  # the last id is never drawn
    return rng.choice(VOCABULARY - 1, size, p=weight / weight.sum())


def kneser_ney(units, order, discounts):
    """The recursion of Chen & Goodman (1999) with dictionaries."""
    counts = {k: Counter(tuple(units[i - k : i]) for i in range(k, len(units) + 1)) for k in range(1, order + 1)}
    used = {order: counts[order]}
    for k in range(order - 1, 0, -1):
        left = defaultdict(set)
        for gram in counts[k + 1]:
            left[gram[1:]].add(gram[0])
        used[k] = {gram: max(1, len(left[gram])) for gram in counts[k]}

    def p(unit, context):
        k = len(context) + 1
        shorter = p(unit, context[1:]) if context else 1 / VOCABULARY
        after = {gram[-1]: c for gram, c in used[k].items() if gram[:-1] == context}
        if not after:
            return shorter
        cut = {w: discounts[k][min(c, 3)] for w, c in after.items()}
        total = sum(after.values())
        return (after.get(unit, 0) - cut.get(unit, 0)) / total + sum(cut.values()) / total * shorter

    return p


@pytest.mark.parametrize("order", [1, 2, 5])
def test_probabilities_sum_to_one(ngram, order):
    units = np.append(drawn(), VOCABULARY - 1)  # the last one is a context that nothing follows
    model = ngram.fit(units, VOCABULARY, order)
    contexts = [[], [VOCABULARY - 1], [0, 1, 2, 3, 4], [10, 10, 10], list(units[-4:]), list(units[:4])]
    contexts += [list(units[i : i + 6]) for i in range(0, 60, 7)]
    for context in contexts:
        p = [model.probabilities(np.array([*context, unit]))[-1] for unit in range(VOCABULARY)]
        assert min(p) > 0 and sum(p) == pytest.approx(1, abs=1e-12)


def test_kneser_ney_equals_the_formula(ngram):
    units, order = drawn(), 3
    model = ngram.fit(units, VOCABULARY, order)
    held_out = drawn(200, seed=1)
    raw = {k: Counter(tuple(units[i - k : i]) for i in range(k, len(units) + 1)) for k in (1, 2, 3)}
    left = {k: Counter(gram[1:] for gram in raw[k + 1]) for k in (1, 2)}
    counts = {k: np.array([max(1, left[k][gram]) for gram in raw[k]]) for k in (1, 2)}
    counts[3] = np.array(list(raw[3].values()))
    reference = kneser_ney(list(units), order, {k: ngram._discounts(c) for k, c in counts.items()})
    expected = [reference(held_out[i], tuple(held_out[max(0, i - order + 1) : i])) for i in range(len(held_out))]
    np.testing.assert_allclose(model.probabilities(held_out), expected, rtol=1e-12)


def test_discounts(ngram):
    counts = np.repeat([1, 2, 3, 4, 9], [40, 20, 10, 5, 7])  # Y = 40 / (40 + 2 * 20) = 0.5
    assert ngram._discounts(counts) == pytest.approx([0, 1 - 2 * 0.5 * 0.5, 2 - 3 * 0.5 * 0.5, 3 - 4 * 0.5 * 0.5])
    assert list(ngram._discounts(np.array([9, 9]))) == [0, 0.5, 1, 1.5]


def byte_level_bpe(folder, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    if normalizer:
        tokenizer.normalizer = normalizer
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_bits_are_those_of_the_whole_text(ngram, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": TEXT, "title": "cats"}) + "\n")
    (tmp_path / "eval.txt").write_text("the cat sat on é 猫.\n", encoding="utf-8")
    files = [tmp_path / "train.jsonl"], [tmp_path / "eval.txt"]
    by_byte = ngram.score(*files, 4, None)
    assert by_byte["eval_bytes"] == by_byte["eval_units"] == 23
    train, held_out = (np.frombuffer(text.encode(), np.uint8) for text in (TEXT, "the cat sat on é 猫.\n"))
    model = ngram.fit(np.append(256, train).astype(int), 257, 4)
    p = model.probabilities(np.append(256, held_out).astype(int))[1:]
    assert by_byte["bits_per_byte"] == pytest.approx(-np.log(p).sum() / np.log(2) / 23, abs=1e-4)
    assert by_byte["perplexity"] == pytest.approx(np.exp(-np.log(p).mean()), abs=1e-4)
    by_token = ngram.score(*files, 3, byte_level_bpe(tmp_path / "bpe"))
    assert by_token["eval_bytes"] == 23 > by_token["eval_units"]
    bits = by_token["eval_units"] * np.log2(by_token["perplexity"])
    assert by_token["bits_per_byte"] == pytest.approx(bits / 23, rel=1e-3)
    assert 1 < by_token["bits_per_byte"] < 8 and 1 < by_byte["bits_per_byte"] < 8


def test_what_the_user_can_mend(ngram, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT.title())
    files = [tmp_path / "a.txt"], [tmp_path / "a.txt"]
    with pytest.raises(RonnaError, match="loses a part"):
        ngram.score(*files, 3, byte_level_bpe(tmp_path / "bpe", normalizers.Lowercase()))
    with pytest.raises(RonnaError, match=r"no tokenizer\.json"):
        ngram.score(*files, 3, tmp_path)
    with pytest.raises(RonnaError, match="units to fit"):
        ngram.score(*files, 10_000, None)
