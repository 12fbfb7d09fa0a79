"""The list of mutants holds together, and the runner tells caught from missed."""

import shutil
from pathlib import Path

import pytest

from .mutants import MUTANTS, REPOSITORY, Mutant, main, source, verdict

TEST = """
from ronna.base.errors import RonnaError

def test_message():
    assert str(RonnaError("what", where="here")) == "here: what"

def test_nothing():
    assert True
"""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_changes_one_place_and_names_a_test(mutant: Mutant) -> None:
    assert source(mutant).is_file() and mutant.old != mutant.new
    path, _, rest = mutant.test.partition("::")
    assert f"def {rest.partition('[')[0]}(" in (REPOSITORY / path).read_text(encoding="utf-8")


def test_names_are_unique_and_unknown_ones_refused(capsys: pytest.CaptureFixture[str]) -> None:
    names = [m.name for m in MUTANTS]
    assert len(set(names)) == len(names)
    assert main(["nobody"]) == 2
    assert "no mutant nobody; there are: leaked mask" in capsys.readouterr().out


def test_caught_missed_and_broken(tmp_path: Path) -> None:
    src = tmp_path / "src"
    base = src / "ronna" / "base"
    base.mkdir(parents=True)
    for folder in (src / "ronna", base):
        (folder / "__init__.py").touch()
    shutil.copy(REPOSITORY / "src/ronna/base/errors.py", base)
    whole = (base / "errors.py").read_text(encoding="utf-8")
    test = tmp_path / "test_guard.py"
    test.write_text(TEST)
    swapped = Mutant("swapped", "base/errors.py", "{self.where}: {self.what}", "{self.what}: {self.where}", "")
    passing: set[str] = set()
    for node, result in (
        ("message", "caught"),
        ("nothing", "missed: exit code 0"),
        ("absent", "missed: its test"),
    ):
        mutant = swapped._replace(test=f"{test}::test_{node}")
        assert verdict(mutant, src, passing).startswith(result)
    assert (base / "errors.py").read_text(encoding="utf-8") == whole
    unreadable = swapped._replace(new="{", test=f"{test}::test_message")
    assert verdict(unreadable, src, passing).startswith("missed: exit code")
    with pytest.raises(ValueError, match="stands 0 times"):
        source(swapped._replace(old="not there"))
