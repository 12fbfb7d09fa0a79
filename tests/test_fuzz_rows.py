"""A moment of the fuzzers of records and of folders, and that they would tell."""

from pathlib import Path

import pytest

from ronna.tasks import classify

from . import fuzz_folders
from . import fuzz_rows as fuzz


@pytest.mark.parametrize("task", fuzz.LAYOUTS)
def test_damaged_records_end_in_examples_or_refusals(task: str, tmp_path: Path) -> None:
    outcomes = fuzz.fuzz(task, 1, 1, tmp_path)
    assert outcomes["examples"] > 3 and set(outcomes) <= {"examples", "refused"}


def test_sound_records_are_examples(tmp_path: Path) -> None:
    models = fuzz.models(tmp_path)
    for task, layouts in fuzz.LAYOUTS.items():
        for rows in layouts:
            assert fuzz.attempt(task, models[fuzz.MODELS.get(task, "bert")], rows * 8, rows, tmp_path) == "examples"


def test_an_uncaught_exception_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = fuzz.LAYOUTS["classify"][0]
    monkeypatch.setattr(classify, "usable_text", lambda record, column: 1 / 0)
    assert "ZeroDivisionError" in fuzz.attempt("classify", fuzz.models(tmp_path)["bert"], rows, rows, tmp_path)


@pytest.mark.parametrize("kind", fuzz_folders.KINDS)
def test_damaged_folders_are_loaded_or_refused(kind: str, tmp_path: Path) -> None:
    outcomes = fuzz_folders.fuzz(kind, 1, 1, tmp_path)
    assert min(outcomes["loaded"], outcomes["refused"]) > 3 and set(outcomes) == {"loaded", "refused"}


@pytest.mark.parametrize("kind", fuzz_folders.KINDS)
def test_sound_folders_are_loaded(kind: str, tmp_path: Path) -> None:
    assert {fuzz_folders.attempt(load) for _, load in fuzz_folders.KINDS[kind](tmp_path)} == {"loaded"}


def test_an_uncaught_exception_of_a_folder_is_told() -> None:
    assert "ZeroDivisionError" in fuzz_folders.attempt(lambda: 1 / 0)
