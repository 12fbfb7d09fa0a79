"""Steps of what was planned, in this process."""

from typing import Any

import pytest
import torch

from ronna.model.families import preset
from ronna.plan.shapes import Adapter, Lengths
from ronna.plan.stretches import Step
from ronna.tasks.table import TASKS
from ronna.trial import TINY, Subject, run, warm_up, warmed

FEW = Lengths(2, 16)
WRITERS = {"seq2seq", "dialogue", "dpo"}


def tried(model: str, task: str, pretraining: bool = False, **ways: Any) -> float:
    return run(Subject(model, TINY, task, pretraining), Step(FEW, **ways), lambda _: None, 2)


@pytest.mark.parametrize("task", list(TASKS))
def test_every_task(task: str) -> None:
    assert tried("llama-tiny" if task in WRITERS else "bert-tiny", task) > 0


@pytest.mark.parametrize(
    ("model", "task", "source"),
    [("bert-tiny", "mlm", None), ("gpt2-tiny", "clm", None), ("t5-tiny", "denoise", FEW), ("t5-tiny", "seq2seq", FEW)],
)
def test_every_architecture(model: str, task: str, source: Lengths | None) -> None:
    assert tried(model, task, task != "seq2seq", source=source, compute="bf16") > 0


def test_an_adapter() -> None:
    assert tried("bert-tiny", "tag", adapter=Adapter(2)) > 0


def test_a_warm_up_is_once_and_draws_no_numbers() -> None:
    warmed.cache_clear()
    family, _ = preset("bert-tiny")
    before = torch.get_rng_state()
    for length in (64, 512):
        warm_up(family, "span_qa", False, Step(Lengths(3, length)))
    assert torch.equal(torch.get_rng_state(), before)
    assert warmed.cache_info().misses == 1
