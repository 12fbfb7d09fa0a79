"""Filters equal transformers' processors; draws are reproducible and follow the probabilities."""

import numpy as np
import pytest
import torch
import transformers as hf

from ronna.base.config import build
from ronna.base.errors import RonnaError
from ronna.decoding.sampling import GenerateConfig, choose, draw_keys, penalise, uniforms, warp


def logits(rows=6, vocab=50, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("temperature", [1.0, 0.4, 2.0])
@pytest.mark.parametrize(
    "options",
    [
        *({}, {"top_k": 1}, {"top_k": 7}, {"top_k": 90}, {"top_p": 0.9}, {"top_p": 0.01}, {"min_p": 0.1}),
        *({"top_k": 9, "top_p": 0.7}, {"top_k": 9, "top_p": 0.8, "min_p": 0.2}, {"min_p": 1.0}, {"top_p": 1e-9}),
    ],
)
def test_the_tokens_left_are_those_of_transformers(options, temperature):
    scores = logits()
    expected = hf.TemperatureLogitsWarper(temperature)(None, scores)
    for option, warper in [
        ("top_k", hf.TopKLogitsWarper), ("top_p", hf.TopPLogitsWarper), ("min_p", hf.MinPLogitsWarper)
    ]:  # fmt: skip
        if option in options:
            expected = warper(options[option])(None, expected)
    ours = warp(scores, GenerateConfig(temperature=temperature, **options))
    assert torch.equal(ours.isneginf(), expected.isneginf())
    torch.testing.assert_close(ours.softmax(-1), expected.softmax(-1))


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_penalties_are_those_of_transformers(penalty, n):
    g = torch.Generator().manual_seed(3)
    lengths = [1, 2, 3, 9, 30]
    rows = [torch.randint(0, 6, (length,), generator=g) for length in lengths]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    scores = logits(len(rows), 40)
    config = GenerateConfig(repetition_penalty=penalty, no_repeat_ngram=n)
    ours = penalise(scores, tokens, torch.tensor(lengths), config)
    for i, row in enumerate(rows):
        expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(row[None], scores[i : i + 1])
        if n:
            expected = hf.NoRepeatNGramLogitsProcessor(n)(row[None], expected)
        assert torch.equal(ours[i], expected[0])


def test_when_every_token_is_blocked_none_is():
    scores, tokens = logits(1, 3), torch.tensor([[0, 1, 2]])
    assert torch.equal(penalise(scores, tokens, torch.tensor([3]), GenerateConfig(no_repeat_ngram=1)), scores)


def splitmix64(state, step):
    """The published generator, in unbounded integers."""
    z = (state + (step + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_uniforms_are_splitmix64():
    keys = draw_keys(5, [0, 1, 2**20])
    for step in (0, 1, 1000, 2**20):
        expected = [((splitmix64(int(key), step) >> 11) + 1) / 2**53 for key in keys]
        assert uniforms(keys, step).tolist() == expected
    many = np.concatenate([uniforms(draw_keys(0, list(range(100))), step) for step in range(100)])
    assert many.min() > 0 and many.max() <= 1
    assert abs(many.mean() - 0.5) < 0.01 and abs(many.var() - 1 / 12) < 0.003


def test_tokens_are_drawn_as_often_as_they_are_likely():
    scores = torch.tensor([[0.0, 1.0, 2.0, -50.0, 1.5]])
    config = GenerateConfig(temperature=1.5, top_k=3)
    draws = 20_000
    keys = draw_keys(1, list(range(draws)))
    counts = torch.bincount(choose(scores.expand(draws, -1), config, keys, 0), minlength=5)
    expected = warp(scores, config).softmax(-1)[0] * draws
    assert counts[[0, 3]].tolist() == [0, 0]
    # 5 standard deviations of a binomial count.
    assert ((counts - expected).abs() <= 5 * (expected * (1 - expected / draws)).sqrt()).all()


def test_extremes_of_a_draw_stay_inside():
    scores = torch.full((2, 4), float("-inf")).index_fill(1, torch.tensor([1, 2]), 0.0)
    config = GenerateConfig(temperature=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ronna.decoding.sampling.uniforms", lambda keys, step: np.array([2.0**-53, 1.0]))
        assert choose(scores, config, draw_keys(0, [0, 1]), 0).tolist() == [1, 2]


@pytest.mark.parametrize("temperature", [1e-9, 1e-4])
def test_a_cold_draw_is_the_likeliest_token(temperature):
    config = GenerateConfig(temperature=temperature)
    scores = logits() * 1e9
    assert torch.equal(choose(scores, config, draw_keys(0, list(range(6))), 0), scores.argmax(-1))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: found 0"),
        ({"max_tokens": 10**9}, "max_tokens: found 1000000000"),
        ({"temperature": -0.1}, "temperature: found -0.1"),
        ({"top_k": -1}, "top_k: found -1"),
        ({"top_p": 1.1}, "top_p: found 1.1"),
        ({"top_p": 0.0}, "top_p: found 0.0"),
        ({"min_p": 2}, "min_p: found 2"),
        ({"repetition_penalty": 0}, "repetition_penalty: found 0"),
        ({"no_repeat_ngram": -2}, "no_repeat_ngram: found -2"),
        ({"beams": 0}, "beams: found 0"),
        ({"length_penalty": 50}, "length_penalty: found 50"),
        ({"early_stopping": "sometimes"}, "early_stopping"),
        ({"seed": -1}, "seed: found -1"),
        ({"stop": [""]}, "an empty stop string"),
        ({"beams": 2, "temperature": 1.0}, "beam search draws nothing"),
        ({"beams": 2, "stop": ["x"]}, "beam search does not look at text"),
        ({"top_q": 1}, "did you mean top_"),
    ],
)
def test_what_makes_no_sense_is_refused(tree, message):
    with pytest.raises(RonnaError, match=message):
        build(GenerateConfig, tree, "run.toml")
