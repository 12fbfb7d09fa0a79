"""What the machine can do: device, precision, memory, and seeds that do not depend on it."""

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from hashlib import blake2b
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Literal, SupportsIndex

from ronna.base.errors import RonnaError

if TYPE_CHECKING:
    import torch

Kind = Literal["cpu", "cuda", "mps"]
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Hardware:
    """The device a run would use. Memory is the device's own: the host's for cpu and mps."""

    kind: Kind
    name: str
    cores: int  # CPU cores this process may use, a container's share counted
    memory_total: int  # bytes
    memory_available: int  # bytes
    bf16_fast: bool  # has bf16 instructions; torch computes bf16 on anything, often slower than fp32
    has_compiler: bool  # a C++ compiler on PATH, which torch.compile needs on a CPU


@dataclass(frozen=True)
class Host:
    """The machine beside any accelerator. flags: of its processor, as Linux tells them. Memory in bytes."""

    name: str
    cores: int
    flags: frozenset[str]
    total: int
    available: int


def host() -> Host:
    """Without torch."""
    flags = _proc_value("/proc/cpuinfo", "flags") or _proc_value("/proc/cpuinfo", "Features")
    return Host(_cpu_name(), _cores(), frozenset(flags.split()), *_host_memory())


def describe(device: str = "auto") -> Hardware:
    """The hardware behind `choose_device(device)`. RonnaError when that device is absent."""
    import torch

    chosen = choose_device(device)
    name, (total, available) = _cpu_name(), _host_memory()
    if chosen.type == "cuda":
        name = torch.cuda.get_device_name(chosen)
        available, total = torch.cuda.mem_get_info(chosen)
    return Hardware(
        kind=chosen.type,  # type: ignore[arg-type]  # choose_device knows no fourth
        name=name,
        cores=_cores(),
        memory_total=total,
        memory_available=available,
        bf16_fast=has_bf16(chosen),
        has_compiler=any(map(shutil.which, (os.environ.get("CXX") or "c++", "c++", "g++", "clang++"))),
    )


def choose_device(name: str) -> "torch.device":
    """`auto` (cuda, else mps, else cpu), `cpu`, `cuda`, `cuda:1` or `mps`. RonnaError when it is absent.

    Of several cards, `auto` and `cuda` are the one that is torch's current device, which is each rank's own.
    """
    import torch

    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    present = [*(f"cuda:{number}" for number in range(cuda)), *["mps"] * mps, "cpu"]
    if name in ("auto", "cuda") and cuda:
        return torch.device("cuda", torch.cuda.current_device())
    if name == "auto":
        return torch.device(present[0])
    if name not in present:
        kind, _, number = name.partition(":")
        known = name in ("cuda", "mps") or (kind == "cuda" and number.isdecimal())
        what = "this machine has no such device" if known else "not a device"
        raise RonnaError(what, where=f"device {name}", fix=f"use one of: auto, {', '.join(present)}")
    return torch.device(name)


def choose_precision(name: str, device: "torch.device") -> "tuple[torch.dtype, str]":
    """The dtype to compute in, and why: `auto` takes bf16 only where the hardware has it, `fp32`, `bf16`."""
    import torch

    fast = has_bf16(device)
    hardware = f"{device.type} {'has' if fast else 'has no'} bf16 instructions"
    if name == "auto":
        return (torch.bfloat16 if fast else torch.float32), hardware
    if name == "bf16":
        return (
            torch.bfloat16,
            "asked for" if fast else f"asked for, though {hardware}: expect it slower than fp32",
        )
    if name == "fp32":
        return torch.float32, "asked for"
    raise RonnaError("not a precision", where=f"precision {name}", fix="use one of: auto, fp32, bf16")


def seed_for(*counters: SupportsIndex) -> int:
    """A well mixed integer in [0, 2**63) for torch or numpy, from counters such as (seed, step, micro-batch).

    BLAKE2b (RFC 7693) of the counters, 16 bytes each: the same on every platform and in every version.
    Any bit of it is as good as another, which torch's CPU generator needs: it keeps the low 32.
    """
    data = b"".join(index(counter).to_bytes(16, "little", signed=True) for counter in counters)
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little") >> 1


def resident_bytes() -> int:
    """Bytes of memory this process holds now. Linux and macOS."""
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return int(_output("ps", "-o", "rss=", "-p", str(os.getpid()))) * 1024


def peak_resident_bytes() -> int:
    """The most bytes of memory this process ever held. Linux and macOS."""
    if sys.platform == "linux" and (peak := _proc_value("/proc/self/status", "VmHWM")):
        return int(peak.split()[0]) * 1024  # ru_maxrss would count a parent's memory before exec, too
    import resource

    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_rss if sys.platform == "darwin" else peak_rss * 1024


def held_bytes(device: "torch.device") -> int:
    """What a run holds now: this process of the host's memory, or torch of a GPU's, with what it keeps for later."""
    import torch

    return torch.cuda.memory_reserved(device) if device.type == "cuda" else resident_bytes()


def peak_bytes(device: "torch.device") -> int:
    """The most of it that there was."""
    import torch

    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_resident_bytes()


def has_bf16(device: "torch.device") -> bool:
    """Whether it has instructions for bf16."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    flags = _proc_value("/proc/cpuinfo", "flags").split()
    return device.type == "cpu" and ("avx512_bf16" in flags or "amx_bf16" in flags)


def _cpu_name() -> str:
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    return _proc_value("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    return min(cores, max(1, int(quota) // int(period))) if quota.isdecimal() else cores


def _host_memory() -> tuple[int, int]:
    """(total, available) bytes, a container's limit counted."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "darwin":
        pages = [
            line.split()[-1].rstrip(".")
            for line in _output("vm_stat").splitlines()[1:]
            if "free" in line or "inactive" in line or "speculative" in line
        ]
        return total, sum(map(int, pages)) * os.sysconf("SC_PAGE_SIZE")
    free = _proc_value("/proc/meminfo", "MemAvailable")
    available = int(free.split()[0]) * 1024 if free else total
    limit, used = _cgroup()
    if limit is not None and limit < total:
        total, available = limit, min(available, limit - used)
    return total, available


def _cgroup() -> tuple[int | None, int]:
    """(limit, used) bytes of the control group that this process is in, of either version; None: no limit."""
    lines = [line.split(":", 2) for line in _read(Path("/proc/self/cgroup")).splitlines()]
    own = next((path.lstrip("/") for _, kinds, path in lines if "memory" in kinds.split(",")), "")
    for folder, names in (
        (_CGROUP, ("memory.max", "memory.current", "inactive_file")),
        (_CGROUP / "memory" / own, ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
        (_CGROUP / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ):
        if (limit := _read(folder / names[0])).isdecimal():
            # Cached file pages count as used there, but give way to whoever asks for memory.
            stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
            return int(limit), int(_read(folder / names[1]) or 0) - int(stat.get(names[2], 0))
    return None, 0


def _proc_value(path: str, key: str) -> str:
    """The first value of `key : value` in a file of /proc, empty when the file or key is not there."""
    pairs = (line.partition(":") for line in _read(Path(path)).splitlines())
    return next((value.strip() for name, _, value in pairs if name.strip() == key), "")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
