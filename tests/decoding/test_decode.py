"""Greedy generation equals transformers', alone and in company; every way to end; perplexity."""

import math

import pytest
import torch

from ronna.base.errors import RonnaError
from ronna.decoding.decode import generate, perplexity
from ronna.decoding.sampling import GenerateConfig
from ronna.model.sequences import Sequences

NAMES = ["gpt2", "llama", "t5", "transformer2017"]
EOS, START, POSITIONS, VOCAB = {7, 11, 23, 42}, 1, 48, 60
GREEDY = [
    ("gpt2", {}, {}),
    ("llama", {}, {}),
    ("t5", {}, {}),
    ("transformer2017", {}, {}),
    ("gpt2", {"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
    ("t5", {"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
    ("gpt2", {"no_repeat_ngram": 2}, {"no_repeat_ngram_size": 2}),
    ("transformer2017", {"no_repeat_ngram": 1}, {"no_repeat_ngram_size": 1}),
    ("llama", {"no_repeat_ngram": 3, "repetition_penalty": 1.2},
     {"no_repeat_ngram_size": 3, "repetition_penalty": 1.2}),
]  # fmt: skip


def letters(tokens):
    """A tokenizer of one letter a token."""
    return "".join(chr(ord("A") + token) for token in tokens)


@pytest.mark.parametrize(("name", "ours", "options"), GREEDY)
def test_greedy_is_that_of_transformers(models, theirs, prompts, name, ours, options):
    config = GenerateConfig(max_tokens=14, **ours)
    found = generate(models[name], prompts, config, eos=EOS, start=START)
    for prompt, generation in zip(prompts, found, strict=True):
        expected, _ = theirs(models[name], prompt, START, sorted(EOS), max_new_tokens=14, **options)
        ended = expected[-1] in EOS
        assert generation.tokens == expected[: len(expected) - ended]
        assert generation.finish == ("eos" if ended else "length")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"temperature": 1.3}, {"beams": 3}], ids=["greedy", "drawn", "beams"])
def test_alone_is_as_in_company(models, prompts, name, options):
    config = GenerateConfig(max_tokens=12, **options)
    together = generate(models[name], prompts, config, eos=EOS, start=START)
    alone = generate(models[name], prompts, config, eos=EOS, start=START, batch_size=1)
    for a, b in zip(together, alone, strict=True):
        assert (a.tokens, a.finish) == (b.tokens, b.finish)
        assert a.score == pytest.approx(b.score, abs=1e-4)
    assert len({tuple(g.tokens) for g in together}) > 1


def test_draws_follow_seed_and_index(models, prompts):
    def run(seed, texts):
        config = GenerateConfig(max_tokens=20, temperature=1.0, seed=seed)
        return [g.tokens for g in generate(models["gpt2"], texts, config)]

    assert run(3, prompts) == run(3, prompts)
    assert run(3, prompts) != run(4, prompts)
    first, second = run(3, [prompts[0]] * 2)
    assert first != second


def test_score_is_the_likelihood_of_the_tokens(models, prompts):
    model = models["gpt2"].eval()
    config = GenerateConfig(max_tokens=9, temperature=0.7, repetition_penalty=1.5, length_penalty=0.5)
    for prompt, generation in zip(prompts, generate(model, prompts, config), strict=True):
        flat = torch.tensor(prompt + generation.tokens)
        with torch.no_grad():
            log_p = model(flat[:-1], Sequences.of([len(flat) - 1])).log_softmax(-1)
        picked = log_p[len(prompt) - 1 :].gather(1, torch.tensor(generation.tokens)[:, None])
        assert generation.score == pytest.approx(picked.sum().item() / 9**0.5, abs=1e-4)


def test_a_sequence_stops_where_the_positions_end(models):
    lengths = [POSITIONS, POSITIONS - 1, POSITIONS - 5, 3]
    config = GenerateConfig(max_tokens=10)
    for options in ({}, {"beams": 2}):
        found = generate(models["gpt2"], [[5] * n for n in lengths], config.model_copy(update=options))
        assert [len(g.tokens) for g in found] == [0, 1, 5, 10]
        assert {g.finish for g in found} == {"length"}
    with pytest.raises(RonnaError, match="prompt 1: 49 tokens, but the model reads 48 at most"):
        generate(models["gpt2"], [[5], [5] * 49], config)
    assert len(generate(models["transformer2017"], [[5]], GenerateConfig(), start=1)[0].tokens) == POSITIONS - 1


def test_empty_prompts_begin_with_bos(models):
    config = GenerateConfig(max_tokens=4)
    empty, bos = generate(models["gpt2"], [[], [START]], config, start=START)
    assert empty == bos
    assert generate(models["gpt2"], [], config) == []
    with pytest.raises(RonnaError, match="prompt 0: it is empty"):
        generate(models["gpt2"], [[]], config)
    with pytest.raises(RonnaError, match="prompt 0: the source is empty"):
        generate(models["t5"], [[]], config, start=START)


def test_what_cannot_be_generated_is_said(models):
    gpt2, config = models["gpt2"], GenerateConfig(max_tokens=4)
    with pytest.raises(RonnaError, match="found 49, but the model has 48 positions"):
        generate(gpt2, [[5]], GenerateConfig(max_tokens=49))
    with pytest.raises(RonnaError, match="tokens from 5 to 60, but the vocabulary has 60"):
        generate(gpt2, [[5, 60]], config)
    with pytest.raises(RonnaError, match="stop strings are found in text"):
        generate(gpt2, [[5]], GenerateConfig(stop=("x",)))
    with pytest.raises(RonnaError, match="no text before its end"):
        generate(gpt2, [[5]], GenerateConfig(beams=2), on_token=print)
    with pytest.raises(RonnaError, match="first token of the decoder is not known"):
        generate(models["t5"], [[5]], config)


def test_tokens_and_text_come_as_they_are_made(models, prompts):
    calls = []
    # Each letter might begin a stop string, so its text comes with the next token or the end.
    config = GenerateConfig(max_tokens=14, stop=tuple(letters([token]) + "?" for token in range(VOCAB)))
    found = generate(
        models["gpt2"], prompts, config, eos=EOS, decode=letters, on_token=lambda *call: calls.append(call)
    )
    plain = generate(models["gpt2"], prompts, GenerateConfig(max_tokens=14), eos=EOS)
    assert [g.tokens for g in found] == [g.tokens for g in plain]
    for index, generation in enumerate(found):
        mine = [call for call in calls if call[0] == index]
        assert "".join(text for _, _, text, _ in mine) == generation.text == letters(generation.tokens)
        assert [finish for *_, finish in mine] == [None] * (len(mine) - 1) + [generation.finish]
        assert [token for _, token, _, _ in mine][: len(generation.tokens)] == generation.tokens


def test_stop_strings_cut_the_text(models, prompts):
    config = GenerateConfig(max_tokens=14)
    free = generate(models["gpt2"], prompts, config, decode=letters)
    stop = free[0].text[2:4]
    streamed: dict[int, str] = {}

    def on_token(index, token, text, finish):
        streamed[index] = streamed.get(index, "") + text

    config = GenerateConfig(max_tokens=14, stop=("??", stop))
    for callback in (None, on_token):
        found = generate(models["gpt2"], prompts, config, decode=letters, on_token=callback)
        for before, after in zip(free, found, strict=True):
            place = before.text.find(stop)
            assert after.finish == ("length" if place < 0 else "stop")
            assert after.text == before.text[: place if place >= 0 else None]
            assert after.tokens == before.tokens[: place + 2 if place >= 0 else None]
    assert [streamed[i] for i in range(len(found))] == [g.text for g in found]
    assert found[0].finish == "stop"


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_only_what_is_needed_is_computed(models, prompts, name):
    rows, fed = [], []
    model = models[name].train()
    handles = [
        model.head.register_forward_hook(lambda _, args, out: rows.append(len(out))),
        model.decoder.register_forward_hook(lambda _, args, out: fed.append(len(out))),
    ]
    config = GenerateConfig(max_tokens=14, temperature=1.0)
    found = generate(model, prompts, config, eos=EOS, start=START)
    for handle in handles:
        handle.remove()
    made = [len(g.tokens) + (g.finish == "eos") for g in found]
    # The head sees one position a sequence, and a sequence that has ended is seen no more.
    assert rows == [sum(n > step for n in made) for step in range(max(made))]
    assert fed[1:] == rows[1:]
    assert len(set(rows)) > 1
    assert model.training and not model.eval().training


def plain_loop(model, document, length, stride):
    """Each token from the first window that reaches it, one forward pass a token."""
    nats = 0.0
    for i in range(1, len(document)):
        window = max(0, math.ceil((i - length) / stride))
        inputs = torch.tensor(document[window * stride : i])
        log_p = model(inputs, Sequences.of([len(inputs)]))[-1].log_softmax(-1)
        nats -= log_p[document[i]].item()
    return nats


@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 3), (5, 1), (48, 20), (1, 1)])
@pytest.mark.parametrize("bos", [None, START])
def test_perplexity_is_that_of_a_plain_loop(models, length, stride, bos):
    g = torch.Generator().manual_seed(1)
    documents = [torch.randint(2, VOCAB, (n,), generator=g).tolist() for n in (17, 0, 1, 30, 2, 9)]
    model = models["llama"].eval()
    begun = [[*([bos] if bos is not None else []), *d] for d in documents]
    with torch.no_grad():
        expected = sum(plain_loop(model, document, length, stride) for document in begun)
    for batch_tokens in (1, 20, 8192):
        nats, count = perplexity(
            model, iter(documents), length=length, stride=stride, bos=bos, batch_tokens=batch_tokens
        )
        assert count == sum(max(0, len(d) - 1) for d in begun)
        assert nats == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_what_has_none(models):
    assert perplexity(models["gpt2"], [[], [4]], length=8, stride=8) == (0.0, 0)
    with pytest.raises(RonnaError, match="length: found 49"):
        perplexity(models["gpt2"], [[4, 5]], length=49, stride=8)
    with pytest.raises(RonnaError, match="stride: found 9"):
        perplexity(models["gpt2"], [[4, 5]], length=8, stride=9)
    with pytest.raises(RonnaError, match="perplexity is that of a decoder"):
        perplexity(models["t5"], [[4, 5]], length=8, stride=8)
