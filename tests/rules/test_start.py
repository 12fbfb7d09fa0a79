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
# What torch compiles and divides models with: a second or two, for those who do.
COMPILERS = {"sympy", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp"}
SECONDS = 5.0  # half a second on an idle machine


def imported_by(repository, *command):
    """What a command of Python says, and the modules that it imports."""
    environment = {**os.environ, "PYTHONPATH": str(repository / "src")}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "ronna" in imported
    return done, imported


@pytest.mark.parametrize("command", [["-m", "ronna", "--help"], ["-c", "import ronna"]])
def test_starts_light(repository, command):
    started = time.perf_counter()
    done, imported = imported_by(repository, *command)
    seconds = time.perf_counter() - started
    assert not imported & HEAVY
    assert seconds < SECONDS
    assert ("pretrain" in done.stdout) == ("--help" in command)


def test_a_model_is_used_without_what_compiles_and_divides(repository, tiny_gpt):
    command = ["-m", "ronna", "generate", "--model", str(tiny_gpt), "--prompt", "the film", "--max-tokens", "2"]
    done, imported = imported_by(repository, *command)
    assert "the film" in done.stdout and "torch" in imported
    assert not imported & COMPILERS
