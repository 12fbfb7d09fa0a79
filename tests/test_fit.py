"""A run is planned by its own data, keeps to its memory, and is planned anew when it does not."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ronna import fit as fitting
from ronna.assemble import read_labelled
from ronna.base.config import build, dump_toml, read_toml
from ronna.base.errors import RonnaError
from ronna.base.rates import cache_folder
from ronna.fit import Fit, Outgrown, again, fitted, out_of_memory
from ronna.objectives.base import Sample
from ronna.packed import read_packed
from ronna.plan import record
from ronna.plan.memory import estimate
from ronna.plan.ranks import Ranks
from ronna.plan.record import Line
from ronna.plan.weights import weights as weights_of
from ronna.planned import heaviest
from ronna.run import READ, Interrupted, Training, execute, prepare_run
from ronna.runfile import FinetuneRun, PretrainRun

from .test_resume import cut_at, digest, settings

CPU = torch.device("cpu")
WORDS = "the film was good bad great awful a plot with acting and music dull bright story never always fun".split()


@pytest.fixture(autouse=True)
def no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of other tests, some of processes that hold nothing, are not to decide the margin of these."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The process holds nothing, or what is put here for one look each."""
    looks: list[int] = []
    monkeypatch.setattr(fitting, "held_bytes", lambda device: looks.pop(0) if looks else 0)
    return looks


def fine(base: Path, folder: Path, **more: Any) -> FinetuneRun:
    """Classification of texts of 1 to 40 words."""
    folder.mkdir(exist_ok=True)
    for split, n in (("train", 60), ("validation", 12)):
        rows = [{"text": " ".join((WORDS * 3)[i % 7 : i % 7 + 1 + (7 * i) % 40]) + f" {split}", "label": str(i % 2)}
                for i in range(n)]  # fmt: skip
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tree = {
        "out": str(folder / "out"),
        "device": "cpu",
        "model": {"name": str(base)},
        "data": {"train": str(folder), "allow_overlap": True},
        "train": {"epochs": 1, "batch": 8, "length": 48, **more.pop("train", {})},
        **more,
    }
    return FinetuneRun.model_validate(tree)


def plan_of(run: PretrainRun | FinetuneRun) -> Fit:
    data = read_packed(run) if isinstance(run, PretrainRun) else read_labelled(run)
    found = fitted(run, data, CPU, torch.float32)
    assert found is not None
    return found


@pytest.mark.parametrize("objective", ["mlm", "clm", "denoise"])
def test_no_micro_batch_of_pretraining_is_heavier(objective, shards, tmp_path):
    training = prepare_run(settings(objective, shards, tmp_path / "run"))
    step = training.fit.work.step
    for i in range(6):
        for batch in training.feed(i):
            assert len(batch.tokens) <= 1.1 * step.lengths.total
            assert objective == "clm" or len(batch.predict) <= 1.25 * step.predicted
            assert batch.source is None or len(batch.source) <= 1.1 * step.source.total


def test_rows_of_several_documents_are_heavier_than_those_of_one():
    documents = [[64], [64], [40, 24], [30, 34], [64], [64]]  # lengths in each row

    class Plain:
        def samples(self, item, rng):
            return [Sample(np.zeros(n)) for n in item]

    shape = heaviest(documents, Plain(), None, None)(2)
    assert (shape.lengths.sequences, shape.lengths.total) == (4, 128)
    assert heaviest(documents[:1], Plain(), None, None)(2).lengths.total == 64  # fewer rows than a batch has


@pytest.mark.parametrize("train", [{}, {"micro_batch": 3}, {"batch_tokens": 100}])
def test_no_micro_batch_of_finetuning_is_heavier(tiny_bert, tmp_path, train):
    training = prepare_run(fine(tiny_bert, tmp_path, train=train))
    step = training.fit.work.step
    seen = [len(batch.tokens) for i in range(12) for batch in training.feed(i)]
    assert 0.7 * step.lengths.total <= max(seen) <= step.lengths.total
    assert training.fit.work.model == training.parts.model.cfg
    assert step.token_rows == len(training.parts.used)


def test_the_share_of_the_matrix_rate(shards, tmp_path, monkeypatch):
    fit = plan_of(settings("clm", shards, tmp_path / "run"))
    model, step = fit.work.model, fit.work.step
    card = replace(fitting.this_machine("cpu"), rates={"fp32": 1e12, "bf16": 1e12})
    monkeypatch.setattr(fitting, "this_machine", lambda kind: card)
    weights = sum(w.size for w in weights_of(model) if w.inside and w.columns) + model.dim * model.embedding.vocab
    attention = 6 * model.dim * len(model.last.blocks) * step.lengths.total / step.lengths.sequences
    assert fit.utilisation(1000.0) == pytest.approx(1000 * (6 * weights + attention) / 1e12, rel=0.1)
    shared = replace(fit, work=replace(fit.work, step=replace(step, ranks=Ranks(context=2))))
    assert shared.utilisation(500.0) == pytest.approx(fit.utilisation(500.0), rel=0.05)


