"""A run of two ranks that loses one recovers by itself, and ends in the same bits."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path


def ranks_of(agent: int) -> dict[int, int]:
    """Process ids by rank of those that a launcher has started, as far as they have begun."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            parent = int(re.search(r"^PPid:\s+(\d+)", (folder / "status").read_text(), re.MULTILINE)[1])
            variables = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, TypeError):
            continue
        rank = next((v[5:] for v in variables if v.startswith(b"RANK=")), None)
        if parent == agent and rank is not None:
            found[int(rank)] = int(folder.name)
    return found


def command(out: Path, shards: Path, *more: str) -> list[str]:
    made = [sys.executable, "-m", "ronna", "pretrain", "--nproc", "2", "--model", "bert-tiny", "--objective", "mlm"]
    made += ["--data", str(shards), "--out", str(out), "--steps", "8", "--batch", "4", "--length", "32"]
    return [*made, "--set", "train.save_every=1", "--set", "train.keep=100", *more]


def saved(out: Path, step: int) -> bool:
    return (out / "checkpoints" / f"step-{step:08d}").is_dir()


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def test_a_lost_rank_is_replaced_and_the_bits_are_the_same(shards, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen(command(out, shards["wordpiece"]), stderr=subprocess.PIPE, text=True)
    killed = []
    for rank, step in ((1, 2), (0, 5)):
        while not saved(out, step):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.005)
        pid = ranks_of(process.pid)[rank]
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert "rank 1 was ended by SIGKILL; starting again" in said and "rank 0 was ended by SIGKILL" in said
    assert said.count("resuming from step-") == 2 and not ranks_of(process.pid)
    whole = tmp_path / "whole"
    subprocess.run(command(whole, shards["wordpiece"]), check=True, capture_output=True)
    assert weights(out) == weights(whole)
