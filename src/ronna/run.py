"""A run from its file to its folder: assemble, check, train, test, save, report."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ronna.assemble import Labelled, Parts, assemble_finetune, assemble_pretrain, read_labelled
from ronna.base.config import dump_toml
from ronna.base.device import choose_device, choose_precision, peak_bytes, seed_for
from ronna.base.errors import RonnaError
from ronna.base.heap import Heap, keep_few_kernels
from ronna.base.track import Tracker, say
from ronna.compatible import refuse_apart, refuse_shared
from ronna.fit import WATCHED, Fit, Outgrown, again, as_planned, fitted, out_of_memory
from ronna.model.boxes import is_sharded
from ronna.model.compiled import compile_blocks, wants_compile
from ronna.model.fourbit import held_in
from ronna.model.init import on_cpu
from ronna.model.recompute import recompute_blocks
from ronna.packed import Packed, read_packed
from ronna.parallel.pipeline import absent
from ronna.parallel.sharded import allot_shards, shard
from ronna.parallel.world import ALONE, World, joined
from ronna.peft.adalora import AdaLoraConfig, Allocator, triplets_of
from ronna.peft.changes import bare
from ronna.peft.methods import NAME, freeze_to
from ronna.report import build_report, write_report
from ronna.runfile import FinetuneRun, PretrainRun
from ronna.stored import Store
from ronna.train.checkpoint import Checkpoint, load_checkpoint, load_latest
from ronna.train.checkpointer import Checkpointer
from ronna.train.contract import Check, FirstStep, check_start, refuse_failed
from ronna.train.feed import Feed, length_plan, row_plan
from ronna.train.loop import Interrupted, Progress, Run
from ronna.train.optim import load_optimizer_tensors, optimizer_tensors
from ronna.train.pieces import Resharded
from ronna.train.schedule import lr_scale
from ronna.train.shelf import Shelf
from ronna.train.stepping import stepping

AnyRun = PretrainRun | FinetuneRun

# What may change between a run and its resumption without changing a single weight.
FREE = {
    "out": True,
    "device": True,
    "track": True,
    "search": True,
    "parallel": True,
    "train": {"log_every", "keep", "save_every", "recompute", "memory"},
}

NEAR = 0.95  # of its plan, from where on a run gives back what is free: the next step may hold more than the one before
READ = 1024  # tokens that an evaluation may always read at once


def identity(run: AnyRun) -> str:
    """sha256 of everything in a run file that the weights depend on."""
    text = json.dumps(run.model_dump(mode="json", exclude=FREE), sort_keys=True)  # type: ignore[arg-type]
    return hashlib.sha256(text.encode()).hexdigest()


class Training:
    """One run, ready to start or to go on: `prepare_run` makes it, `execute` runs it."""

    def __init__(
        self,
        run: AnyRun,
        parts: Parts,
        device: torch.device,
        resume: bool,
        heap: Heap | None = None,
        fit: Fit | None = None,
        data: Labelled | Packed | None = None,
        world: World = ALONE,
    ):
        """fit: what it is expected to take, where anybody could tell. data: what it was assembled from."""
        self.run, self.parts, self.device, self.resume, self.heap = run, parts, device, resume, heap
        self.fit, self.data, self.world = fit, data, world
        self.progress: Progress | None = None
        self.out, self.store = Path(run.out), Store(parts, world)
        self.shelf = Shelf(self.out) if run.train.offload and device.type == "cpu" else None
        config = run.train
        if parts.lengths is None:
            micro = config.micro_batch or config.batch
            plan, per_epoch = row_plan(len(parts.data), run.seed, config.batch, micro)
        else:
            plan, per_epoch = length_plan(
                parts.lengths, run.seed, config.batch, config.micro_batch, config.batch_tokens
            )
        self.feed = Feed(parts.objective, parts.data, plan, run.seed, device, world)
        tokens = len(parts.data) * config.length if parts.lengths is None else float(parts.lengths.sum())
        epochs = config.tokens / tokens if config.tokens else config.epochs or 1
        wanted = epochs * per_epoch
        self.total_steps = config.steps or max(1, round(wanted))
        self.allocator: Allocator | None = None
        if isinstance(parts.peft, AdaLoraConfig):
            self.allocator = Allocator(triplets_of(parts.model, NAME), parts.peft, self.total_steps)
        self.hashes = parts.hashes | {"config": identity(run)}
        self.notes: list[str] = []

    def check(self) -> list[Check]:
        """The checks of `doctor`, on the first step's samples of all ranks."""
        return check_start(self.parts.model, self.parts.objective, self.feed.samples(0))

    def execute(self) -> dict[str, Any]:
        """Train, test, save; returns the report. Raises Interrupted when asked to stop (everything is saved)."""
        return self.finish(self.train())

    def train(self, give_up: Callable[[Progress], bool] | None = None) -> Progress:
        """Train to the end, or until `give_up` says so after an evaluation; the best model lies in the folder then."""
        parts, run = self.parts, self.run
        progress = self.restore()
        for note in self.notes:
            say(note)
        refuse_failed(self.check())
        if wants_compile(run.train.compile, self.device):
            compile_blocks(parts.model)
        recompute_blocks(parts.model, run.train.recompute)
        if self.world.size > 1 and not is_sharded(parts.model):  # an adapter, on a base that was whole up to here
            shard(parts.model, self.world, parts.model.compute)
        ways = stepping(parts.model, run.optim, run.train, parts.used, self.shelf)
        named, optimizers, update = ways.named, ways.optimizers, ways.update
        if self.checkpoint is not None:
            stored = Resharded(self.checkpoint.tensors("optimizer"), dict(named()), absent(parts.model))
            load_optimizer_tensors(optimizers, named(), stored)
        root = self.out / "checkpoints"
        keeper = Checkpointer(root, hashes=self.hashes, report=say, keep=run.train.keep, world=self.world)
        with self.tracker() as tracker, keeper as saver:
            if self.resume:
                tracker.resume(progress.step + 1)

            def save(now: Progress) -> None:
                saver.save(
                    now.step,
                    tensors={
                        "optimizer": optimizer_tensors(optimizers, named()),
                        **self.apart(),
                    },
                    model_files=self.store.write_now,
                    finish=self.store.finish(),
                    state=now.to_json(),
                    written=ways.written,
                )

            loop = Run(
                parts.model, parts.objective, self.feed, optimizers, run.schedule, run.train, self.total_steps,
                run.seed, tracker, progress, parts.evaluate, save,
                self.keep_best if isinstance(run, FinetuneRun) else None, give_up, saved_step=progress.step,
                away=ways.away, update=update, world=self.world,
            )  # fmt: skip
            self.progress = loop.progress
            loop.hooks += [hook for hook in (self.heap, self.allocator) if hook is not None]
            if self.allocator is not None:
                loop.hooks.append(partial(self.forget_larger, loop.progress))
            if self.fit is not None:
                loop.hooks.append(partial(self.fit.watch, self.device))
            if progress.step == 0:
                first = run.optim.lr * lr_scale(run.schedule, 0, self.total_steps)
                loop.hooks.append(
                    FirstStep(parts.model, lambda name: first * run.optim.factor(name), update.gradient_norm)
                )
            return loop.train()

    def tracker(self) -> Tracker:
        """What a run's numbers go to; its folder is there then, and its run file in it. Of several ranks each but the
        first has a folder of its own, with the numbers of all, its own memory, and when it came so far."""
        if not self.world.main:
            return Tracker(self.out / "ranks" / f"rank-{self.world.rank:03d}", quiet=True)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "run.toml").write_text(dump_toml(self.run), encoding="utf-8")
        track = self.run.track
        return Tracker(
            self.out,
            tensorboard=track.tensorboard,
            wandb=track.wandb,
            trackio=track.trackio,
            total_steps=self.total_steps,
        )

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, the same on every rank."""
        root = self.out / "checkpoints"
        found = load_latest(root, expect=self.hashes) if self.world.main else None
        step = self.world.told(-1 if found is None else found.step)
        if self.world.main or step < 0:
            return found
        return load_checkpoint(root / f"step-{step:08d}", expect=self.hashes)

    def restore(self) -> Progress:
        """Weights and counters of the newest whole checkpoint, if this is a resumption that has one."""
        self.checkpoint = self.newest() if self.resume else None
        if self.checkpoint is None:
            return Progress()
        self.notes += [*self.checkpoint.notes, f"resuming from {self.checkpoint.path.name}"]
        self.store.restore(self.checkpoint)
        if self.allocator is not None:
            self.allocator.load(self.checkpoint.tensors("allocator"))
        return Progress(**self.checkpoint.state)

    def forget_larger(self, progress: Progress, step: int) -> None:
        """A model of more ranks than are asked for is not to be the best one."""
        if self.allocator is not None and self.allocator.settles(step):
            progress.best, progress.since_best = None, 0

    def apart(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint of an adapter holds beside its folder and the optimizer's states."""
        return self.store.apart() | ({"allocator": self.allocator.state()} if self.allocator is not None else {})

    def keep_best(self) -> None:
        """Put the present weights at out/model, whole or not at all."""
        final, fresh, old = self.out / "model", self.out / "model.new", self.out / "model.old"
        for leftover in (fresh, old) if self.world.main else ():
            shutil.rmtree(leftover, ignore_errors=True)
        self.store.write(fresh)
        if not self.world.main:
            return
        if final.exists():
            os.rename(final, old)
        os.rename(fresh, final)
        shutil.rmtree(old, ignore_errors=True)

    def finish(self, progress: Progress, **more: Any) -> dict[str, Any]:
        """Test the model that is kept, and write the report; `more` are further fields of it. Ranks test it together,
        and the first one reports."""
        if progress.best is None or isinstance(self.run, PretrainRun):
            self.keep_best()
        held = held_in(self.parts.model)
        scores = {}
        if isinstance(self.run, FinetuneRun):
            scores = self.parts.test(self.store.reopened(self.out / "model", self.run.model.quantize, self.device))
            self.world.at_rest()
        if not self.world.main:
            return {}
        for name, measured in scores.items():
            say(f"{name}:\n{measured.text()}")
        kinds = (
            {"objective": self.run.objective.kind}
            if isinstance(self.run, PretrainRun)
            else {"task": self.run.task.kind}
        )
        last = {k: v for k, v in progress.history[-1].items() if k != "step"} if progress.history else {}
        peak = peak_bytes(self.device)
        report = build_report(
            title=f"{self.run.verb}: {self.run.model.name}",
            **kinds,
            test=scores.get("test"),
            validation=scores.get("validation", last),
            train=training_account(progress, self.world, self.fit),
            memory={
                "peak_bytes": peak,
                "planned_bytes": None if self.fit is None else self.fit.planned,
                "held": held,
            },
            data=self.parts.account,
            config_hash=self.hashes["config"],
            evaluations=progress.history,
            parameters=self.parts.model.cfg.params(),
            **more,
        )
        write_report(self.out, report)
        if self.fit is not None and progress.step:
            self.fit.remember(self.device, peak, progress.seconds / progress.step)
        return report.model_dump(mode="json")


