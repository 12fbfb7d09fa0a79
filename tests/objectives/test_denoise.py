import numpy as np
import pytest

from ronna.objectives.denoise import Denoise, DenoiseConfig, partition
from ronna.objectives.documents import Piece

SENTINELS = (9, 8, 7, 6, 5)


@pytest.mark.parametrize("length", [2, 3, 7, 40, 200])
def test_source_and_target_hold_the_text_between_them(length):
    rng = np.random.default_rng(length)
    text = rng.integers(10, 200, size=length)
    objective = Denoise(DenoiseConfig(), SENTINELS, start=0, eos=1)
    [sample] = objective.samples([Piece(text, 0, None, None)], rng)
    assert sample.tokens.tolist() == [0, *sample.labels[:-1].tolist()]
    assert sample.source[-1] == 1 and sample.labels[-1] == 1
    spans: dict[int, list[int]] = {}
    for token in sample.labels[:-1].tolist():
        if token in SENTINELS:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    rebuilt = [x for token in sample.source[:-1].tolist() for x in spans.get(token, [token])]
    assert rebuilt == text.tolist()
    assert list(spans) == list(SENTINELS[: len(spans)])
    cut = sum(map(len, spans.values()))
    assert cut == max(1, round(0.15 * length))


def test_a_single_token_has_nothing_to_denoise():
    objective = Denoise(DenoiseConfig(), SENTINELS, start=0, eos=1)
    assert objective.samples([Piece(np.array([12]), 0, None, None)], np.random.default_rng(0)) == []


def test_partition_is_uniform_over_splits():
    rng = np.random.default_rng(0)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(6000):
        split = tuple(partition(5, 3, rng).tolist())
        counts[split] = counts.get(split, 0) + 1
    assert len(counts) == 6 and all(sum(s) == 5 and min(s) > 0 for s in counts)
    assert max(counts.values()) - min(counts.values()) < 200


def test_rate_and_span_are_what_the_config_says():
    text = np.arange(10, 190)
    sentinels = tuple(range(300, 400))
    objective = Denoise(DenoiseConfig(rate=0.5, span=9.0), sentinels, start=0, eos=1)
    [sample] = objective.samples([Piece(text, 0, None, None)], np.random.default_rng(0))
    marks = int((sample.labels >= 300).sum())
    assert len(sample.labels) - 1 - marks == 90 and marks == 10
