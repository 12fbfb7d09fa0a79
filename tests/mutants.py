"""Does the suite notice? Break an important line, run the test that guards it, and see it fail.

    python tests/mutants.py [NAME ...]

Each mutant is one replacement in a temporary copy of src. Before that its test must pass on the copy as it
is. Prints caught or missed for each and exits with 1 if any was missed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
PASSED, FAILED = 0, 1  # pytest's exit codes


class Mutant(NamedTuple):
    """`old`, which stands exactly once in src/ronna/`file`, becomes `new`; then `test` must fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


MUTANTS = [Mutant(**m) for m in tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))["mutant"]]


def source(mutant: Mutant, root: Path = REPOSITORY / "src") -> Path:
    """The file to break. ValueError unless what is to be replaced stands there once."""
    path = root / "ronna" / mutant.file
    count = path.read_text(encoding="utf-8").count(mutant.old)
    if count != 1:
        raise ValueError(f"{mutant.name}: {mutant.old!r} stands {count} times in {mutant.file}")
    return path


def run_test(node: str, src: Path) -> int:
    """Exit code of one test with the package taken from `src`."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-o",
        f"pythonpath={src}",
        node,
    ]
    environment = os.environ | {"PYTHONPATH": str(src), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True).returncode


def verdict(mutant: Mutant, src: Path, passing: set[str]) -> str:
    """caught, or missed and why. `src` is a copy, left as it was; `passing` are the tests seen to pass."""
    path = source(mutant, src)
    whole = path.read_text(encoding="utf-8")
    if mutant.test not in passing:
        if (code := run_test(mutant.test, src)) != PASSED:
            return f"missed: its test does not pass without it (exit code {code})"
        passing.add(mutant.test)
    path.write_text(whole.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        code = run_test(mutant.test, src)
    finally:
        path.write_text(whole, encoding="utf-8")
    return "caught" if code == FAILED else f"missed: exit code {code}"


def main(names: list[str]) -> int:
    unknown = set(names) - {m.name for m in MUTANTS}
    if unknown:
        print(f"no mutant {', '.join(sorted(unknown))}; there are: {', '.join(m.name for m in MUTANTS)}")
        return 2
    missed, passing = 0, set[str]()
    with tempfile.TemporaryDirectory() as folder:
        src = Path(folder) / "src"
        shutil.copytree(REPOSITORY / "src", src, ignore=shutil.ignore_patterns("__pycache__"))
        for mutant in MUTANTS:
            if names and mutant.name not in names:
                continue
            result = verdict(mutant, src, passing)
            missed += result != "caught"
            print(f"{result:8} {mutant.name} ({mutant.test})", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