def training_account(p: Progress, world: World, fit: Fit | None) -> dict[str, Any]:
    rate = p.tokens / max(p.seconds, 1e-9)
    return {
        "steps": p.step,
        "best_step": p.best_step,
        "tokens": p.tokens,
        "seconds": round(p.seconds, 3),
        "tokens_per_second": round(rate, 1),
        "packing": round(p.tokens / max(p.positions, 1), 5),
        "skipped_steps": p.skipped,
        "devices": world.size,
        "mfu": None if fit is None else round(fit.utilisation(rate / world.size), 4),
    }


def prepare_run(
    run: AnyRun,
    *,
    resume: bool = False,
    data: Labelled | Packed | None = None,
    fit: Fit | None = None,
    world: World = ALONE,
) -> Training:
    """Everything of a run but the running: data read and the run planned, unless they are given; model built, on the
    device, in the chosen precision."""
    out = Path(run.out)
    if (out / "metrics.jsonl").exists() and not resume:
        raise RonnaError("this folder holds a run already", where=str(out), fix="add --resume, or choose another out")
    if settled := resume and (out / "run.toml").exists():
        run = as_planned(run, out)
    refuse_apart(run)
    if world.size > 1:
        refuse_shared(run)
    torch.manual_seed(seed_for(run.seed))
    keep_few_kernels()
    device = choose_device(run.device)
    dtype, reason = choose_precision(run.train.precision, device)
    if data is None:
        data = read_packed(run) if isinstance(run, PretrainRun) else read_labelled(run)
    if fit is None:
        fit = fitted(run, data, device, dtype, settled=settled, world=world)
    run = run if fit is None else fit.run
    if fit is not None and (run.train.memory is not None or device.type == "cpu") and isinstance(data, Labelled):
        # No evaluation is to hold more than the steps do.
        tokens = fit.tokens if run.train.memory is not None else max(READ, fit.tokens)
        data = replace(data, task=data.task.reading(min(type(data.task).batch_tokens, tokens)))
    # Blocks that are put together for a moment leave holes in a heap that keeps what is freed: half as much again.
    tight = world.size > 1 or (fit is not None and fit.tight)
    within = () if fit is None else (int(NEAR * fit.planned), fit.most)
    heap = Heap(tight, *within) if device.type == "cpu" else None
    parts = assemble(run, data, world, device, dtype)
    parts.model.compute = dtype
    parts.model.to(device)
    if parts.prepare is not None:
        with bare(parts.model):
            parts.prepare()
    if parts.peft is not None:
        freeze_to(parts.model, dtype)
    cfg = parts.model.cfg
    say(f"model: {cfg.params():,} parameters, computing in {str(dtype).removeprefix('torch.')} on {device} ({reason})")
    return Training(run, parts, device, resume, heap, fit, data, world)