def test_an_evaluation_of_a_limited_run_has_the_tokens_of_a_micro_batch(tiny_bert, tmp_path):
    free = prepare_run(fine(tiny_bert, tmp_path))
    assert free.data.task.batch_tokens == READ > free.fit.tokens
    limited = prepare_run(fine(tiny_bert, tmp_path, train={"memory": "8GiB", "micro_batch": 2}))
    heaviest = sorted(limited.data.lengths)[-2:]
    assert limited.data.task.batch_tokens == sum(heaviest)
    sizes = []
    scores = limited.parts.model.scores
    limited.parts.model.scores = lambda *a, **k: sizes.append(len(a[0])) or scores(*a, **k)
    limited.parts.evaluate(lambda: False)
    assert len(sizes) > 1 and max(sizes) <= sum(heaviest)


def test_what_a_run_says_is_what_is_planned(tiny_bert, tmp_path):
    run = fine(tiny_bert, tmp_path, peft={"kind": "lora", "rank": 3, "targets": ["q"]})
    step = plan_of(run).work.step
    assert (step.adapter.rank, step.adapter.targets) == (3, ("q",))
    run = fine(
        tiny_bert, tmp_path, optim={"kind": "apollo", "rank": 5},
        train={"clip": 0, "weights": "bf16", "recompute": {"blocks": 1, "feeds": "all"}, "offload": ["activations"]},
    )  # fmt: skip
    step = plan_of(run).work.step
    assert (step.optimizer.kind, step.optimizer.rank, step.clip, step.weights) == ("apollo", 5, False, "bf16")
    assert (step.blocks, step.feeds, step.offload) == (1, 1, ("activations",))
    fused = plan_of(fine(tiny_bert, tmp_path, train={"fused_backward": True}, optim={"kind": "sgd", "momentum": 0}))
    assert fused.work.step.fused_backward and not fused.work.step.optimizer.momentum
    assert fused.peak == estimate(fused.work.model, fused.work.step).peak


@pytest.mark.parametrize("kind", ["adalora", "houlsby", "bitfit", "prompt", "prefix"])
def test_every_adapter_is_planned(tiny_bert, tmp_path, kind):
    planned = plan_of(fine(tiny_bert, tmp_path, peft={"kind": kind}))
    assert 0 < planned.peak < plan_of(fine(tiny_bert, tmp_path)).peak * 1.5


def test_a_report_has_both_figures_and_the_record_a_line(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "run.toml").write_text(dump_toml(settings("clm", shards, tmp_path / "run")), encoding="utf-8")
    # A process of its own: one that many tests have used may hold more, free by now, than the run takes.
    command = [sys.executable, "-m", "ronna", "pretrain", str(tmp_path / "run.toml"), "--json"]
    report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    memory = report["memory"]
    assert 0 < memory["planned_bytes"] < 2 * memory["peak_bytes"]
    [line] = record.read(cache_folder(), "cpu")
    assert memory["planned_bytes"] - line.planned == memory["peak_bytes"] - line.measured > 0  # what was there before
    assert line.planned_seconds > 0 and line.measured_seconds > 0


def test_memory_chooses_and_run_toml_says_what(shards, tmp_path, empty, capsys):
    plain = plan_of(settings("clm", shards, tmp_path / "x", micro_batch=None, batch=8))
    limit = int(0.8 * plain.peak)
    run = settings("clm", shards, tmp_path / "run", micro_batch=None, batch=8, memory=f"{limit / 2**20}MiB")
    report = execute(run)
    assert "plan for" in capsys.readouterr().err
    assert report["memory"]["planned_bytes"] <= 0.98 * limit
    done = build(PretrainRun, read_toml(tmp_path / "run" / "run.toml"), where="run.toml")
    assert done != run
    assert done.model_copy(update={"train": run.train, "optim": run.optim}) == run
    assert report["train"]["steps"] == 6


def test_memory_enough_changes_nothing(shards, tmp_path, empty):
    run = settings("mlm", shards, tmp_path / "run", memory="1GiB")
    assert plan_of(run).run == run


@pytest.mark.skipif(sys.platform != "linux", reason="holes are given back under Linux")
def test_above_its_limit_a_run_gives_back_what_is_free(shards, tmp_path, empty):
    heap = prepare_run(settings("clm", shards, tmp_path / "run", memory="1GiB")).heap
    assert heap is not None
    assert heap.limit == int(fitting.SHARE * 2**30)
    training = prepare_run(settings("clm", shards, tmp_path / "free"))
    assert training.heap is not None and training.fit is not None
    assert training.heap.limit == int(fitting.SHARE * training.fit.limit) > heap.limit


