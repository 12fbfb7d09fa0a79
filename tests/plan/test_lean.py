"""The planner's bytes of the ways to save memory beside those that torch holds."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from ronna.model.families import preset
from ronna.model.folder import load_folder, save_folder
from ronna.model.fourbit import FourBitLinear
from ronna.model.init import build, hold
from ronna.model.recompute import Recompute, recompute_blocks
from ronna.objectives.base import collate
from ronna.peft.lora import LoraConfig
from ronna.peft.methods import adapt, freeze_to
from ronna.plan.memory import Step, estimate, model_bytes
from ronna.plan.shapes import Adapter
from ronna.plan.weights import Optimizer, portions, spaces, weights
from ronna.train.lean import AdamW8bit, Apollo
from ronna.train.loop import gradients
from ronna.train.optim import Adafactor, AdamW, Muon
from ronna.train.portions import Portions
from ronna.train.rows import EmbeddingRows
from ronna.train.shelf import LEAST, Shelf
from ronna.train.update import FusedUpdate, WholeUpdate

from .test_memory import kept_bytes, objective, planned_bytes, samples, small, step_of

LENGTHS = [96] * 8
NOT_TORCH = ("weights", "optimizer", "workspace", "holes")
KINDS: dict[str, Any] = {
    "adamw": AdamW(), "adamw8bit": AdamW8bit(), "apollo": Apollo(), "adafactor": Adafactor(), "muon": Muon(),
}  # fmt: skip


def put_away(x: torch.Tensor) -> torch.Tensor:
    """As `ronna.train.shelf.away` does, to where torch's profiler does not count."""
    small = x.nbytes < LEAST or (x.is_leaf and x.requires_grad)
    return x if small else torch.from_numpy(x.detach().float().numpy().copy()).to(x.dtype)


def peak_of_second_step(step: Step, name: str, folder: Path) -> tuple[int, int]:
    """The most bytes that torch holds in a step, states there already, beyond weights and ids; and the plan's."""
    model = small(name, "lm", vocab_size=2000, hidden_size=128, intermediate_size=512)
    made = build(model, 0).train()
    made.compute = {"fp32": torch.float32, "bf16": torch.bfloat16}[step.compute]
    if step.weights == "bf16":
        hold(made, torch.bfloat16)
    recompute_blocks(made, Recompute(blocks=step.blocks, feeds=step.feeds))
    work, parameters = objective(model, "lm"), list(made.parameters())
    rows, clip = EmbeddingRows(made, sparse=False), 1.0 if step.clip else math.inf
    shelf = Shelf(folder) if "optimizer" in step.offload else None
    own = Portions(KINDS[step.optimizer.kind], made.named_parameters(), "optimizer" in step.offload, shelf)
    update: Any = WholeUpdate(parameters, clip, rows, own.optimizers, own)
    if step.fused_backward:
        update = FusedUpdate(parameters, clip, own)

    def compute(batch: Any, walk: Any) -> Any:
        if "activations" not in step.offload:
            return gradients(made, work, [batch], 0, walk)
        with saved_tensors_hooks(put_away, torch.clone):
            return gradients(made, work, [batch], 0, walk)

    for turn in range(2):
        batch = collate(work, samples(model, LENGTHS, "lm"))
        for parameter in parameters:
            parameter.grad = None
        if turn == 0:
            update(partial(compute, batch), 0)
            continue
        kind = torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[kind], profile_memory=True) as profiler:
            update(partial(compute, batch), 0)
    events = sorted((e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events()
                    if e.name() == "[memory]")  # fmt: skip
    plan = estimate(model, step)
    return int(np.cumsum([size for _, size in events]).max()), sum(
        size for part, size in plan.held.items() if part not in NOT_TORCH
    )


@pytest.mark.parametrize(
    "ways",
    [
        {"weights": "bf16"},
        {"fused_backward": True, "clip": False},
        {"fused_backward": True},
        {"fused_backward": True, "clip": False, "weights": "bf16", "compute": "bf16", "blocks": 3},
        {"optimizer": Optimizer("adamw8bit")},
        {"optimizer": Optimizer("apollo")},
        {"weights": "bf16", "optimizer": Optimizer("adafactor")},
        {"weights": "bf16", "optimizer": Optimizer("muon")},
        {"offload": ("optimizer",)},
        {"offload": ("activations",)},
        {"offload": ("optimizer", "activations"), "fused_backward": True, "clip": False, "blocks": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["bert-tiny", "llama-tiny"])
def test_peak_is_that_of_torch(name: str, ways: dict[str, Any], tmp_path: Path) -> None:
    model = small(name, "lm", vocab_size=2000, hidden_size=128, intermediate_size=512)
    found, planned = peak_of_second_step(step_of(model, LENGTHS, "lm", **ways), name, tmp_path)
    assert planned == pytest.approx(found, rel=0.09)


def test_states_that_lie_elsewhere() -> None:
    model = small("bert-tiny")
    here, there = (estimate(model, step_of(model, LENGTHS, "lm", **w)) for w in ({}, {"offload": ("optimizer",)}))
    assert here.optimizer == 8 * model.params()
    assert there.optimizer == 0


@pytest.mark.parametrize("kind", ["nf4", "nf4_double"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_weights_in_four_bits(kind: Any, compute: Any, tmp_path: Path) -> None:
    family, model = preset("llama-tiny", vocab_size=211, num_hidden_layers=3, hidden_size=256, intermediate_size=512)
    save_folder(build(model, 0), family, tmp_path)
    made = load_folder(tmp_path, quantize=kind).model
    adapter = Adapter(4)
    adapt(made, LoraConfig(rank=4))
    made.compute = {"fp32": torch.float32, "bf16": torch.bfloat16}[compute]
    freeze_to(made, made.compute)
    step = step_of(model, LENGTHS, "lm", compute=compute, adapter=adapter, quantize=kind)
    assert planned_bytes(model, step) == kept_bytes(made, "lm", LENGTHS)
    held = sum(p.nbytes for p in made.parameters())
    held += sum(m.held.bytes for m in made.modules() if isinstance(m, FourBitLinear))
    assert model_bytes(model, step) == pytest.approx(held, rel=0.01)


def test_a_portion_is_no_larger_than_it_has_to_be() -> None:
    several = list(weights(preset("llama-130m")[1]))
    assert portions(Optimizer("adamw"), several, 4, False, False) == 0
    narrow = portions(Optimizer("adamw"), several, 2, False, False)
    assert narrow == 0
    assert portions(Optimizer("adamw8bit"), several, 2, False, False) == 20 * 2**20
    assert spaces(several, 2) == 8 * 2**20
    assert portions(Optimizer("adamw"), several, 4, True, False) == 8 * 2**20