def assemble(run: AnyRun, data: Labelled | Packed, world: World, device: torch.device, dtype: torch.dtype) -> Parts:
    adapter = isinstance(run, FinetuneRun) and run.peft is not None
    allot = on_cpu if world.size == 1 or adapter else partial(allot_shards, world=world, device=device, compute=dtype)
    if isinstance(run, PretrainRun):
        assert isinstance(data, Packed)
        return assemble_pretrain(run, data, world, allot)
    assert isinstance(data, Labelled)
    return assemble_finetune(run, data, world, allot)


def execute(run: AnyRun, *, resume: bool = False) -> dict[str, Any]:
    """A run to its end, by the next plan where one proves too large for the memory there is; returns the report, which
    on other ranks than the first is empty."""
    with joined(run.parallel, run.device) as world:
        return executed(run, resume, world)


def executed(run: AnyRun, resume: bool, world: World) -> dict[str, Any]:
    began = time.perf_counter()
    training = prepare_run(run, resume=resume, world=world)
    while (report := attempted(training)) is None:
        fit, data, training = training.fit, training.data, None  # type: ignore[assignment]  # before the next is there
        assert fit is not None
        (Path(run.out) / "metrics.jsonl").unlink(missing_ok=True)
        training = prepare_run(run, data=data, fit=again(fit))
    say(f"done in {time.perf_counter() - began:,.0f} s: {Path(run.out) / 'report.html'}")
    return report


def attempted(training: Training) -> dict[str, Any] | None:
    """The report; None where the first steps took too much memory, which the run's `fit` then knows."""
    try:
        return training.execute()
    except (Outgrown, RuntimeError, MemoryError) as error:
        early = training.progress is None or training.progress.step <= WATCHED
        alone = training.fit is not None and training.world.size == 1  # several would have to plan the same
        if training.fit is None or not (alone and early) or not (isinstance(error, Outgrown) or out_of_memory(error)):
            raise
        training.fit.outgrown(error.measured if isinstance(error, Outgrown) else None)
    return None


__all__ = ["Interrupted", "Training", "execute", "identity", "prepare_run"]
