"""A moment of the fuzzer, and that it would tell."""

from pathlib import Path

import pytest

from ronna.data import sources
from ronna.data.badrows import BadRows

from . import fuzz


@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_damaged_files_end_in_rows_or_refusals(name: str, tmp_path: Path) -> None:
    outcomes = fuzz.fuzz(name, 0.3, 1, tmp_path)
    assert sum(outcomes.values()) > 10 and set(outcomes) <= {"rows", "refused"}


def test_sound_files_are_read_whole(tmp_path: Path) -> None:
    for name, make in fuzz.FORMATS.items():
        (tmp_path / name).write_bytes(make())
        assert fuzz.attempt(tmp_path / name) == "rows"


def test_an_uncaught_exception_and_a_lost_row_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(fuzz.lines())
    monkeypatch.setattr(BadRows, "kept", 0)
    assert "0 counted" in fuzz.attempt(path)
    monkeypatch.setattr(sources, "recognise", lambda path, fmt: 1 / 0)
    assert "ZeroDivisionError" in fuzz.attempt(path)
