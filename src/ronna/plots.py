"""Drawings for the report: loss curves, learning rate, confusion matrix, each as one SVG text.

Drawn with matplotlib's object interface (no pyplot, no state shared between calls); matplotlib is
imported only when something is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ronna.tasks.metrics import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#65a30d")
FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Heiti SC",
    "Arial Unicode MS",
)

Curve = Sequence[tuple[int, float]]
"""(step, value) in order of steps; NaN breaks the line."""


def loss_plot(train: Sequence[Curve], validation: Sequence[Curve]) -> str:
    """One colour a run: train as a line over its thinner raw values, validation as dots joined by dashes."""
    figure, axes = _axes("loss (nats)")
    shown: list[float] = []
    for number, curve in enumerate(train):
        colour = COLOURS[number % len(COLOURS)]
        steps, values = _points(curve)
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(values), color=colour, linewidth=1.6)
        shown.extend(values[len(values) // 100 :])
    for number, curve in enumerate(validation):
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(*_points(curve), color=colour, linestyle="--", marker="o", markersize=3.5, linewidth=1)
        shown.extend(_points(curve)[1])
    known = [value for value in shown if np.isfinite(value)]
    if known:  # The first hundredth of a long run may leave the top: the end is what is read.
        margin = 0.05 * (max(known) - min(known)) or 0.1
        axes.set_ylim(min(known) - margin, max(known) + margin)
    return _svg(figure)


def rate_plot(rates: Sequence[Curve], relative: bool) -> str:
    """The learning rate of every run by step; `relative`: as a share of its peak."""
    figure, axes = _axes("rate / peak rate" if relative else "learning rate", height=1.3)
    for number, curve in enumerate(rates):
        axes.plot(*_points(curve), color=COLOURS[number % len(COLOURS)], linewidth=1.4)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    return _svg(figure)


def confusion_plot(confusion: Sequence[Sequence[int]], labels: Sequence[str]) -> tuple[str, bool]:
    """A heat map of each gold row's shares, its counts written in, and whether the labels are named.

    Where no font at hand can draw every label they are numbered, and the page prints a legend.
    """
    from matplotlib.colors import PowerNorm

    counts = np.asarray(confusion, dtype=np.float64)
    size = len(labels)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [_short(label) for label in labels]
    font = _font_for("".join(names))
    if font is None:
        names = [str(number) for number in range(1, size + 1)]
    inches = min(max(2.2, 0.5 * size), 3 + 0.17 * size)
    points = min(9.0, 0.5 * 72 * inches / size)
    figure, axes = _canvas(inches, inches)
    # A root scale: one error in a hundred must still be seen.
    axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    style: dict[str, Any] = {"fontproperties": font, "fontsize": points, "parse_math": False}
    axes.set_xticks(range(size), names, rotation=90 if max(map(len, names)) > 2 else 0, **style)
    axes.set_yticks(range(size), names, **style)
    for row, column in np.argwhere(counts > 0):
        ink = "white" if shares[row, column] > 0.35 else "#1f2937"
        digits = f"{int(counts[row, column])}"
        small = min(0.9 * points, 1.2 * 72 * inches / size / len(digits))
        cell = axes.text(column, row, digits, ha="center", va="center", fontsize=small, color=ink)
        cell.set_in_layout(False)
    between = np.arange(1, size) - 0.5
    axes.hlines(between, -0.5, size - 0.5, color="#e5e7eb", linewidth=0.5)
    axes.vlines(between, -0.5, size - 0.5, color="#e5e7eb", linewidth=0.5)
    axes.tick_params(length=0)
    axes.tick_params(axis="x", labeltop=size > 20)
    axes.set(xlabel="predicted", ylabel="gold")
    return _svg(figure), font is not None


def search_plot(settings: Mapping[str, Sequence[float]], values: Sequence[float | None], name: str, best: int) -> str:
    """A panel a setting: the score `name` of each trial against what it had for it, the best one ringed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 * len(settings), 2.4))
    panels = figure.subplots(1, len(settings), sharey=True, squeeze=False, gridspec_kw={"wspace": 0.2})[0]
    for axes, (setting, tried) in zip(panels, settings.items(), strict=True):
        axes.scatter(tried, values, color=COLOURS[0], s=22, alpha=0.75, linewidth=0)
        axes.scatter(tried[best], values[best], s=90, facecolor="none", edgecolor=COLOURS[1], linewidth=1.8)
        if setting == "lr":
            ends = sorted({min(tried), max(tried)})
            axes.set_xscale("log")
            axes.set_xticks([], minor=True)
            axes.set_xticks(ends, labels=[f"{end:.1e}" for end in ends])
        elif len(set(tried)) <= 6:
            axes.set_xticks(sorted(set(tried)))
        axes.set_xlabel(setting)
        axes.grid(color="#e5e7eb", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(name)
    return _svg(figure)


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Axes of exactly this size in inches; what stands around them is added when saving."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.add_axes((0, 0, 1, 1))


def _axes(ylabel: str, height: float = 2.9) -> tuple[Figure, Axes]:
    figure, axes = _canvas(7.8, height)
    axes.set(xlabel="step", ylabel=ylabel)
    axes.grid(color="#e5e7eb", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> str:
    """The same figure gives the same text: no date, ids from a fixed salt."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "ronna"}):
        figure.savefig(buffer, format="svg", dpi=160, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _short(label: str, width: int = 32) -> str:
    text = visible(label)
    return text if len(text) <= width else text[: width - 1] + "…"


def _font_for(text: str) -> FontProperties | None:
    """The first of FONTS installed here that has a glyph for every character of `text`."""
    from matplotlib import font_manager

    wanted = {ord(char) for char in text}
    installed = {entry.name: entry.fname for entry in font_manager.fontManager.ttflist}
    for name in FONTS:
        if name in installed and wanted <= font_manager.get_font(installed[name]).get_charmap().keys():
            return font_manager.FontProperties(fname=installed[name])
    return None


def _points(curve: Curve, most: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, at most `most` of them: the means of equal runs of points."""
    steps, values = np.array(curve, dtype=np.float64).reshape(-1, 2).T
    if len(steps) <= most:
        return steps, values
    groups = np.array_split(np.arange(len(steps)), most)
    return steps[[group[-1] for group in groups]], np.array([values[group].mean() for group in groups])


def _smooth(values: np.ndarray) -> np.ndarray:
    """A mean over up to 2 % of the points each side, NaN passed over.

    Centred, because a trailing mean lags a falling loss and would flatter the validation loss beside it.
    """
    index, known = np.arange(len(values)), np.isfinite(values)
    half = np.minimum(index, len(values) // 50)
    end = np.minimum(index + half + 1, len(values))
    totals = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    sums = totals[end] - totals[index - half]
    number = counts[end] - counts[index - half]
    return np.where(known, sums / np.maximum(number, 1), np.nan)
