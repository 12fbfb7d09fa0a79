"""Each check at start sees the fault it is for, and passes a sound model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ronna.base.errors import RonnaError
from ronna.model import config as c
from ronna.model.init import build, hold
from ronna.model.sequences import Sequences
from ronna.model.transformer import Transformer
from ronna.objectives.base import Batch, Loss, Sample, collate
from ronna.objectives.clm import CausalLM
from ronna.train.contract import SKETCH, FirstStep, check_start, refuse_failed, rms, shortest, sketch
from ronna.train.loop import gradients
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


class Forgetful(CausalLM):
    """Learns nothing of a single sequence."""

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        loss = super().loss(model, batch)
        return Loss({k: v * (len(batch.sequences) > 1) for k, v in loss.sums.items()}, loss.stats)


@pytest.mark.parametrize("objective", [PerBatch, Forgetful])
@pytest.mark.parametrize("narrow", [False, True])
def test_what_depends_on_the_cut_is_seen_whatever_weights_are_held_in(objective, narrow):
    some = model()
    hold(some, torch.bfloat16 if narrow else torch.float32)
    assert failed(check_start(some, CausalLM(0, 1), [samples()])) == set()
    assert failed(check_start(some, objective(0, 1), [samples()])) == {"accumulation"}


def deep() -> Transformer:
    block = c.Block(c.Attention(4, 16, bias=True), c.FeedForward(256), c.Norm())
    stack = c.Stack((block,) * 24, True, c.Norm())
    return build(c.Model(64, c.Embedding(VOCAB, c.LearnedPositions(32)), c.Head(), decoder=stack), seed=0)


def allocated(work) -> int:
    """The most bytes that torch holds at once for it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([size for _, size in sorted(events)]).max())


@pytest.mark.parametrize("narrow", [False, True])
def test_checks_hold_less_than_a_step(narrow, monkeypatch):
    """Of a model whose weights are most of it: one gradient, one block in fp32, activations of a few tokens."""
    monkeypatch.setattr("ronna.train.contract.SKETCH", 16)  # the matrices are small
    some, objective = deep(), CausalLM(0, 1)
    hold(some, torch.bfloat16 if narrow else torch.float32)
    weights = sum(p.numel() * p.element_size() for p in some.parameters())
    few = samples(lengths=(5, 6))
    assert allocated(lambda: check_start(some, objective, [few])) < 0.5 * weights
    assert not any("forward" in vars(module) for module in some.modules())
    step = allocated(lambda: gradients(some, objective, [collate(objective, few)], seed=0))
    assert step > weights


def test_a_sketch_is_small_linear_and_sees_every_number():
    a, b = (torch.randn(96, 512, generator=torch.Generator().manual_seed(i)) for i in range(2))
    torch.testing.assert_close(sketch(a) + sketch(b), sketch(a + b), rtol=0, atol=1e-5)
    assert len(sketch(a)) <= SKETCH + len(a)
    looked_at = torch.arange(96 * 512.0).view(96, 512)
    columns = {int(x) % 512 for x in sketch(looked_at)[:-96]}
    assert len(columns) == 512
    for place in ((0, 1), (50, 7), (95, 511)):
        other = a.clone()
        other[place] += 1.0
        assert float((sketch(other) - sketch(a)).abs().max()) > 0.04
    assert len(sketch(torch.tensor(3.0))) == 2 and len(sketch(torch.ones(5))) == 10


def test_no_more_is_looked_at_than_fits_a_micro_batch():
    some = samples(lengths=(9, 5, 7, 12, 6))
    assert [len(s.tokens) for s in shortest(some, 1, room=20)] == [5, 6, 7]
    assert [len(s.tokens) for s in shortest(some, 1, room=3)] == [5, 6]  # two can be told apart
    assert [len(s.tokens) for s in shortest(some[:4], 2, room=99)] == [9, 5, 7, 12]
    assert len(shortest(some * 9, 1, room=10**6)) == 8


def test_the_size_of_a_weight_is_that_of_all_its_numbers(monkeypatch):
    monkeypatch.setattr("ronna.train.contract.PIECE", 7)
    x = torch.randn(10, 10)
    assert rms(x) == pytest.approx(float(x.square().mean().sqrt()), rel=1e-5)


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
    hook = FirstStep(some, lambda _: lr, gradient_norm)
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
