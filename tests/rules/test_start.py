"""`ronna --help` answers at once: nothing heavy is imported before there is work to do."""

import os
import subprocess
import sys
import time

import pytest

HEAVY = {
    "torch",
    "numpy",
    "pydantic",
    "transformers",
    "tokenizers",
    "pyarrow",
    "scipy",
    "sklearn",
    "matplotlib",
}
SECONDS = 5.0  # half a second on an idle machine


@pytest.mark.parametrize("command", [["-m", "ronna", "--help"], ["-c", "import ronna"]])
def test_starts_light(repository, command):
    environment = {**os.environ, "PYTHONPATH": str(repository / "src")}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], capture_output=True, text=True, env=environment
    )
    seconds = time.perf_counter() - started
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ronna" in imported
    assert not imported & HEAVY
    assert seconds < SECONDS
    assert ("pretrain" in done.stdout) == ("--help" in command)
