"""A search for the settings of a fine-tuning run: trials, and the best of them becomes the run.

    OUT/search.toml        what was asked for
    OUT/search.jsonl       one line a trial, written when it begins and again when it ends
    OUT/trials/trial-N/    its metrics; its checkpoints and model while it is under way or the best so far

A trial is trained and evaluated like any run, but has no test data. Its settings follow from the seed, its number and
the trials before it, so a search that was cut goes on as if it had not been. At the end the best trial's folder becomes
OUT, which costs nothing and keeps the very weights that won; they are tested like those of any run.
"""

import gc
import hashlib
import math
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ronna.assemble import Labelled, higher_is_better, read_labelled
from ronna.base.config import dump_toml
from ronna.base.errors import RonnaError
from ronna.base.track import say
from ronna.compatible import refuse_shared
from ronna.fit import TooLarge, out_of_memory
from ronna.pages import number
from ronna.parallel.world import started_with_others
from ronna.ranges import import_optuna, merit, ranges_of, suggest, with_settings
from ronna.report import Search, Trial
from ronna.run import execute, identity, prepare_run
from ronna.runfile import FinetuneRun, SearchConfig
from ronna.train.loop import Diverged, Progress

COMPARED = 4  # whole trials that one is measured against before it may be stopped
UNTOUCHED = 0.3  # share of a trial in which it is not stopped


def finetune(run: FinetuneRun, *, resume: bool = False) -> dict[str, Any]:
    """Train, or search and train; returns the report. Raises RonnaError, and Interrupted when stopped."""
    if run.search is None:
        return execute(run, resume=resume)
    if started_with_others():
        refuse_shared(run)
    began = time.perf_counter()
    report = search(run, run.search, resume=resume)
    say(f"done in {time.perf_counter() - began:,.0f} s: {Path(run.out) / 'report.html'}")
    return report


def search(run: FinetuneRun, config: SearchConfig, *, resume: bool) -> dict[str, Any]:
    optuna = import_optuna()
    ranges, out = ranges_of(run, config), Path(run.out)
    if not resume and any((out / name).exists() for name in ("metrics.jsonl", "search.toml")):
        raise RonnaError("this folder holds a run already", where=str(out), fix="add --resume, or choose another out")
    data = read_labelled(run)
    name = fingerprint(run, data)
    out.mkdir(parents=True, exist_ok=True)
    trials = read_trials(out, name)
    write(out / "search.toml", dump_toml(run))
    held = data.without_test()
    while len(trials) < config.trials or any(t.state == "running" for t in trials):
        if not trials or trials[-1].state != "running":
            settings = suggest(optuna, run, ranges, trials)
            if settings is None:
                say(f"the ranges hold no more than these {len(trials)} settings")
                break
            trials.append(Trial(number=len(trials) + 1, run=name, state="running", settings=settings))
            write_trials(out, trials)
        trials[-1] = attempt(run, config, trials, held)
        write_trials(out, trials)
        clear(out, trials)
        gc.collect()  # a model and its optimizer hold each other in circles, and the next trial wants their room
    best = best_of(trials)
    if best is None:
        fix = f"lower search.lr or train.batch, or look at the data; the last one: {trials[-1].error}"
        raise RonnaError(f"all {len(trials)} trials failed", where=str(out / "search.jsonl"), fix=fix)
    found = Search(monitor=best.monitor, best=best.number, trials=tuple(trials))
    show(found)
    clear(out, trials)
    take_over(out, best)
    training = prepare_run(with_settings(run, best.settings, out), resume=True, data=data)
    return training.finish(training.train(), search=found)


# A trial


def attempt(run: FinetuneRun, config: SearchConfig, trials: Sequence[Trial], data: Labelled) -> Trial:
    """Run, or go on with, the last of `trials`. One that diverges or finds no memory has failed."""
    trial, began = trials[-1], time.perf_counter()
    said = ", ".join(f"{name} {value:.4g}" for name, value in trial.settings.items())
    say(f"\n== trial {trial.number} of {config.trials}: {said}")
    try:
        training = prepare_run(with_settings(run, trial.settings, folder_of(run.out, trial)), resume=True, data=data)
        give_up = partial(hopeless, total=training.total_steps, trials=trials[:-1] if config.prune else ())
        progress = training.train(give_up)
        ended = ending(trial, progress, training.total_steps, stopped=give_up(progress))
    except (Diverged, TooLarge, RuntimeError, MemoryError) as error:
        if isinstance(error, RonnaError):
            what = error.what
        elif out_of_memory(error):
            what = "not enough memory on the device"
        else:
            raise
        seconds = round(time.perf_counter() - began, 3)
        ended = trial.model_copy(update={"state": "failed", "error": what, "seconds": seconds})
    say(f"trial {ended.number}: {ended.error or f'{ended.monitor} {number(ended.value)}'} ({ended.state})")
    return ended


