"""The record of plans: it survives what is torn, stays short, and widens or narrows the margin."""

from pathlib import Path

import pytest

from ronna.plan import record
from ronna.plan.record import Line


def test_lines_come_back(tmp_path: Path) -> None:
    lines = [Line("cpu", 100, 110, 1.0, 1.1), Line("cuda", 5, 4)]
    for line in lines:
        record.add(tmp_path / "new", line)
    assert record.read(tmp_path / "new", "cpu") == lines[:1]
    assert record.read(tmp_path / "new", "cuda") == lines[1:]
    assert record.read(tmp_path, "cpu") == []


def test_what_is_no_line_is_passed_over(tmp_path: Path) -> None:
    record.add(tmp_path, Line("cpu", 100, 110))
    with record.path(tmp_path).open("a") as file:
        file.write('{"kind": "cpu", "planned": 0, "measured": 3}\n{"kind": "cpu", "pla\n[1]\n{"other": 1}\n')
    record.add(tmp_path, Line("cpu", 100, 120))
    assert [line.measured for line in record.read(tmp_path, "cpu")] == [110, 120]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for i in range(record.LINES + 30):
        record.add(tmp_path, Line("cpu", 100, 100 + i))
    lines = record.read(tmp_path, "cpu")
    assert len(lines) == record.LINES
    assert lines[-1].measured == 100 + record.LINES + 29


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    record.add(tmp_path / "file", Line("cpu", 1, 1))
    assert record.read(tmp_path / "file", "cpu") == []
    assert (tmp_path / "file").read_text() == ""


def test_margin() -> None:
    def grown(percent: int, planned: int = record.TELLING) -> Line:
        return Line("cpu", planned, planned * percent // 100)

    assert record.margin([], "cpu") == record.UNMEASURED
    few = [grown(150)] * (record.ENOUGH - 1)
    assert record.margin(few, "cpu") == record.UNMEASURED
    assert record.margin(few, "cuda") == record.ON_CARDS > record.UNMEASURED
    assert record.margin([grown(90)] * 40, "cpu") == record.LEAST
    mixed = [grown(100)] * 38 + [grown(107), grown(160)]
    assert record.margin(mixed, "cpu") == pytest.approx(0.07)
    assert record.margin([*mixed, *[grown(300, record.TELLING - 1)] * 40], "cpu") == pytest.approx(0.07)
