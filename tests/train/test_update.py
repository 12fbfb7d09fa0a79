"""A step inside the backward pass is the step behind it, with one gradient alive at a time."""

import math

import pytest
import torch

from ronna.objectives.base import Loss
from ronna.objectives.clm import CausalLM
from ronna.train.optim import AdamW, Muon, build_optimizer
from ronna.train.portions import Portions
from ronna.train.rows import EmbeddingRows
from ronna.train.update import FusedUpdate, WholeUpdate

from .test_loop import run, tiny, weights


def fused(model, optim, clip: float) -> dict:
    portions = Portions(optim, model.named_parameters())
    return {"optimizers": portions.optimizers, "update": FusedUpdate(list(model.parameters()), clip, portions)}


def whole(model, optim, clip: float) -> dict:
    optimizers = build_optimizer(optim, model.named_parameters())
    rows = EmbeddingRows(model, sparse=False)
    return {"optimizers": optimizers, "update": WholeUpdate(list(model.parameters()), clip, rows, optimizers)}


@pytest.mark.parametrize("optim", [AdamW(lr=1e-2), Muon(lr=1e-2)], ids=lambda o: o.kind)
@pytest.mark.parametrize("clip", [0.05, 1e3, math.inf])
def test_the_same_weights_to_the_bit(optim, clip):
    models = [tiny(0.1), tiny(0.1)]
    for model, way in zip(models, (fused, whole), strict=True):
        run(model, steps=6, **way(model, optim, clip)).train()
    found, wanted = map(weights, models)
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert not torch.equal(found["embedding.tokens.weight"], weights(tiny())["embedding.tokens.weight"])


@pytest.mark.parametrize("clip", [0.05, math.inf])
def test_one_gradient_at_a_time(clip, monkeypatch):
    model, alive = tiny(), []
    take = Portions.step

    def step(self, weight, seed):
        alive.append(sum(p.grad is not None for p in model.parameters()))
        take(self, weight, seed)

    monkeypatch.setattr(Portions, "step", step)
    way = fused(model, AdamW(), clip)
    run(model, steps=2, **way).train()
    assert alive == [1] * 2 * len(list(model.parameters()))
    assert way["update"].gradient_norm(model.embedding.tokens.weight) > 0


class Poisoned(CausalLM):
    """The loss, or its gradient in the first layer alone, is not a number."""

    def __init__(self, everywhere: bool):
        super().__init__(0, 1)
        self.everywhere = everywhere

    def loss(self, model, batch):
        found = super().loss(model, batch)
        bad = model.embedding.tokens.weight.sum() * 0.0
        if self.everywhere:
            bad = bad * math.nan
        else:
            bad.register_hook(lambda g: g * math.nan)
        return Loss({name: total + bad for name, total in found.sums.items()})


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_gradient_that_is_not_finite_changes_nothing(everywhere):
    model = tiny()
    before = weights(model)
    training = run(model, steps=3, objective=Poisoned(everywhere), **fused(model, AdamW(), 1.0))
    training.train()
    assert training.progress.skipped == 3
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_without_clipping_it_stops_where_it_finds_one():
    model = tiny()
    before = weights(model)
    training = run(model, steps=2, objective=Poisoned(False), **fused(model, AdamW(lr=1e-2), math.inf))
    training.train()
    assert training.progress.skipped == 2
    assert torch.equal(model.embedding.tokens.weight, before["embedding.tokens.weight"])
    assert all(torch.isfinite(p).all() for p in model.parameters())
