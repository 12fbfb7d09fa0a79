"""Beam search gives the sequences and scores of transformers."""

import pytest

from ronna.decoding.decode import generate
from ronna.decoding.sampling import GenerateConfig

EOS, START = {7, 11, 23, 42}, 1
CASES = [(False, 1.0), (False, 0.0), (True, 1.0), (True, 2.5), ("never", 1.0), ("never", 2.5), ("never", -1.0)]


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "transformer2017"])
@pytest.mark.parametrize(("early", "penalty"), CASES)
def test_sequences_and_scores(models, theirs, prompts, name, early, penalty):
    config = GenerateConfig(max_tokens=14, beams=3, length_penalty=penalty, early_stopping=early)
    found = generate(models[name], prompts, config, eos=EOS, start=START)
    for prompt, generation in zip(prompts, found, strict=True):
        expected, score = theirs(
            models[name], prompt, START, sorted(EOS), max_new_tokens=14,
            num_beams=3, length_penalty=penalty, early_stopping=early,
        )  # fmt: skip
        ended = expected[-1] in EOS
        assert generation.tokens == expected[: len(expected) - ended]
        assert generation.finish == ("eos" if ended else "length")
        assert generation.score == pytest.approx(score, rel=1e-4)


def test_with_repetition_taken_into_account(models, theirs, prompts):
    config = GenerateConfig(max_tokens=10, beams=5, no_repeat_ngram=2, repetition_penalty=1.4)
    for prompt, generation in zip(prompts, generate(models["gpt2"], prompts, config), strict=True):
        expected, score = theirs(
            models["gpt2"], prompt, START, [], max_new_tokens=10,
            num_beams=5, no_repeat_ngram_size=2, repetition_penalty=1.4,
        )  # fmt: skip
        assert generation.tokens == expected
        assert generation.score == pytest.approx(score, rel=1e-4)


def test_one_token_is_enough(models, prompts):
    """A search that may not go past its first token finds the likeliest one."""
    greedy = generate(models["gpt2"], prompts, GenerateConfig(max_tokens=1))
    beams = generate(models["gpt2"], prompts, GenerateConfig(max_tokens=1, beams=4))
    assert [g.tokens for g in beams] == [g.tokens for g in greedy]