def test_nothing_fits(shards, tmp_path, empty):
    with pytest.raises(RonnaError, match=r"nothing fits.*lacks"):
        execute(settings("mlm", shards, tmp_path / "run", memory="100KiB"))
    with pytest.raises(RonnaError, match="not an amount of memory"):
        execute(settings("mlm", shards, tmp_path / "run", memory="much"))


def test_a_run_that_is_much_too_large_does_not_start(shards, tmp_path, monkeypatch):
    found = fitting.describe("cpu")
    monkeypatch.setattr(fitting, "describe", lambda device: replace(found, memory_available=2**20))
    monkeypatch.setattr(fitting, "held_bytes", lambda device: 0)
    with pytest.raises(RonnaError, match=r"(?s)would hold about.*--memory"):
        execute(settings("clm", shards, tmp_path / "run"))
    assert not (tmp_path / "run" / "model").exists()


def test_a_run_that_outgrows_its_plan_takes_the_next(shards, tmp_path, monkeypatch, capsys):
    limit, looks = 2**30, []
    run = settings("clm", shards, tmp_path / "run", memory="1GiB", micro_batch=None)
    need = plan_of(settings("clm", shards, tmp_path / "x", micro_batch=None)).peak
    before = int(0.98 * limit - 1.2 * need)  # so that it fits, if only just

    def held(device: torch.device) -> int:
        looks.append(device)
        return int(0.99 * limit) if len(looks) == 2 else before  # the first step of the first attempt

    monkeypatch.setattr(fitting, "held_bytes", held)
    report = execute(run)
    said = capsys.readouterr().err
    assert said.count("planning again") == 1
    assert "holds 0.99 GiB" in said
    assert report["train"]["steps"] == 6
    done = build(PretrainRun, read_toml(tmp_path / "run" / "run.toml"), where="run.toml")
    assert done.train != run.train
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps.count(1) == 1  # nothing is left of the first attempt


@pytest.mark.parametrize(
    "error", [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), torch.OutOfMemoryError("CUDA")]
)
def test_a_run_that_ends_for_want_of_memory_takes_the_next(shards, tmp_path, monkeypatch, capsys, empty, error):
    need = plan_of(settings("clm", shards, tmp_path / "x", micro_batch=None)).peak
    whole, tries = Training.execute, []

    def once(self: Training) -> Any:
        tries.append(self.fit)
        if len(tries) == 1:
            raise error
        return whole(self)

    monkeypatch.setattr(Training, "execute", once)
    memory = f"{1.2 * need / 2**20}MiB"
    report = execute(settings("clm", shards, tmp_path / "run", memory=memory, micro_batch=None))
    assert "ended for want of memory" in capsys.readouterr().err
    assert report["train"]["steps"] == 6
    assert tries[1].peak < tries[0].peak


def test_other_errors_stay_what_they_are(shards, tmp_path, monkeypatch):
    def fail(self: Training) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Training, "execute", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        execute(settings("clm", shards, tmp_path / "run"))
    assert not out_of_memory(RuntimeError("shapes do not match"))
    assert out_of_memory(MemoryError())


def test_unasked_nobody_changes_the_training(shards, tmp_path):
    """Where a run without --memory ends for want of it, the next plan computes the same."""
    found = plan_of(settings("clm", shards, tmp_path / "x", micro_batch=None))
    tight = replace(found, before=0, limit=int(0.9 * found.peak))
    tight.outgrown(None)
    leaner = again(tight)
    assert (leaner.run.optim, leaner.run.train.weights) == (found.run.optim, found.run.train.weights)
    assert leaner.peak < found.peak


def test_a_resumed_run_keeps_its_plan(shards, tmp_path, empty):
    need = plan_of(settings("clm", shards, tmp_path / "x", micro_batch=None)).peak
    memory = f"{need / 2**20}MiB"

    def run(name: str) -> PretrainRun:
        return settings("clm", shards, tmp_path / name, micro_batch=None, memory=memory)

    execute(run("whole"))
    training = prepare_run(run("cut"))
    cut_at(training, 3)
    with pytest.raises(Interrupted):
        training.execute()
    for _ in range(record.ENOUGH):  # which changes the margin, and with it what would be planned now
        record.add(cache_folder(), Line("cpu", record.TELLING, 3 * record.TELLING))
    execute(run("cut"), resume=True)
    record.path(cache_folder()).unlink()
    whole, cut = (read_toml(tmp_path / name / "run.toml")["train"] for name in ("whole", "cut"))
    assert whole == cut
    assert digest(tmp_path / "whole") == digest(tmp_path / "cut")


def test_the_watch_looks_at_the_first_steps_only(shards, tmp_path, empty):
    planned = plan_of(settings("clm", shards, tmp_path / "x", memory="1GiB"))
    empty += [2**30] * 2
    with pytest.raises(Outgrown):
        planned.watch(CPU, 0)
    planned.watch(CPU, fitting.WATCHED)
    replace(planned, asked=False).watch(CPU, 0)  # whoever sets no limit is not held to one
