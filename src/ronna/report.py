"""The report of a run (report.json, report.html) and the page that sets several runs side by side.

A page is one file that asks for nothing: styles and images inline, no script, and a policy that forbids
them. All text is escaped by the template engine, control characters are shown as symbols.
"""

from __future__ import annotations

import json
import math
import os
import platform
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

from markupsafe import Markup
from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError

from ronna import __version__
from ronna.base.errors import RonnaError
from ronna.base.track import METRICS_FILE, read_metrics
from ronna.pages import binary_bytes, duration, metric_text, render
from ronna.plots import COLOURS, Curve, confusion_plot, loss_plot, rate_plot, search_plot
from ronna.tasks.bootstrap import Metric
from ronna.tasks.metrics import ClassRow, Scores

MOST_CLASSES_DRAWN = 120  # beyond it a heat map cannot be read; the commonest errors still can


def _as_metric(value: Any) -> Any:
    return {"value": value} if value is None or isinstance(value, int | float) else value


Metrics = dict[str, Annotated[Metric, BeforeValidator(_as_metric), PlainSerializer(Metric.to_json)]]
"""Metric name -> a number, or {"value", "low", "high"} with its 95% interval."""


class Part(BaseModel):
    """A part of a report; what a task adds beyond the fields is kept in the JSON as it is."""

    model_config = ConfigDict(frozen=True, extra="allow")


class Train(Part):
    """`tokens` are real tokens; `packing` is real tokens over the positions computed. `mfu` is the share of a device's
    rate of matrix products, as far as anybody knows it, that went into those which the model cannot do without."""

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    packing: float | None = None
    devices: int = 1
    mfu: float | None = None


class Memory(Part):
    """`held` is what the weights inside the blocks were held in, where that was 4 bits."""

    peak_bytes: int | None = None
    planned_bytes: int | None = None
    held: str | None = None


class Data(Part):
    """Rows: every one that came in is kept or quarantined. Of those kept, the ones too long are cut, windowed, or
    dropped from the training data."""

    rows_in: int | None = None
    kept: int | None = None
    quarantined: int | None = None
    cut: int | None = None
    windowed: int | None = None
    dropped: int | None = None


