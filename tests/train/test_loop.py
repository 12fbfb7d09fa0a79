"""The loop on a tiny model: what a step computes, and what may not change it."""

import json
import math
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from ronna.base.errors import RonnaError
from ronna.model.config import Attention, Block, Embedding, FeedForward, Head, LearnedPositions, Model, Norm, Stack
from ronna.model.init import build
from ronna.model.transformer import Transformer
from ronna.objectives.base import Batch, Loss, Sample, collate
from ronna.objectives.clm import CausalLM
from ronna.objectives.documents import Piece
from ronna.train.feed import Feed, length_plan, row_plan
from ronna.train.loop import Evaluation, Progress, Run, TrainConfig, gradients
from ronna.train.optim import SGD, AdamW, build_optimizer
from ronna.train.schedule import Constant

VOCAB = 61
# Losses of twenty steps of AdamW on a fixed seed, fp32; no change of the code may move them.
GOLDEN = [
    4.11465, 4.09807, 4.11228, 4.02916, 4.02858, 3.98811, 3.93668, 3.91731, 3.90497, 3.85188,
    3.79284, 3.82046, 3.73087, 3.70139, 3.71212, 3.60563, 3.63491, 3.57883, 3.52395, 3.47353,
]  # fmt: skip


class Quiet:
    def __init__(self) -> None:
        self.lines: list[tuple[int, str, dict[str, float]]] = []

    def log(self, step: int, values: dict[str, float], kind: str = "train") -> None:
        self.lines.append((step, kind, dict(values)))


def tiny(dropout: float = 0.0) -> Transformer:
    attention = Attention(2, 8, bias=True, out_bias=True, dropout=dropout)
    block = Block(attention, FeedForward(32, bias=True), Norm(), dropout=dropout)
    embedding = Embedding(VOCAB, LearnedPositions(32), dropout=dropout)
    return build(Model(16, embedding, Head(), decoder=Stack((block,) * 2, True, Norm())), seed=1)


def documents(n: int = 24) -> list[list[Piece]]:
    rng = np.random.default_rng(0)
    return [[Piece(rng.integers(2, VOCAB, size=int(rng.integers(3, 20))), i, None, None)] for i in range(n)]


def feed(data: list[list[Piece]], batch: int, micro: int) -> Feed:
    plan, _ = row_plan(len(data), 5, batch, micro)
    return Feed(CausalLM(0, 1), data, plan, 5, torch.device("cpu"))


def run(model: Transformer, steps: int = 20, batch: int = 8, micro: int = 8, optim=None, **changes) -> Run:
    optimizers = build_optimizer(optim or AdamW(lr=1e-2), model.named_parameters())
    config = TrainConfig(batch=batch, micro_batch=micro, log_every=1)
    made = Run(
        model, CausalLM(0, 1), feed(documents(), batch, micro), optimizers, Constant(), config, steps, 3, Quiet()
    )
    return replace(made, **changes)


def weights(model: Transformer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def whole_gradient(model: Transformer, micro: int) -> dict[str, torch.Tensor]:
    model.zero_grad()
    gradients(model, CausalLM(0, 1), feed(documents(), 8, micro)(0), seed=0)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro", [1, 3, 4])
def test_accumulation_is_the_whole_batch(micro):
    model = tiny().double()
    model.compute = torch.double
    whole, cut = whole_gradient(model, 8), whole_gradient(model, micro)
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-9, atol=1e-14)


def test_gradient_is_that_of_the_mean_over_tokens():
    model = tiny().double()
    model.compute = torch.double
    ours = whole_gradient(model, 2)
    samples = [s for micro in feed(documents(), 8, 8).samples(0) for s in micro]
    batch = collate(CausalLM(0, 1), samples)
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(batch.tokens, batch.sequences), batch.labels).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-9, atol=1e-14)


def test_twenty_steps_keep_their_golden_losses():
    training = run(tiny())
    training.train()
    losses = [v["loss"] for _, kind, v in training.log.lines if kind == "train"]
    assert losses == pytest.approx(GOLDEN, rel=2e-4)


def test_the_same_seed_gives_the_same_weights_with_dropout():
    first, second, other = (run(tiny(0.1), steps=5, seed=s) for s in (3, 3, 4))
    for training in (first, second, other):
        training.train()
    a, b, c = (weights(t.model) for t in (first, second, other))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not all(torch.equal(a[n], c[n]) for n in a)


def test_dropout_differs_between_steps_and_micro_batches():
    """The same data at every step: with a frozen model, only dropout can change the loss."""
    model = tiny(0.3)
    training = run(model, steps=6, optim=SGD(lr=1e-30, momentum=0.0))
    same = training.feed(0)
    training.feed = lambda step: same
    training.train()
    losses = [v["loss"] for _, kind, v in training.log.lines if kind == "train"]
    assert len(set(losses)) == 6


class Spoiled(CausalLM):
    """NaN loss at the steps in `bad`."""

    bad: ClassVar[set[int]] = {2}
    calls = 0

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        loss = super().loss(model, batch)
        if Spoiled.calls in Spoiled.bad:
            loss.sums["clm"] = loss.sums["clm"] * math.nan
        Spoiled.calls += 1
        return loss


