"""The planner's operations beside those that torch counts, and what each field does to the seconds."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ronna.base.errors import RonnaError
from ronna.model.config import Model
from ronna.model.families import preset
from ronna.model.recompute import Recompute, recompute_blocks
from ronna.objectives.base import collate
from ronna.plan.hardware import cpu, device
from ronna.plan.shapes import Adapter, Lengths
from ronna.plan.stretches import Step
from ronna.plan.time import Time, flops, micro_batch, optimizer, step_time
from ronna.plan.weights import Optimizer
from ronna.plan.work import PRODUCTS
from ronna.train.optim import Muon, build_optimizer
from ronna.train.rows import EmbeddingRows

from .test_memory import RAGGED, built, first_of_each_family, objective, samples, small, step_of

FULL = [40] * 4
BERT, LLAMA = preset("bert-mini")[1], preset("llama-60m")[1]
MACHINE = cpu(2, ["avx512_bf16"], 2**34)
STEP = Step(Lengths(8, 128), predicted=150)


def counted(model: Model, step: Step, lengths: list[int], task: str) -> tuple[int, int]:
    """Floating-point operations of all products of a micro-batch up to the loss, and after it, by torch."""
    made, work = built(model, step).train(), objective(model, task)
    recompute_blocks(made, Recompute(blocks=step.blocks, feeds=step.feeds))
    EmbeddingRows(made)
    batch = collate(work, samples(model, lengths, task))
    with FlopCounterMode(display=False) as forward:
        loss: Any = sum(work.loss(made, batch).sums.values())
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def products(work: Mapping[str, float]) -> float:
    return sum(work[kind] for kind in PRODUCTS)


def planned(model: Model, step: Step) -> tuple[float, float]:
    parts = micro_batch(model, step)
    return products(parts.forward) + products(parts.loss), products(parts.backward) + products(parts.again)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("name", first_of_each_family())
def test_products_are_those_of_torch(name: str, compute: Any) -> None:
    model = small(name, dropout=0.1)
    for lengths in (FULL, RAGGED):
        step = step_of(model, lengths, "lm", compute=compute)
        assert planned(model, step) == counted(model, step, lengths, "lm")


@pytest.mark.parametrize(
    ("name", "lengths", "settings"),
    [
        ("llama-tiny", [40] * 3, {"num_key_value_heads": 2}),
        ("qwen3-0.6b", [40] * 2, {"hidden_size": 64, "num_hidden_layers": 1}),
        ("modernbert-tiny", [300, 290, 40], {}),  # a window
        ("bert-tiny", [9, 8], {}),  # too few to join the weights
    ],
)
def test_products_of_other_shapes(name: str, lengths: list[int], settings: dict[str, Any]) -> None:
    model = small(name, **settings)
    step = step_of(model, lengths, "lm")
    assert planned(model, step) == counted(model, step, lengths, "lm")


def test_products_of_the_flash_kernel() -> None:
    """Which torch does not count on a CPU."""
    model, lengths = small("bert-tiny", max_position_embeddings=1030), [1024] * 2
    step = step_of(model, lengths, "lm")
    parts, pairs = micro_batch(model, step), 4 * 2 * 1024 * 1024 * model.dim
    assert parts.forward["flash"] == 3 * pairs
    assert parts.backward["flash backward"] == 3 * 2.5 * pairs
    forward, backward = counted(model, step, lengths, "lm")
    assert planned(model, step) == (forward + 3 * pairs, backward + 3 * 2.5 * pairs)
    causal = micro_batch(small("llama-tiny"), Step(Lengths(2, 1024))).forward["flash"]
    assert causal == 0.75 * parts.forward["flash"] / model.dim * small("llama-tiny").dim


@pytest.mark.parametrize("adapter", [None, Adapter(4), Adapter(8, ("q", "v"))])
@pytest.mark.parametrize("name", ["bert-tiny", "modernbert-tiny", "gpt2-tiny", "llama-tiny"])
def test_products_of_a_classifier(name: str, adapter: Adapter | None) -> None:
    model = small(name, "classify", dropout=0.1)
    step = step_of(model, RAGGED, "classify", adapter=adapter)
    assert planned(model, step) == counted(model, step, RAGGED, "classify")


@pytest.mark.parametrize(("blocks", "feeds"), [(1, 0), (3, 0), (0, 2), (1, 1)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", ["bert-tiny", "llama-tiny", "t5-tiny"])
def test_products_done_again(name: str, dropout: float, blocks: int, feeds: int) -> None:
    model = small(name, dropout=dropout)
    step = step_of(model, FULL, "lm", blocks=blocks, feeds=feeds)
    assert planned(model, step) == counted(model, step, FULL, "lm")


def test_a_step_needs_six_operations_a_token_and_weight() -> None:
    model = replace(LLAMA, head=replace(LLAMA.head, tied=False))  # type: ignore[type-var]
    step = Step(Lengths(4, 256))
    weights = sum(b.ffn.weights(model.dim) + b.attention.weights(model.dim) for b in model.last.blocks)
    weights += model.dim * model.embedding.vocab
    pairs = sum(12 * 256 * 128 * b.attention.heads * b.attention.head_dim for b in model.last.blocks)
    assert flops(model, step) == 6 * 4 * 256 * weights + 4 * pairs
    assert flops(model, replace(step, micro_batches=3, blocks=4, feeds=1, compute="bf16")) == 3 * flops(model, step)
    adapted = flops(model, replace(step, adapter=Adapter(8)))
    assert 4 * 1024 * weights < adapted < 4.4 * 1024 * weights + 4 * pairs
    assert flops(BERT, STEP) < flops(BERT, replace(STEP, predicted=None))


def took(model: Model = BERT, machine: Any = MACHINE, **changes: Any) -> Time:
    return step_time(model, replace(STEP, **changes), machine)


@pytest.mark.parametrize("model", [BERT, LLAMA])
def test_more_takes_longer(model: Model) -> None:
    base = took(model)
    parts = (base.forward, base.backward, base.recomputation, base.loss, base.optimizer, base.offload, base.overhead)
    assert base.total == pytest.approx(sum(parts))
    assert base.recomputation == base.offload == 0
    for more in (
        {"lengths": Lengths(9, 128)},
        {"lengths": Lengths(8, 160)},
        {"lengths": Lengths(4, 256)},
        {"predicted": 160},
        {"micro_batches": 2},
        {"blocks": 1},
        {"blocks": 2, "feeds": 1},
        {"fused_backward": True},
        {"offload": ("optimizer",)},
        {"offload": ("activations",)},
        {"optimizer": Optimizer("muon")},
        {"optimizer": Optimizer("adafactor")},
    ):
        assert took(model, **more).total > base.total, more
    assert took(lengths=Lengths(16, 128, 1024, rows=8)).total > took().total  # a mask
    assert took(model, blocks=2).total > took(model, blocks=1).total > took(model, feeds=1).total > base.total
    assert took(model, clip=False).total < base.total
    assert took(model, compute="bf16").total < base.total
    assert took(model, adapter=Adapter(8)).total < base.total
    assert took(model, adapter=Adapter(16)).total > took(model, adapter=Adapter(8)).total
    assert took(model, adapter=Adapter(8), compute="bf16", quantize="nf4").total > took(
        model, adapter=Adapter(8), compute="bf16").total  # fmt: skip


def test_phases() -> None:
    base = took()
    assert took(blocks=4).recomputation == pytest.approx(base.forward, rel=0.35)
    assert base.backward == pytest.approx(2 * base.forward, rel=0.25)
    twice, once = took(fused_backward=True), took(fused_backward=True, clip=False)
    assert twice.backward == pytest.approx(2 * once.backward)
    assert took(micro_batches=3).optimizer == base.optimizer
    assert took(micro_batches=3).flops == pytest.approx(3 * base.flops)
    assert took(offload=("optimizer",)).offload == 2 * 8 * BERT.params() / MACHINE.host
    disk = replace(MACHINE, host=2 * MACHINE.host)
    assert took(machine=disk, offload=("activations",)).offload == took(offload=("activations",)).offload / 2


def test_a_faster_machine_is_faster() -> None:
    base = took(LLAMA)
    rates = {name: 2 * rate for name, rate in MACHINE.rates.items()}
    assert base.total / 2 < took(LLAMA, replace(MACHINE, rates=rates)).total < base.total
    assert took(LLAMA, replace(MACHINE, bandwidth=2 * MACHINE.bandwidth)).total < base.total
    slow = replace(MACHINE, costs={"fp32 linear": 1e-9, "calls": 1e-3})
    assert took(LLAMA, slow).overhead > 100 * base.overhead
    assert took(LLAMA, slow).forward > base.forward
    large = Lengths(128, 512)
    fast, older = (took(LLAMA, device(name)[1], compute="bf16", lengths=large) for name in ("h200", "a100-80gb"))
    assert fast.total < older.total < took(LLAMA, compute="bf16", lengths=large).total
    assert fast.overhead == 0 < took(LLAMA, device("h200")[1]).overhead  # hidden behind the work, if there is enough
    muon = {"optimizer": Optimizer("muon")}
    without = replace(MACHINE, rates=dict(MACHINE.rates) | {"bf16": 0.0})
    assert took(**muon).total < took(machine=without, **muon).total  # its products are in bf16 where there is that
    assert fast.flops < took(LLAMA, lengths=large).flops  # attention to what may be seen alone


def test_a_device_without_bf16() -> None:
    with pytest.raises(RonnaError, match="computes no bf16"):
        took(machine=device("t4")[1], compute="bf16")
    assert took(machine=device("t4")[1]).total > 0


def test_operations_of_muon() -> None:
    model = small("llama-tiny")
    step = step_of(model, FULL, "lm", optimizer=Optimizer("muon"))
    made = built(model, step)
    matrices = [(name, p) for name, p in made.named_parameters() if p.ndim == 2 and "blocks" in name]
    for _, p in matrices:
        p.grad = torch.randn_like(p)
    with FlopCounterMode(display=False) as counter:
        build_optimizer(Muon(), matrices)[0].step()
    assert optimizer(model, step)["narrow"] == counter.get_total_flops()
