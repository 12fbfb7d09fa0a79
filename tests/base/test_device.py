"""Devices are chosen or refused in words, precision follows the hardware, seeds never change."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ronna.base import device as module
from ronna.base.device import (
    choose_device,
    choose_precision,
    describe,
    peak_resident_bytes,
    resident_bytes,
    seed_for,
)
from ronna.base.errors import RonnaError

CPU = torch.device("cpu")


def test_describe():
    hardware = describe("cpu")
    assert hardware.kind == "cpu" and hardware.name
    assert 1 <= hardware.cores <= (os.cpu_count() or 1)
    assert 0 < hardware.memory_available <= hardware.memory_total


def test_a_containers_limits_count(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CGROUP", tmp_path)
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "memory.max").write_text(f"{2**27}\n")
    (tmp_path / "memory.current").write_text(f"{2**26}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {2**25}\n")
    hardware = describe("cpu")
    assert hardware.cores == 1
    assert hardware.memory_total == 2**27
    assert hardware.memory_available == 2**27 - 2**26 + 2**25
    (tmp_path / "memory.max").write_text("max\n")
    assert describe("cpu").memory_total > 2**27


@pytest.mark.parametrize(("has_cuda", "expected"), [(False, "cpu"), (True, "cuda:0")])
def test_auto_takes_the_best(monkeypatch, has_cuda, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert choose_device("auto") == torch.device(expected)
    assert choose_device("cpu") == CPU
    if has_cuda:
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)  # as of the second rank of a machine
        assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:1")
        assert choose_device("cuda:1") == torch.device("cuda:1")
    absent = "cuda:2" if has_cuda else "cuda"
    with pytest.raises(RonnaError) as caught:
        choose_device(absent)
    assert caught.value.what == "this machine has no such device"
    assert caught.value.fix == "use one of: auto, " + ("cuda:0, cuda:1, cpu" if has_cuda else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:", "", "CPU"])
def test_no_device(name):
    with pytest.raises(RonnaError, match="not a device"):
        choose_device(name)


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("avx2 avx512f", torch.float32), ("avx512_bf16", torch.bfloat16), ("amx_tile amx_bf16", torch.bfloat16)],
)
def test_precision_follows_the_instructions(tmp_path, monkeypatch, flags, dtype):
    cpuinfo = f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\n"
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    read = module._proc_value
    monkeypatch.setattr(module, "_proc_value", lambda path, key: read(str(tmp_path / "cpuinfo"), key))
    has = "has" if dtype == torch.bfloat16 else "has no"
    assert choose_precision("auto", CPU) == (dtype, f"cpu {has} bf16 instructions")
    assert choose_precision("bf16", CPU)[0] == torch.bfloat16
    assert ("slower" in choose_precision("bf16", CPU)[1]) == (dtype == torch.float32)
    assert choose_precision("fp32", CPU) == (torch.float32, "asked for")
    with pytest.raises(RonnaError, match="precision fp8: not a precision"):
        choose_precision("fp8", CPU)


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_precision_of_a_gpu(monkeypatch, capability, fast):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dtype, _ = choose_precision("auto", torch.device("cuda:0"))
    assert (dtype == torch.bfloat16) == fast


def test_seeds_are_for_ever():
    # These numbers stand in saved runs: if one changes, no old run can be resumed bit for bit.
    assert seed_for(-1, 2**63) == 6504898572529156112
    assert seed_for(0) == 520810605562734633
    assert seed_for(1, 2, 3) == 6839638155163434425
    assert seed_for(np.int64(1), 2, 3) == seed_for(1, 2, 3)


@given(st.lists(st.integers(-(2**63), 2**63), max_size=4), st.lists(st.integers(-(2**63), 2**63), max_size=4))
def test_seeds_differ_when_counters_do(left, right):
    assert 0 <= seed_for(*left) < 2**63
    assert (seed_for(*left) == seed_for(*right)) == (left == right)
    torch.Generator().manual_seed(seed_for(*left))
    np.random.default_rng(seed_for(*left))


def test_seeds_are_well_mixed():
    # Over neighbouring counters every bit is set half of the time: 4,000 draws, five standard deviations.
    seeds = [seed_for(0, step, micro) for step in range(1000) for micro in range(4)]
    bits = np.array([[seed >> bit & 1 for bit in range(63)] for seed in seeds]).mean(0)
    assert np.abs(bits - 0.5).max() < 5 * 0.5 / np.sqrt(len(seeds))


def test_resident_memory_follows_an_allocation():
    code = (
        "from ronna.base.device import *; before = resident_bytes(); data = bytearray(b'1') * 2**26\n"
        "held = resident_bytes(); del data\n"
        "print(held - before, resident_bytes() - before, peak_resident_bytes() - before)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
    held, freed, peak = map(int, done.stdout.split())
    slack = 2**20  # the kernel counts a process's pages in batches
    assert 2**26 - slack <= held < 2**27 and freed < 2**24
    assert 2**26 - slack <= peak < 2**27
    assert peak_resident_bytes() >= resident_bytes() - slack
