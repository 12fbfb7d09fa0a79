import numpy as np
import pytest

from ronna.objectives.base import collate
from ronna.objectives.documents import PackedDocuments, Piece
from ronna.objectives.mlm import MaskedLM, MLMConfig


def masked(vocabulary, config, text, seed=0):
    [sample] = MaskedLM(config, vocabulary).samples([Piece(text, 0, None, None)], np.random.default_rng(seed))
    return sample


def test_masks_follow_devlin(vocabulary):
    text = np.random.default_rng(1).integers(10, 200, size=20_000)
    sample = masked(vocabulary, MLMConfig(nsp=False), text)
    original = np.concatenate([[2], text, [3]])
    assert len(sample.predict) == 3000
    assert (original[sample.predict] == sample.labels).all()
    untouched = np.setdiff1d(np.arange(len(original)), sample.predict)
    assert (sample.tokens[untouched] == original[untouched]).all()
    shown = sample.tokens[sample.predict]
    assert abs((shown == 4).mean() - 0.8) < 0.03
    assert abs((shown == sample.labels).mean() - 0.1) < 0.02
    assert not vocabulary.special[shown[shown != 4]].any()


def test_the_rate_is_the_configs(vocabulary):
    text = np.arange(10, 110)
    assert len(masked(vocabulary, MLMConfig(nsp=False, rate=0.4), text).predict) == 40


def test_special_tokens_are_never_predicted(vocabulary):
    text = np.array([5, 6, 50, 7])
    for seed in range(20):
        assert masked(vocabulary, MLMConfig(nsp=False), text, seed).predict.tolist() == [3]


def test_text_of_special_tokens_only_has_no_target(vocabulary):
    assert len(masked(vocabulary, MLMConfig(nsp=False), np.array([5, 6])).predict) == 0


def test_whole_words_are_masked_whole(vocabulary):
    text = np.random.default_rng(2).integers(10, 200, size=500)
    sample = masked(vocabulary, MLMConfig(nsp=False, whole_word=True), text)
    chosen = np.zeros(502, dtype=bool)
    chosen[sample.predict] = True
    inside = np.flatnonzero(vocabulary.continues_word[text]) + 1
    inside = inside[inside > 1]
    assert (chosen[inside] == chosen[inside - 1]).all()
    assert 0 < chosen.sum() <= 0.15 * 500 + 1


def test_the_same_generator_gives_the_same_masks(vocabulary):
    text = np.arange(10, 110)
    a, b, c = (masked(vocabulary, MLMConfig(nsp=False), text, seed) for seed in (0, 0, 1))
    assert (a.predict == b.predict).all() and (a.tokens == b.tokens).all()
    assert a.predict.tolist() != c.predict.tolist()


@pytest.fixture
def pairs(vocabulary, make_shards):
    shards = make_shards([50, 80, 20, 60, 100] * 40)
    objective = MaskedLM(MLMConfig(rate=1e-9), vocabulary, shards)
    data = PackedDocuments(shards, 64, objective.overhead)
    found = []
    for i in range(len(data)):
        for piece, sample in zip(data[i], objective.samples(data[i], np.random.default_rng(i)), strict=True):
            sample.tokens[sample.predict] = sample.labels
            found.append((piece, sample))
    return shards, found


def test_half_of_the_pairs_are_sequels(vocabulary, pairs):
    _, found = pairs
    targets = [s.target for _, s in found]
    assert 0.4 < np.mean(targets) < 0.6
    for piece, sample in found:
        seps = np.flatnonzero(sample.tokens == 3)
        assert sample.tokens[0] == 2 and len(seps) == 2 and seps[-1] == len(sample.tokens) - 1
        assert (sample.segments == (np.arange(len(sample.tokens)) > seps[0])).all()
        a, b = sample.tokens[1 : seps[0]], sample.tokens[seps[0] + 1 : -1]
        assert len(sample.tokens) <= len(piece.tokens) + 3
        if sample.target == 0:
            assert np.concatenate([a, b]).tolist() == piece.tokens.tolist()
            assert vocabulary.ends_sentence[a[-1]] or not vocabulary.ends_sentence[piece.tokens[:-1]].any()
        else:
            assert a.tolist() == piece.tokens[: len(a)].tolist() and len(b) > 0


def test_false_sequels_come_from_other_documents(pairs):
    shards, found = pairs
    own = [
        any(window(shards[p.document], s.tokens[np.flatnonzero(s.tokens == 3)[0] + 1 : -1]))
        for p, s in found
        if s.target == 1 and len(s.tokens) > 20
    ]
    assert len(own) > 50 and np.mean(own) < 0.05  # a span of one or two tokens may stand anywhere


def window(document, span):
    n = len(span)
    return (np.array_equal(document[i : i + n], span) for i in range(len(document) - n + 1))


def test_counts_name_both_terms(vocabulary, pairs, make_shards):
    shards, found = pairs
    objective = MaskedLM(MLMConfig(), vocabulary, shards)
    batch = collate(objective, [s for _, s in found[:8]])
    assert batch.counts == {"mlm": len(batch.labels), "nsp": 8}
