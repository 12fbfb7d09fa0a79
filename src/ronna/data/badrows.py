"""Accounts of rows: what came in, what was kept, what was set aside and why."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ronna.base.errors import RonnaError

T = TypeVar("T")

PLACES_SHOWN = 5
RAW_KEPT = 10_000  # characters of a bad row in the quarantine file; its place tells where the rest is


class Record(NamedTuple):
    """One row of a source. `line` counts from 1 (the row number in Parquet).

    `typed` is False where the format knows only strings (CSV, TSV); `require` then reads numbers from them.
    """

    fields: dict[str, Any]
    path: Path
    line: int
    typed: bool = True


class BadRow(Exception):
    """A row to be set aside. `reason` is what is counted, `detail` what this row in particular shows."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


@dataclass
class BadRows:
    """Counts rows, and stops at the first bad one over `limit`.

    A row counts as kept until some stage (reader, `require`, a task's own check) sets it aside, so
    `rows_in == kept + quarantined` holds at every moment. `policies` counts rows that a stated policy
    touched without setting them aside.
    """

    limit: int = 0
    quarantine_file: Path | None = None
    rows_in: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    policies: Counter[str] = field(default_factory=Counter)

    @property
    def quarantined(self) -> int:
        return self.reasons.total()

    @property
    def kept(self) -> int:
        return self.rows_in - self.quarantined

    def quarantine(self, path: Path, line: int, bad: BadRow, raw: str | bytes = "") -> None:
        """Sets one row aside. Raises RonnaError when that is one more than `limit`."""
        if self.quarantine_file is not None:
            self._write(path, line, bad, raw)
        self.reasons[bad.reason] += 1
        places = self.places.setdefault(bad.reason, [])
        if len(places) < PLACES_SHOWN:
            places.append(f"{path}:{line}")
        if self.quarantined > self.limit:
            raise RonnaError(
                f"{bad}{self._others()}",
                where=f"{path}:{line}",
                fix=f"mend the row, or set such rows aside with --max-bad-rows N (now {self.limit})",
            )

    def sift(self, records: Iterable[Record], convert: Callable[[Record], T]) -> Iterator[T]:
        """Yields `convert(record)`; a record for which it raises `BadRow` is set aside instead."""
        for record in records:
            try:
                converted = convert(record)
            except BadRow as bad:
                raw = json.dumps(record.fields, ensure_ascii=False, default=str)
                self.quarantine(record.path, record.line, bad, raw)
                continue
            yield converted

    def summary(self) -> dict[str, Any]:
        """The account for a report, ready for JSON."""
        return {
            "rows_in": self.rows_in,
            "kept": self.kept,
            "quarantined": self.quarantined,
            "reasons": {
                reason: {"count": count, "places": self.places[reason]}
                for reason, count in sorted(self.reasons.items())
            },
            "policies": dict(sorted(self.policies.items())),
        }

    def _others(self) -> str:
        if self.quarantined == 1:
            return ""
        counts = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common())
        return f" ({self.quarantined} bad rows of {self.rows_in}: {counts})"

    def _write(self, path: Path, line: int, bad: BadRow, raw: str | bytes) -> None:
        assert self.quarantine_file is not None
        shown = raw[:RAW_KEPT]
        text = shown.decode("utf-8", "backslashreplace") if isinstance(shown, bytes) else shown
        row = {"path": str(path), "line": line, "reason": bad.reason, "detail": bad.detail, "raw": text}
        # ASCII, because the raw row may hold lone surrogates, which no UTF-8 file can.
        self.quarantine_file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.quarantine_file, "a" if self.quarantined else "w", encoding="ascii") as file:
            file.write(json.dumps(row) + "\n")