def ending(trial: Trial, progress: Progress, total: int, stopped: bool) -> Trial:
    """The trial with what came of it."""
    monitor = progress.monitor
    # An undefined score is null in a checkpoint.
    scores = [(e["step"] / total, e[monitor]) for e in progress.history if e[monitor] is not None]
    evaluations = tuple((round(share, 4), score) for share, score in scores if math.isfinite(score))
    seconds = round(progress.seconds, 3)
    if progress.best is None or not math.isfinite(progress.best):
        error = f"{monitor} is undefined on the validation data"
        return trial.model_copy(update={"state": "failed", "error": error, "seconds": seconds})
    value = progress.best if higher_is_better(monitor) else -progress.best
    found = {"monitor": monitor, "value": value, "seconds": seconds, "evaluations": evaluations}
    return trial.model_copy(update={"state": "stopped" if stopped else "complete", **found})


def hopeless(progress: Progress, total: int, trials: Sequence[Trial]) -> bool:
    """Whether the best of a trial so far is below the median of what the whole ones before it had at this share of
    their runs (the median rule of Golovin et al. 2017, as Optuna has it)."""
    share = progress.step / total
    if not UNTOUCHED <= share < 1 or progress.best is None:
        return False
    sign = 1 if higher_is_better(progress.monitor) else -1
    before = [[v for s, v in t.evaluations if s <= share + 1e-4] for t in trials if t.state == "complete"]
    latest = [sign * values[-1] for values in before if values]
    return len(latest) >= COMPARED and progress.best < statistics.median(latest)


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The first of the best, so that further trials can only replace it by a better one."""
    return max((trial for trial in trials if trial.state == "complete"), key=merit, default=None)


# The folder


def fingerprint(run: FinetuneRun, data: Labelled) -> str:
    """Of everything but their number that trials depend on."""
    assert run.search is not None
    config = run.search.model_dump_json(exclude={"trials"})
    text = "\n".join([identity(run), config, *(f"{name} {value}" for name, value in sorted(data.hashes.items()))])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_trials(out: Path, name: str) -> list[Trial]:
    """Those of a search to go on with, which must be of the same settings and data."""
    path = out / "search.jsonl"
    if not path.exists():
        if (out / "metrics.jsonl").exists():
            raise RonnaError("this folder holds a run without a search", where=str(out), fix="choose another out")
        return []
    try:
        trials = [Trial.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError:
        raise RonnaError("not the trials of a search", where=str(path), fix="choose another out") from None
    if any(trial.run != name for trial in trials):
        fix = f"put them back as {out / 'search.toml'} has them, or choose another out"
        raise RonnaError("these trials are of other settings or data", where=str(path), fix=fix)
    return trials


def write_trials(out: Path, trials: Sequence[Trial]) -> None:
    lines = [trial.model_dump_json(exclude_none=True) for trial in trials]
    write(out / "search.jsonl", "".join(line + "\n" for line in lines))


def write(path: Path, text: str) -> None:
    """Whole or not at all. Raises RonnaError where the disk refuses."""
    draft = path.with_name(path.name + ".tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        fix = "make room, or choose another output folder; then add --resume"
        raise RonnaError(f"cannot write: {error.strerror}", where=str(path), fix=fix) from None


def folder_of(out: str | Path, trial: Trial) -> Path:
    return Path(out) / "trials" / f"trial-{trial.number}"


def clear(out: Path, trials: Sequence[Trial]) -> None:
    """Keep the checkpoints and the model of the best trial alone."""
    best = best_of(trials)
    for trial in trials:
        if trial is not best:
            for name in ("checkpoints", "model"):
                shutil.rmtree(folder_of(out, trial) / name, ignore_errors=True)


def take_over(out: Path, best: Trial) -> None:
    """Make the best trial's folder the run's. What a kill left undone of it is done by the next call."""
    folder = folder_of(out, best)
    for entry in sorted(folder.iterdir()) if folder.exists() else ():
        target = out / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(entry, target)
    shutil.rmtree(folder, ignore_errors=True)


def show(found: Search) -> None:
    """The trials as a table on stderr."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    names = list(found.trials[0].settings)
    for name in ("trial", *names, found.monitor, "seconds"):
        table.add_column(name, justify="right")
    table.add_column("state")
    for trial in found.trials:
        best = trial.number == found.best
        numbers = [*(f"{trial.settings[name]:.4g}" for name in names), number(trial.value), f"{trial.seconds:.1f}"]
        table.add_row(str(trial.number), *numbers, "best" if best else trial.state, style="bold" if best else None)
    Console(stderr=True, highlight=False).print(table)
