"""Each check at start sees the fault it is for, and passes a sound model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ronna.base.errors import RonnaError
from ronna.model import config as c
from ronna.model.init import build
from ronna.model.sequences import Sequences
from ronna.model.transformer import Transformer
from ronna.objectives.base import Batch, Loss, Sample
from ronna.objectives.clm import CausalLM
from ronna.train.contract import FirstStep, check_start, refuse_failed
from ronna.train.update import gradient_norm

VOCAB = 40


def model(causal: bool = True, **changes) -> Transformer:
    block = c.Block(c.Attention(2, 8, bias=True), c.FeedForward(32), c.Norm(), dropout=0.1)
    stack = c.Stack((block,) * 2, causal, c.Norm())
    cfg = c.Model(16, c.Embedding(VOCAB, c.LearnedPositions(32)), c.Head(), decoder=stack)
    return build(replace(cfg, **changes), seed=0)


def samples(low: int = 2, high: int = VOCAB, lengths: tuple[int, ...] = (5, 9, 7, 12)) -> list[Sample]:
    rng = np.random.default_rng(0)
    rows = [rng.integers(low, high, size=n) for n in lengths]
    return [Sample(r, np.arange(len(r)), np.append(r[1:], 1)) for r in rows]


def failed(checks) -> set[str]:
    return {check.name for check in checks if not check.ok}


def test_a_sound_model_passes_and_is_left_as_it_was():
    sound = model().train()
    sound.compute = torch.bfloat16
    before = {n: p.clone() for n, p in sound.named_parameters()}
    checks = check_start(sound, CausalLM(0, 1), [samples()])
    assert failed(checks) == set() and len(checks) == 7
    assert sound.training and sound.compute is torch.bfloat16
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in sound.named_parameters())
    refuse_failed(checks)


def test_a_leak_between_documents_is_seen(monkeypatch):
    monkeypatch.setattr(Sequences, "mask", lambda self, view, *, causal, window: None)
    assert failed(check_start(model(causal=False), CausalLM(0, 1), [samples()])) >= {"document leak"}


class PerBatch(CausalLM):
    """Divides by the micro-batch's own count."""

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        loss = super().loss(model, batch)
        return Loss({k: v / batch.counts[k] * 10 for k, v in loss.sums.items()}, loss.stats)


def test_a_loss_that_depends_on_the_cut_is_seen():
    assert failed(check_start(model(), PerBatch(0, 1), [samples()])) == {"accumulation"}


def test_no_supervised_token_is_refused():
    empty = [Sample(s.tokens, np.zeros(0, np.int64), np.zeros(0, np.int64)) for s in samples()]
    assert failed(check_start(model(), CausalLM(0, 1), [empty])) == {"supervision"}
    assert failed(check_start(model(), CausalLM(0, 1), [])) == {"supervision"}


def test_ids_beyond_the_vocabulary_are_refused():
    checks = check_start(model(), CausalLM(0, 1), [samples(high=VOCAB + 5)])
    assert failed(checks) == {"vocabulary"}
    with pytest.raises(RonnaError, match="the model has 40"):
        refuse_failed(checks)


def test_sequences_beyond_the_positions_are_refused():
    assert failed(check_start(model(), CausalLM(0, 1), [samples(lengths=(5, 33))])) == {"length"}


def test_a_lost_tie_is_seen():
    torn = model()
    torn.head.logits.weight = nn.Parameter(torn.head.logits.weight.detach().clone())
    assert failed(check_start(torn, CausalLM(0, 1), [samples()])) == {"tied weights"}


def test_labels_outside_the_set_are_refused():
    classifier = c.Classifier(3)
    rows = [Sample(s.tokens, s.predict, s.labels, target=3) for s in samples()]
    assert failed(check_start(model(classifier=classifier), CausalLM(0, 1), [rows])) == {"labels"}


def stepped(some: Transformer, lr: float = 1e-2) -> FirstStep:
    """One plain step, then the hook may be called."""
    hook = FirstStep(some, lambda: lr, gradient_norm)
    batch = torch.tensor([3, 4, 5, 6])
    some(batch, Sequences.of([4])).logsumexp(-1).sum().backward()
    with torch.no_grad():
        for p in some.parameters():
            if p.grad is not None:
                p -= lr * p.grad
    return hook


def test_every_tensor_moves_in_a_sound_first_step():
    hook = stepped(model())
    hook(0)
    assert hook.done and set(hook.before) == {n for n, _ in hook.model.named_parameters()}


def test_a_tensor_without_gradient_is_seen():
    idle = model()
    idle.unused = nn.Parameter(torch.ones(3))
    with pytest.raises(RonnaError, match="gradients: none for unused"):
        stepped(idle)(0)


def test_a_tensor_that_does_not_move_is_seen():
    stuck = model()
    hook = stepped(stuck)
    weight = stuck.decoder.blocks[0].ffn.up.weight
    with torch.no_grad():
        weight += 1e-2 * weight.grad  # as if the optimizer had never had it
        weight.copy_(build(stuck.cfg, 0).decoder.blocks[0].ffn.up.weight)
    with pytest.raises(RonnaError, match=r"did not move: decoder\.blocks\.0\.ffn\.up\.weight"):
        hook(0)


def test_a_frozen_tensor_need_not_move():
    frozen = model()
    frozen.embedding.positions.weight.requires_grad_(False)
    hook = stepped(frozen)
    hook(0)
    assert hook.done and "embedding.positions.weight" not in hook.before
