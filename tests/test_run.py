"""What a run holds beside its steps: one model at a time, in the precision that it is to have."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from ronna import assemble
from ronna.run import Training, prepare_run
from ronna.stored import Store
from ronna.verbs.evaluate import load

from .test_resume import tuning


def run(base: Path, out: Path, **more: Any) -> Training:
    train = {"steps": 2, "batch": 8, "length": 32, "precision": "bf16", **more.pop("train", {})}
    return prepare_run(tuning(base, out, train=train, **more))


@pytest.mark.parametrize("more", [{}, {"peft": {"kind": "bitfit"}}], ids=["whole", "adapter"])
def test_what_was_trained_is_let_go_of_before_the_folder_is_opened(more, tiny_bert, tmp_path, monkeypatch):
    training = run(tiny_bert, tmp_path / "run", **more)
    weights = [weakref.ref(p.untyped_storage()) for p in training.parts.model.parameters()]
    optimizers: list[weakref.ref[Any]] = []
    stepping = Training.train.__globals__["stepping"]

    def watched(*inputs: Any) -> Any:
        found = stepping(*inputs)
        optimizers.extend(map(weakref.ref, found.optimizers))
        return found

    monkeypatch.setitem(Training.train.__globals__, "stepping", watched)
    seen = []
    open_folder = Store.reopened.__globals__["open_folder"]

    def opened(*inputs: Any) -> Any:
        seen.append((sum(ref() is not None for ref in weights), sum(ref() is not None for ref in optimizers)))
        return open_folder(*inputs)

    monkeypatch.setitem(Store.reopened.__globals__, "open_folder", opened)
    report = training.execute()
    assert seen == [(0, 0)] and optimizers and report["parameters"] == training.parts.model.cfg.params()


@pytest.mark.parametrize("weights, precision", [("bf16", "fp32"), ("fp32", "bf16"), ("fp32", "fp32")])
def test_no_matrix_is_tested_wider_than_it_was_trained(weights, precision, tiny_bert, tmp_path):
    """What was trained in bf16 because no more would fit is tested in that memory, all else as `evaluate` will."""
    asked = {"weights": weights, "precision": precision, "evaluate_every": 2}
    training = run(tiny_bert, tmp_path / "run", train=asked)
    training.train()
    task, texts = training.data.task, training.data.examples["validation"]  # type: ignore[union-attr]
    folder, model = tmp_path / "run" / "model", training.parts.model.eval()
    trained = task.infer(model, texts)
    opened = training.store.reopened(folder, None, training.device)
    narrow = torch.bfloat16 if "bf16" in (weights, precision) else torch.float32
    assert {p.dtype for p in opened.parameters() if p.ndim >= 2} == {narrow}
    later = load(str(folder), device="cpu", precision=precision).model
    expected = trained if weights == "bf16" else task.infer(later, texts)
    assert (task.infer(opened, texts) == expected).all()


def maps(training: Training) -> set[torch.dtype]:
    return {p.dtype for n, p in training.parts.model.named_parameters() if ".blocks." in n and p.ndim == 2}


@pytest.mark.parametrize(
    "peft",
    [{"kind": "lora"}, {"kind": "lora", "dora": True}, {"kind": "prefix"}, {"kind": "houlsby"}, {"kind": "bitfit"}],
    ids=lambda peft: "dora" if "dora" in peft else peft["kind"],
)
def test_a_base_that_is_read_narrow_gives_the_same_adapter(peft, tiny_bert, tmp_path, monkeypatch):
    file = "model/adapter_model.safetensors"
    run(tiny_bert, tmp_path / "narrow", peft=peft).execute()
    monkeypatch.setattr(assemble, "hold_maps", lambda model, matrices: None)
    run(tiny_bert, tmp_path / "wide", peft=peft).execute()
    assert (tmp_path / "narrow" / file).read_bytes() == (tmp_path / "wide" / file).read_bytes()


def test_a_base_is_read_in_the_precision_it_will_be_frozen_in(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setattr("ronna.run.freeze_to", lambda model, dtype: None)
    asked = {"peft": {"kind": "bitfit"}}
    assert maps(run(tiny_bert, tmp_path / "a", **asked)) == {torch.bfloat16}
    assert maps(run(tiny_bert, tmp_path / "b", **asked, train={"precision": "fp32"})) == {torch.float32}
    assert torch.float32 in maps(run(tiny_bert, tmp_path / "c", peft={"kind": "lora", "dora": True}))
    assert maps(run(tiny_bert, tmp_path / "d", train={"weights": "bf16"})) == {torch.bfloat16}


@pytest.mark.parametrize("lean", [False, True], ids=["together", "apart"])
def test_a_part_may_stand_all_but_still(lean, tiny_bert, tmp_path):
    """A rate of its own is no fault of the first step, and is not the whole model's."""
    optim = {"kind": "adamw", "lr": 1e-2, "rates": {"_norm": 1e-9}}
    training = run(
        tiny_bert, tmp_path / "run", optim=optim, train={"fused_backward": lean, "clip": 0.0 if lean else 1.0}
    )
    model = training.parts.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training.train()
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters()}
    still = {name for name, far in moved.items() if far < 1e-6}
    assert still == {name for name in moved if "_norm" in name} and still
