"""Eleven mistakes that a parity test must not let pass: each moves the logits far beyond the bound."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from ronna.model import config as c
from ronna.model.transformer import Transformer

from .cases import CASES, difference, ours, texts, theirs
from .conftest import Pair
from .test_logits import BOUND


def blocks(model: c.Model, change: Callable[[c.Block], c.Block]) -> c.Model:
    """The model with every block changed."""

    def stack(part: c.Stack | None) -> c.Stack | None:
        return part and replace(part, blocks=tuple(change(b) for b in part.blocks))

    return replace(model, encoder=stack(model.encoder), decoder=stack(model.decoder))


def attentions(model: c.Model, change: Callable[[c.Attention], c.Attention]) -> c.Model:
    return blocks(model, lambda b: replace(b, attention=change(b.attention)))


def wider(attention: c.Attention) -> c.Attention:
    return replace(attention, window=attention.window and attention.window + 1)


def decoder(model: c.Model) -> c.Stack:
    assert model.decoder is not None
    return model.decoder


def encoder(model: c.Model) -> c.Stack:
    assert model.encoder is not None
    return model.encoder


MISTAKES: dict[tuple[str, str], Callable[[c.Model], c.Model]] = {
    ("t5 v1.0", "attention scaled"): lambda m: attentions(m, lambda a: replace(a, scale=None)),
    ("t5 v1.0", "no relative bias"): lambda m: replace(m, decoder=replace(decoder(m), relative_bias=None)),
    ("t5 v1.0", "causal encoder"): lambda m: replace(m, encoder=replace(encoder(m), causal=True)),
    ("t5 v1.0", "head not scaled"): lambda m: replace(m, head=c.Head()),
    ("modernbert", "window too wide by one"): lambda m: attentions(m, wider),
    ("modernbert", "one theta"): lambda m: attentions(m, lambda a: replace(a, rotary=c.Rotary())),
    ("bert", "pre-norm"): lambda m: blocks(m, lambda b: replace(b, norm_at="pre")),
    ("gpt2", "not causal"): lambda m: replace(m, decoder=replace(decoder(m), causal=False)),
    ("gpt2", "exact gelu"): lambda m: blocks(m, lambda b: replace(b, ffn=replace(b.ffn, act="gelu"))),
    ("qwen3", "no norm on q and k"): lambda m: attentions(m, lambda a: replace(a, qk_norm=None)),
    ("llama", "another theta"): lambda m: attentions(m, lambda a: replace(a, rotary=c.Rotary(5e5))),
}


def test_every_mistake_shows(pair: Pair) -> None:
    wanted = theirs(pair.case, pair.theirs, texts())
    for (family, mistake), change in MISTAKES.items():
        if family == pair.name:
            wrong = Transformer(change(pair.ours.cfg)).eval()
            wrong.load_state_dict(pair.ours.state_dict(), strict=False)
            assert difference(ours(pair.case, wrong, texts()), wanted) > 3 * BOUND, mistake


@pytest.mark.parametrize("name", sorted({family for family, _ in MISTAKES}))
def test_every_mistake_names_a_case(name: str) -> None:
    assert name in CASES