def test_a_non_finite_step_changes_nothing_and_is_counted():
    Spoiled.calls = 0
    training = run(tiny(), steps=4, objective=Spoiled(0, 1))
    seen: list[dict[str, torch.Tensor]] = []
    original = training.step

    def watched(window):
        seen.append(weights(training.model))
        original(window)

    training.step = watched
    training.train()
    assert training.progress.skipped == 1
    assert all(torch.equal(seen[2][n], seen[3][n]) for n in seen[2])
    assert not torch.equal(seen[1]["embedding.tokens.weight"], seen[2]["embedding.tokens.weight"])
    assert [(s, k) for s, k, _ in training.log.lines if k == "skipped"] == [(2, "skipped")]


def test_too_many_non_finite_steps_stop_the_run(monkeypatch):
    monkeypatch.setattr(Spoiled, "bad", set(range(100)))
    Spoiled.calls = 0
    training = run(tiny(), objective=Spoiled(0, 1), config=TrainConfig(batch=8, max_skipped=3))
    before = weights(training.model)
    with pytest.raises(RonnaError, match="3 steps in a row"):
        training.train()
    assert all(torch.equal(before[n], p) for n, p in training.model.named_parameters())


def test_patience_stops_at_the_best():
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.9, 0.9])
    best: list[int] = []
    training = run(tiny(), steps=12, config=TrainConfig(batch=8, evaluate_every=2, patience=2))
    training.evaluate = lambda stop: Evaluation({"accuracy": next(scores)}, "accuracy", True)
    training.improved = lambda: best.append(training.progress.step)
    progress = training.train()
    assert best == [2, 4] and progress.step == 8 and progress.best_step == 4


def test_a_run_may_be_given_up_after_an_evaluation_and_is_saved():
    saved: list[int] = []
    training = run(tiny(), steps=12, config=TrainConfig(batch=8, evaluate_every=2, save_every=100))
    training.evaluate = lambda stop: Evaluation({"accuracy": 0.5}, "accuracy", True)
    training.give_up = lambda progress: progress.step >= 5
    training.save = lambda progress: saved.append(progress.step)
    progress = training.train()
    assert progress.step == 6 and saved == [6] and progress.monitor == "accuracy"


def test_an_undefined_score_does_not_stop_a_run_from_being_saved():
    training = run(tiny(), steps=1, config=TrainConfig(batch=8, evaluate_every=1))
    training.evaluate = lambda stop: Evaluation({"spearman": -math.inf, "loss": math.nan}, "spearman", True)
    state = json.loads(json.dumps(training.train().to_json(), allow_nan=False))
    assert state["best"] is None and state["history"] == [{"step": 1, "spearman": None, "loss": None}]
    assert Progress(**state).step == 1


def test_a_lower_loss_is_better():
    scores = iter([3.0, 2.0, 2.5])
    best: list[int] = []
    training = run(tiny(), steps=3, config=TrainConfig(batch=8, evaluate_every=1))
    training.evaluate = lambda stop: Evaluation({"loss": next(scores)}, "loss", False)
    training.improved = lambda: best.append(training.progress.step)
    training.train()
    assert best == [1, 2]


def test_saving_follows_its_own_beat_and_the_end():
    saved: list[int] = []
    training = run(tiny(), steps=7, config=TrainConfig(batch=8, save_every=3), save=lambda p: saved.append(p.step))
    training.train()
    assert saved == [3, 6, 7]


def test_length_plan_gives_each_item_once_an_epoch_in_small_spread():
    lengths = np.random.default_rng(0).integers(1, 100, size=1003)
    plan, per_epoch = length_plan(lengths, seed=1, batch=10, micro=4)
    assert per_epoch == 101
    for epoch in (0, 1):
        steps = [plan(epoch * per_epoch + i) for i in range(per_epoch)]
        assert sorted(i for step in steps for micro in step for _, i in micro) == list(range(1003))
        assert {len(m) for step in steps for m in step} <= {1, 2, 3, 4}
        spread = [np.ptp([lengths[i] for m in step for _, i in m]) for step in steps]
        assert np.mean(spread) < 10
    assert plan(0) != plan(per_epoch)


def test_batches_of_tokens_hold_each_item_once_an_epoch_whatever_is_asked_first():
    lengths = np.random.default_rng(0).integers(1, 60, 300)
    plan, per_epoch = length_plan(lengths, seed=1, batch=10, micro=None, batch_tokens=256)
    steps = [plan(step) for step in range(4 * per_epoch)]
    assert all(sum(lengths[i] for _, i in micro) <= 256 for step in steps for micro in step)
    pairs = [pair for step in steps for micro in step for pair in micro]
    places = [place for place, _ in pairs]
    assert len(set(places)) == len(places)
    for epoch in range(3):
        assert sorted(i for place, i in pairs if place // 300 == epoch) == list(range(300))
    again, _ = length_plan(lengths, seed=1, batch=10, micro=3, batch_tokens=256)
    assert [p for micro in again(3 * per_epoch) for p in micro] == [p for micro in steps[3 * per_epoch] for p in micro]
    assert all(len(micro) <= 3 for micro in again(0))


def test_a_batch_without_targets_is_skipped_and_counted():
    training = run(tiny(), steps=2)
    empty = Sample(np.array([3, 4]), np.array([], dtype=np.int64), np.array([], dtype=np.int64))
    training.feed = lambda step: [collate(CausalLM(0, 1), [empty])]
    before = weights(training.model)
    progress = training.train()
    assert progress.skipped == 2 and all(torch.equal(before[n], p) for n, p in training.model.named_parameters())
