"""The pages of the report as templates, and how numbers are written in them."""

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ronna.tasks.bootstrap import Metric
from ronna.tasks.metrics import visible


def render(name: str, **values: Any) -> str:
    """The page of template `name`; every text in `values` is escaped, and its control characters shown."""

    def finalize(value: Any) -> Any:
        if value is None:
            return "—"
        return visible(value, keep="\n\t") if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    environment.filters |= {
        "number": number,
        "metric": metric_text,
        "binary": binary_bytes,
        "duration": duration,
    }
    return environment.get_template(name).render(**values)


def number(value: float | None) -> str:
    """Four decimals, or fewer digits for what is large; a whole number in full."""
    if value is None or not math.isfinite(value):
        return "—"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"


def metric_text(metric: Metric) -> str:
    interval = f" ({number(metric.low)} to {number(metric.high)})" if metric.low is not None else ""
    return number(metric.value) + interval


def binary_bytes(count: float | None) -> str:
    if count is None:
        return "—"
    power = min(4, max(0, (int(count).bit_length() - 1) // 10))
    return f"{count / 1024**power:.{2 if power > 1 else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