class Details(Part):
    """`Scores.details()` of the split the report speaks of."""

    rows: int
    labels: tuple[str, ...] = ()
    classes: tuple[ClassRow, ...] = ()
    averages: tuple[ClassRow, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    notes: tuple[str, ...] = ()


class Trial(Part):
    """One trial of a search, a line of its search.jsonl.

    `value` is the best of `evaluations`, pairs of the share of the run that was done and the score that the task
    monitors; `run` says of which settings and data the trial was.
    """

    number: int
    run: str
    state: Literal["running", "complete", "stopped", "failed"]
    settings: dict[str, int | float]
    monitor: str = ""
    value: float | None = None
    seconds: float | None = None  # of training
    evaluations: tuple[tuple[float, float], ...] = ()
    error: str | None = None


class Search(Part):
    """The trials of a search; `best` is the number of the one that became the run."""

    monitor: str
    best: int
    trials: tuple[Trial, ...]


class Report(Part):
    """What report.json holds; make one with `build_report`."""

    title: str
    verdict: str
    task: str | None = None
    objective: str | None = None
    test: Metrics = {}
    validation: Metrics = {}
    details: Details | None = None
    train: Train | None = None
    memory: Memory = Memory()
    data: Data = Data()
    search: Search | None = None
    config_hash: str
    versions: dict[str, str]


class Sample(Part):
    """One record and what a run made of it; `gold` where it is known."""

    input: str
    output: str
    gold: str | None = None
    run: str | None = None


class Run(Part):
    """One line of a comparison; `curves` is the path of its metrics.jsonl."""

    name: str
    metrics: Metrics = {}
    train: Train | None = None
    memory: Memory = Memory()
    curves: Path | None = None


class Section(Part):
    """Runs that may be compared: one table, one plot, and samples."""

    title: str
    text: str = ""
    runs: tuple[Run, ...] = ()
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class Curves:
    """What metrics.jsonl tells by step; `relative`: the rate is a share of its peak."""

    train: Curve
    validation: Curve
    rate: Curve
    relative: bool


def build_report(
    *,
    title: str,
    config_hash: str,
    task: str | None = None,
    objective: str | None = None,
    test: Scores | Mapping[str, Any] | None = None,
    validation: Scores | Mapping[str, Any] | None = None,
    verdict: str | None = None,
    **fields: Any,
) -> Report:
    """A report with verdict, details and versions filled in; `fields` are train, memory, data and extras."""
    shown = test or validation
    plain = {
        "title": title,
        "verdict": "",
        "task": task,
        "objective": objective,
        "test": test.to_json() if isinstance(test, Scores) else test or {},
        "validation": validation.to_json() if isinstance(validation, Scores) else validation or {},
        "details": shown.details() if isinstance(shown, Scores) else None,
        "config_hash": config_hash,
        "versions": versions(),
        **fields,
    }
    report = Report.model_validate(_strict(plain))
    return report.model_copy(update={"verdict": verdict or verdict_line(report)})


def versions() -> dict[str, str]:
    """Versions by package, without importing any of them; what is not installed is left out."""
    found = {"python": platform.python_version(), "ronna": __version__}
    for name in ("torch", "transformers", "tokenizers", "safetensors", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def verdict_line(report: Report) -> str:
    """The run in one line: its first metric, what it took, what it used."""
    split, metrics = ("test", report.test) if report.test else ("validation", report.validation)
    parts = [f"{split} {name} {metric_text(metric)}" for name, metric in list(metrics.items())[:1]]
    if train := report.train:
        parts.append(f"{train.steps:,} steps and {train.tokens:,} tokens in {duration(train.seconds)}")
        if train.devices > 1:
            rate = f" at {train.mfu:.1%} of its matrix rate" if train.mfu is not None else ""
            parts.append(
                f"each of {train.devices} devices {train.tokens_per_second / train.devices:,.0f} tokens/s{rate}"
            )
    if report.memory.peak_bytes is not None:
        parts.append(f"peak memory {binary_bytes(report.memory.peak_bytes)}")
    return "; ".join(parts) or "nothing was measured"


def problems(report: Report) -> Iterator[str]:
    """What a reader must not overlook."""
    data, memory = report.data, report.memory
    if data.rows_in is not None and data.rows_in != (data.kept or 0) + (data.quarantined or 0):
        yield f"rows do not add up: {data.rows_in} in, {data.kept} kept, {data.quarantined} quarantined"
    if memory.peak_bytes and memory.planned_bytes and memory.peak_bytes > memory.planned_bytes:
        over = memory.peak_bytes / memory.planned_bytes - 1
        yield f"memory went {over:.1%} over the plan"


def write_report(out: Path, report: Report | Mapping[str, Any]) -> Path:
    """Write report.json and report.html into the run folder `out`; returns the path of the page.

    A mapping holds the arguments of `build_report`. Curves come from OUT/metrics.jsonl and the
    configuration from OUT/run.toml, where they exist. Raises RonnaError when the folder cannot be written.
    """
    if not isinstance(report, Report):
        report = build_report(**report)
    curves = read_curves(out / METRICS_FILE)
    details, heat_map, named = report.details, None, True
    if details and 0 < len(details.confusion) <= MOST_CLASSES_DRAWN:
        svg, named = confusion_plot(details.confusion, details.labels)
        heat_map = _image(svg)
    run_toml = out / "run.toml"
    page = render(
        "report.html.jinja",
        report=report,
        problems=list(problems(report)),
        plots=_plots([curves]),
        heat_map=heat_map,
        named=named,
        confused=_most_confused(details) if details else [],
        scatter=_scatter(report.search) if report.search else None,
        run_toml=run_toml.read_text(encoding="utf-8", errors="replace") if run_toml.exists() else None,
    )
    _write(out / "report.json", _json(report))
    return _write(out / "report.html", page)


def write_comparison(out: Path, title: str, sections: Sequence[Section | Mapping[str, Any]]) -> Path:
    """Write comparison.json and comparison.html into the folder `out`; returns the path of the page."""
    known = [x if isinstance(x, Section) else Section.model_validate(_strict(x)) for x in sections]
    shown = []
    for section in known:
        curves = [read_curves(run.curves) if run.curves else None for run in section.runs]
        names = list(dict.fromkeys(name for run in section.runs for name in run.metrics))
        shown.append({"section": section, "names": names, "plots": _plots(curves)})
    page = render("comparison.html.jinja", title=title, sections=shown, colours=COLOURS)
    whole = {"title": title, "sections": [json.loads(_json(section)) for section in known]}
    _write(out / "comparison.json", json.dumps(_strict(whole), indent=2, ensure_ascii=False))
    return _write(out / "comparison.html", page)


def read_run(folder: Path, name: str | None = None) -> Run:
    """A run folder as one line of a comparison. Raises RonnaError without a readable report.json."""
    path = folder / "report.json"
    try:
        report = Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RonnaError(
            f"no report here: {error.strerror}", where=str(path), fix="give a folder of a finished run"
        ) from None
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise RonnaError(f"not a report: {reason}", where=str(path), fix="evaluate the run again") from None
    return Run(
        name=name or folder.name,
        metrics=report.test or report.validation,
        train=report.train,
        memory=report.memory,
        curves=folder / METRICS_FILE,
    )


def read_curves(path: Path) -> Curves:
    """Curves of a metrics.jsonl; a missing file, torn lines and missing numbers leave gaps, no error.

    A step written twice (a run that was resumed) counts as written last.
    """
    records = read_metrics(path) if path.exists() else []

    def curve(kind: str, key: str) -> Curve:
        points = {
            record["step"]: record[key]
            for record in records
            if record.get("kind") == kind and isinstance(record["step"], int) and _is_number(record.get(key))
        }
        return sorted((step, float(value) if math.isfinite(value) else math.nan) for step, value in points.items())

    rate, share = curve("train", "lr"), curve("train", "lr_scale")
    return Curves(curve("train", "loss"), curve("validation", "loss"), rate or share, not rate)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _strict(value: Any) -> Any:
    """`value` as strict JSON knows it: no NaN or infinity, no lone surrogate, no numpy number."""
    if isinstance(value, Mapping):
        return {_strict(str(key)): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if hasattr(value, "tolist"):
        return _strict(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _json(part: Part) -> str:
    return json.dumps(_strict(part.model_dump(mode="json")), indent=2, ensure_ascii=False, allow_nan=False)


def _write(path: Path, text: str) -> Path:
    """Whole or not at all: a page that is read while it is written again must not be torn."""
    draft = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        fix = "choose another output folder, or make room on the disk"
        raise RonnaError(f"cannot write: {error.strerror}", where=str(path), fix=fix) from None
    return path


def _most_confused(details: Details, most: int = 10) -> list[tuple[str, str, int, float]]:
    """(gold, predicted, rows, share of the gold class) of the commonest errors."""
    errors = [
        (details.labels[gold], details.labels[predicted], count, count / sum(row))
        for gold, row in enumerate(details.confusion)
        for predicted, count in enumerate(row)
        if count and gold != predicted
    ]
    return sorted(errors, key=lambda error: -error[2])[:most]


def _plots(runs: Sequence[Curves | None]) -> dict[str, str | None]:
    """Images of what the runs have; every run keeps its colour, with or without curves."""
    loss = [(run.train, run.validation) if run else ((), ()) for run in runs]
    drawn = any(train or validation for train, validation in loss)
    relative = any(run.relative for run in runs if run and run.rate)
    rates = [(_share_of_peak(run.rate) if relative else run.rate) if run else () for run in runs]
    return {
        "loss": _image(loss_plot(*zip(*loss, strict=True))) if drawn else None,
        "rate": _image(rate_plot(rates, relative)) if any(rates) else None,
    }


def _scatter(search: Search) -> str:
    """The score of every trial that has one, against each of its settings."""
    known = [trial for trial in search.trials if trial.value is not None]
    settings = {name: [trial.settings[name] for trial in known] for name in search.trials[0].settings}
    best = [trial.number for trial in known].index(search.best)
    return _image(search_plot(settings, [trial.value for trial in known], search.monitor, best))


def _share_of_peak(curve: Curve) -> Curve:
    peak = max((value for _, value in curve), default=1.0) or 1.0
    return [(step, value / peak) for step, value in curve]


def _image(svg: str) -> str:
    # As an image, not as part of the page: ids of several drawings cannot clash, nor can one run a script.
    return Markup("data:image/svg+xml;base64,") + b64encode(svg.encode()).decode()
