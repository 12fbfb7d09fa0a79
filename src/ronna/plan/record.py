"""What was foretold of runs beside what they took, a line a run: it says how far to trust a plan."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

LINES = 200  # the newest, which are kept
ENOUGH = 12  # from which on they are believed more than what the formulas were found to miss by
UNMEASURED = 0.11  # the most by which an estimate was too low or too high on configurations that were not fitted
ON_CARDS = 0.25  # what six of seven runs on an H200 stayed below, all but small ones with dropout or many lengths
LEAST = 0.02
TELLING = 2**28  # bytes of growth below which a run says more of what libraries load than of the formulas


@dataclass(frozen=True)
class Line:
    """Bytes that a process was to grow by and grew by at its most; seconds of a step likewise, 0 where nobody
    foretold."""

    kind: str  # cpu or cuda
    planned: int
    measured: int
    planned_seconds: float = 0.0
    measured_seconds: float = 0.0


def path(folder: Path) -> Path:
    return folder / "plans.jsonl"


def read(folder: Path, kind: str) -> list[Line]:
    """Lines of this kind of device; what is torn or not one is passed over."""
    try:
        found = [line_of(text) for text in path(folder).read_text("utf-8").splitlines()]
    except (OSError, ValueError):
        return []
    return [line for line in found if line is not None and line.kind == kind]


def line_of(text: str) -> Line | None:
    try:
        line = Line(**json.loads(text))
        return line if line.planned > 0 and line.measured > 0 else None
    except (ValueError, TypeError):
        return None


def add(folder: Path, line: Line) -> None:
    """Where the folder cannot be written to, nothing is remembered."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = path(folder).read_text("utf-8").splitlines() if path(folder).exists() else []
        draft = path(folder).with_name(f"plans.{os.getpid()}.tmp")
        draft.write_text("\n".join([*old[-LINES + 1 :], json.dumps(asdict(line))]) + "\n", "utf-8")
        draft.replace(path(folder))
    except (OSError, ValueError):
        return


def margin(lines: list[Line], kind: str) -> float:
    """Share by which a run may take more than was foretold: what nineteen in twenty stayed below."""
    over = sorted(max(0.0, line.measured / line.planned - 1) for line in lines if line.planned >= TELLING)
    if len(over) < ENOUGH:
        return ON_CARDS if kind == "cuda" else UNMEASURED
    return max(LEAST, over[min(len(over) - 1, int(0.95 * len(over)))])
