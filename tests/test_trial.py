"""Steps of what was planned, in this process."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from ronna.model.families import preset
from ronna.plan.shapes import Adapter, Lengths
from ronna.plan.stretches import Step
from ronna.tasks.table import TASKS
from ronna.train.shelf import Shelf
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


@pytest.mark.skipif(sys.platform != "linux", reason="offloading to disk needs Linux")
@pytest.mark.parametrize("writable", [True, False])
def test_states_wait_where_a_run_would_have_them(
    writable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, temporary, used = tmp_path / "here", tmp_path / "temporary", []
    for folder in (here, temporary):
        folder.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(os, "access", lambda *_: writable)
    put = Shelf.put
    monkeypatch.setattr(Shelf, "put", lambda self, x: used.append(self.folder) or put(self, x))
    assert tried("bert-tiny", "classify", offload=("optimizer",)) > 0
    assert set(used) == {here if writable else temporary}
    assert not list(here.iterdir()) and not list(temporary.iterdir())


def test_a_warm_up_is_once_and_draws_no_numbers() -> None:
    warmed.cache_clear()
    family, _ = preset("bert-tiny")
    before = torch.get_rng_state()
    for length in (64, 512):
        warm_up(family, "span_qa", False, Step(Lengths(3, length)))
    assert torch.equal(torch.get_rng_state(), before)
    assert warmed.cache_info().misses == 1


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process that its starter ended")
def test_a_trial_ends_with_whoever_asked_for_it() -> None:
    asked = {
        "subject": asdict(Subject("bert-tiny", TINY, "classify", False)),
        "step": asdict(Step(FEW)),
        "steps": 10**9,
    }
    started = "p = subprocess.Popen([sys.executable, *sys.argv[1:]]); print(p.pid, flush=True); p.wait()"
    command = [sys.executable, "-c", f"import subprocess, sys; {started}", "-m", "ronna.trial", json.dumps(asked)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        trial = int(starter.stdout.readline())
        proc = Path(f"/proc/{trial}")
        try:
            until(lambda: "torch" in (proc / "maps").read_text())  # it is past its first line
        finally:
            starter.kill()
    try:
        until(lambda: not proc.exists() or "zombie" in (proc / "status").read_text())
    finally:
        with suppress(ProcessLookupError):
            os.kill(trial, signal.SIGKILL)


def until(true: Any) -> None:
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < 60
        time.sleep(0.05)
