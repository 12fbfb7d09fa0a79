"""Optimizers of one tensor, or some rows of one, at a time; weights in bfloat16 rounded by chance."""

import sys
import weakref

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from ronna.train import portions
from ronna.train.lean import AdamW8bit, Apollo
from ronna.train.optim import (
    SGD,
    Adafactor,
    Adam,
    AdamW,
    Muon,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
)
from ronna.train.portions import Portions, rounded
from ronna.train.shelf import Shelf

SHAPES = {
    "embedding.tokens.weight": (40, 8),
    "decoder.blocks.0.ffn.up.weight": (12, 8),
    "decoder.blocks.0.ffn.up.bias": (12,),
    "decoder.final_norm.weight": (8,),
}
CONFIGS = [AdamW(lr=1e-2), Adam(lr=1e-2), SGD(), Adafactor(), Muon(lr=1e-2), Apollo(lr=1e-2)]


def weights(dtype: torch.dtype = torch.float32) -> dict[str, Parameter]:
    rng = torch.Generator().manual_seed(1)
    drawn = {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}
    return {name: Parameter(x.to(dtype) if x.ndim > 1 else x) for name, x in drawn.items()}


def set_gradients(named: dict[str, Parameter], step: int) -> None:
    rng = torch.Generator().manual_seed(10 + step)
    for p in named.values():
        p.grad = torch.randn(p.shape, generator=rng).to(p.dtype)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
def test_one_at_a_time_is_all_at_once(config, monkeypatch):
    monkeypatch.setattr(portions, "ROWS", 64)
    whole, parts = weights(), weights()
    optimizers, own = build_optimizer(config, whole.items()), Portions(config, parts.items())
    cut = config.kind in portions.ELEMENTWISE
    assert len(own.of[parts["embedding.tokens.weight"]]) == (5 if cut else 1)
    for step in range(3):
        set_gradients(whole, step)
        set_gradients(parts, step)
        for optimizer in optimizers:
            optimizer.step()
        for p in parts.values():
            own.step(p, seed=step)
    for name in whole:
        assert torch.equal(parts[name], whole[name]), name


def test_a_portion_is_named_by_its_rows(monkeypatch):
    monkeypatch.setattr(portions, "ROWS", 128)
    names = [name for name, _ in Portions(AdamW(), weights().items()).named_parameters()]
    assert names[:3] == [f"embedding.tokens.weight[{a}:{b}]" for a, b in ((0, 16), (16, 32), (32, 40))]
    assert names[3:] == list(SHAPES)[1:]


def test_tied_and_frozen_parameters():
    named = weights()
    named["decoder.final_norm.weight"].requires_grad_(False)
    own = Portions(AdamW(), [*named.items(), ("head.logits.weight", named["embedding.tokens.weight"])])
    names = [name for name, _ in own.named_parameters()]
    assert names == [n for n in SHAPES if n != "decoder.final_norm.weight"]


def test_rounding_is_right_on_average_and_by_its_seed():
    exact = torch.tensor([1.0, -2.5, 0.0, 3e-30, float("inf"), -float("inf")])
    assert torch.equal(rounded(exact, 0).float(), exact.bfloat16().float())
    for value in (1.0 + 2**-10, -1.0 - 3 * 2**-10, 1e-3, 0.9999):
        x = torch.full((100_000,), value)
        y = rounded(x, 7).double()
        low, high = y.min(), y.max()
        assert low <= value <= high and len(y.unique()) <= 2
        assert abs(float(y.mean()) - float(x[0])) < 5 * float(high - low) / 2 / 100_000**0.5
        assert torch.equal(rounded(x, 7), rounded(x, 7)) and not torch.equal(rounded(x, 7), rounded(x, 8))


@pytest.mark.parametrize("config", [*CONFIGS, AdamW8bit(lr=1e-2)], ids=lambda c: c.kind)
def test_weights_in_bf16_are_stepped_in_float32(config, monkeypatch):
    if isinstance(config, AdamW8bit):
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(portions, "ROWS", 64)
    named = weights(torch.bfloat16)
    own = Portions(config, named.items())
    for step in range(2):
        set_gradients(named, step)
        for p in named.values():
            own.step(p, seed=step)
    assert [p.dtype for p in named.values()] == [torch.bfloat16] * 2 + [torch.float32] * 2
    states = optimizer_tensors(own.optimizers, own.named_parameters())
    assert {t.dtype for t in states.values()} <= {torch.float32, torch.uint8}
    for name, master in own.named_parameters():
        held = master.untyped_storage().nbytes()
        assert held == (0 if "embedding" in name or "up.weight" in name else master.numel() * 4)
        assert master.grad is None


def test_steps_too_small_for_bf16_are_not_lost():
    weight = Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    own = Portions(SGD(lr=1e-4, momentum=0.0), [("w", weight)])
    for step in range(100):
        weight.grad = torch.ones(64, 64, dtype=torch.bfloat16)
        own.step(weight, seed=step)
    assert float(weight.detach().float().mean()) == pytest.approx(0.99, abs=5e-4)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
def test_states_come_back_to_the_bit(config, monkeypatch):
    monkeypatch.setattr(portions, "ROWS", 64)

    def run(named: dict[str, Parameter], own: Portions, steps: range) -> None:
        for step in steps:
            set_gradients(named, step)
            for p in named.values():
                own.step(p, seed=step)

    whole, cut = weights(torch.bfloat16), weights(torch.bfloat16)
    run(whole, Portions(config, whole.items()), range(4))
    before = Portions(config, cut.items())
    run(cut, before, range(2))
    saved = {n: t.clone() for n, t in optimizer_tensors(before.optimizers, before.named_parameters()).items()}
    after = Portions(config, cut.items())
    load_optimizer_tensors(after.optimizers, after.named_parameters(), saved)
    run(cut, after, range(2, 4))
    assert all(torch.equal(cut[n], whole[n]) for n in whole)


@pytest.mark.skipif(sys.platform != "linux", reason="the shelf needs Linux")
def test_states_that_wait_on_a_shelf_are_not_loaded_together(tmp_path, monkeypatch):
    """While those of one portion are looked up, the ones before are in files."""
    monkeypatch.setattr(portions, "LEAST", 64)
    named = weights()
    own = Portions(AdamW(), named.items(), offload=True, shelf=Shelf(tmp_path))
    set_gradients(named, 0)
    for p in named.values():
        own.step(p, seed=0)
    saved = {n: t.clone() for n, t in optimizer_tensors(own.optimizers, own.named_parameters()).items()}
    alive: list[weakref.ref[Tensor]] = []

    class File(dict):
        most = 0

        def __getitem__(self, name: str) -> Tensor:
            found = super().__getitem__(name).clone()
            alive.append(weakref.ref(found.untyped_storage()))
            File.most = max(File.most, sum(ref() is not None for ref in alive))
            return found

    after = Portions(AdamW(), named.items(), offload=True, shelf=Shelf(tmp_path))
    load_optimizer_tensors(after.optimizers, after.named_parameters(), File(saved))
    large = [n for n, t in saved.items() if t.numel() * 4 >= 64]
    assert len(after.shelved) == len(large) == 4
    small = len(saved) - len(large)  # counters and the like stay
    assert File.most <= 3 + small
    found = optimizer_tensors(after.optimizers, after.named_parameters())
    assert all(torch.equal(found[n], saved[n]) for n in saved)
    for tensor in found.values():
        after.release(tensor)  # of what is not on the shelf it does nothing
    assert all(torch.equal(found[n], saved[n]) for n in saved)
