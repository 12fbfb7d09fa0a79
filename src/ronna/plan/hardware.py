"""What a device can do: its memory, how fast it multiplies matrices and moves bytes. GPUs stand in a table; a CPU is
told from its flags, and better from what `ronna.base.rates` has measured.

Rates of the table are the makers' for dense products (their data sheets), those of bf16 with sums in fp32 and of fp32
without TF32, which torch leaves off, times `REACHED`.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from math import isfinite
from typing import Literal

from ronna.base.errors import RonnaError
from ronna.base.rates import Rates
from ronna.plan.shapes import Dtype

# Shares of a data sheet's figures: of products of several thousand rows, of a pass over more than a cache, of a copy.
REACHED, STREAMED, COPIED = 0.78, 0.85, 0.8
GB, GIB, MIB, TERA = 10**9, 2**30, 2**20, 10**12
UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
DISK = 1.0 * GB  # bytes a second, where nobody says more


@dataclass(frozen=True)
class Device:
    """memory: bytes there are. rates: FLOP/s that matrix products reach; 0 where there are none in that precision.
    bandwidth: bytes/s of its memory; link: bytes/s one way, to its neighbours in the machine, or to the host where it
    has no link to them; network: bytes/s one way to devices of other machines, each of which has `machine`; host:
    bytes/s to where `offload` puts things: the host's memory, or of a CPU its disk. taken: bytes that driver and
    kernels hold, or that a process on a CPU begins with. watts: at full load, the whole board.
    costs: measured seconds of one unit of a kind of work (see `ronna.base.rates`), which go before what rates and
    bandwidth say. source: where the figures come from."""

    name: str
    kind: Literal["cpu", "cuda"]
    memory: int
    rates: Mapping[Dtype, float]
    bandwidth: float
    link: float
    taken: int
    watts: float
    host: float = DISK
    costs: Mapping[str, float] = field(default_factory=dict)
    source: str = "its data sheet"
    network: float = 12.5 * GB
    machine: int = 8

    @property
    def room(self) -> int:
        return self.memory - self.taken

    def precision(self) -> Dtype:
        """The faster one to compute in."""
        return "bf16" if self.rates["bf16"] > self.rates["fp32"] else "fp32"


def card(
    name: str, gib: float, tera: tuple[float, float], gigabytes: float, watts: float, link: float = 32.0
) -> Device:
    """Of a data sheet: GiB as torch sees them, TFLOP/s of bf16 and fp32, GB/s, W, GB/s of the link one way."""
    rates: dict[Dtype, float] = {"bf16": tera[0] * TERA * REACHED, "fp32": tera[1] * TERA * REACHED}
    host = (64.0 if name.startswith(("h", "b")) else 16.0 if name in OLD else 32.0) * GB * COPIED
    moved = (gigabytes * GB * STREAMED, link * GB * COPIED)
    # What clusters of them usually have for each card: 400 Gbit/s, 200, or 100.
    network = (50.0 if name.startswith(("h", "b")) else 25.0 if name.startswith("a100") else 12.5) * GB * COPIED
    return Device(name, "cuda", round(gib * GIB), rates, *moved, 700 * MIB, watts, host, network=network)


OLD = ("t4", "v100-16gb", "v100-32gb")  # PCIe 3
CARDS = (
    card("t4", 14.6, (0.0, 8.1), 320, 70, 16),  # this one and the next have no bf16
    card("v100-16gb", 15.8, (0.0, 15.7), 900, 300, 150),
    card("v100-32gb", 31.7, (0.0, 15.7), 900, 300, 150),
    card("a10", 22.0, (125, 31.2), 600, 150),
    card("a10g", 22.0, (70, 31.5), 600, 300),
    card("a30", 23.5, (165, 10.3), 933, 165, 100),
    card("a40", 44.3, (150, 37.4), 696, 300, 56),
    card("l4", 22.0, (121, 30.3), 300, 72),
    card("l40", 44.3, (181, 90.5), 864, 300),
    card("l40s", 44.4, (362, 91.6), 864, 350),
    card("a5000", 23.5, (111, 27.8), 768, 230, 56),
    card("a6000", 47.4, (155, 38.7), 768, 300, 56),
    card("rtx6000-ada", 47.4, (364, 91.1), 960, 300),
    card("rtx3060-12gb", 11.6, (25.5, 12.7), 360, 170),
    card("rtx3080-10gb", 9.7, (59.5, 29.8), 760, 320),
    card("rtx3090", 23.6, (71, 35.6), 936, 350, 56),
    card("rtx4060ti-16gb", 15.6, (44, 22.1), 288, 165),
    card("rtx4070", 11.6, (58, 29.1), 504, 200),
    card("rtx4080", 15.6, (97.5, 48.7), 717, 320),
    card("rtx4090", 23.5, (165, 82.6), 1008, 450),
    card("rtx4090d", 23.5, (147, 73.5), 1008, 425),
    card("rtx5090", 31.3, (209, 104.8), 1792, 575, 64),
    card("a100-40gb", 39.4, (312, 19.5), 1555, 400, 300),
    card("a100-80gb", 79.2, (312, 19.5), 2039, 400, 300),
    card("a800-80gb", 79.2, (312, 19.5), 2039, 400, 200),
    card("h20", 95.0, (148, 44), 4000, 400, 450),
    card("h100-80gb", 79.1, (989, 67), 3350, 700, 450),
    card("h100-pcie", 79.1, (756, 51), 2000, 350, 300),
    card("h800-80gb", 79.1, (989, 67), 3350, 700, 200),
    card("h200", 139.8, (989, 67), 4800, 700, 450),
    card("b200", 178.3, (2250, 75), 7700, 1000, 900),
)
# GFLOP/s a core in (bf16, fp32), by the first flag of /proc/cpuinfo that is there: what products of some thousand rows
# reach on server cores of about 2.5 GHz. Where bf16 has no instructions of its own it is computed by way of fp32.
CORES: tuple[tuple[str, float, float], ...] = (
    ("amx_bf16", 700, 90),
    ("avx512_bf16", 200, 85),
    ("avx512f", 25, 75),
    ("avx2", 12, 40),
    ("bf16", 90, 30),  # of 64-bit ARM
    ("asimd", 8, 25),
    ("neon", 8, 20),
    ("", 2, 6),
)
STREAM, STREAM_MOST = 10 * GB, 200 * GB  # bytes/s of memory, of one core and of all
PROCESS = 375 * MIB  # of Python, torch and what it loads
CORE_WATTS = 8.0


def cpu(cores: int, flags: Collection[str], memory: int, name: str = "cpu") -> Device:
    """A rough guess, within a factor of two or so, for a CPU that has not been measured."""
    _, bf16, fp32 = next(row for row in CORES if not row[0] or row[0] in flags)
    rates: dict[Dtype, float] = {"bf16": cores * bf16 * GB, "fp32": cores * fp32 * GB}
    stream = float(min(cores * STREAM, STREAM_MOST))
    return Device(
        name,
        "cpu",
        memory,
        rates,
        stream,
        stream,
        PROCESS,
        cores * CORE_WATTS,
        DISK,
        {},
        "a guess by its flags (--probe measures)",
    )


def measured(found: Rates, memory: int) -> Device:
    """This machine, of so many bytes of memory, by what it has been measured to reach."""
    rates: dict[Dtype, float] = {"bf16": found.products["bf16"], "fp32": found.products["fp32"]}
    cuda = found.kind == "cuda"
    taken, watts = (700 * MIB, 400.0) if cuda else (PROCESS, found.threads * CORE_WATTS)
    host = 25.0 * GB if cuda else DISK
    link = host if cuda else found.bandwidth
    kind: Literal["cpu", "cuda"] = "cuda" if cuda else "cpu"
    return Device(
        found.name, kind, memory, rates, found.bandwidth, link, taken, watts, host, found.costs, "measured rates"
    )


def plain(name: str) -> str:
    """Without what makers and habits add to a card's name."""
    return re.sub(r"nvidia|geforce|tesla|rtx|[\s_-]", "", name.lower())


def device(name: str) -> tuple[int, Device]:
    """How many and which: "h200" -> 1, "8xh100-80gb" -> 8. Raises RonnaError where the table has no such card, or
    several."""
    counted = re.fullmatch(r"\s*(?:(\d+)\s*[x*]\s*)?(\S.*?)\s*", name)
    number, wanted = (int(counted[1] or 1), plain(counted[2])) if counted else (0, "")
    if number < 1 or not wanted:
        fix = 'give a number and a card, such as "h200" or "8xh100-80gb"'
        raise RonnaError("not a device", where=f"device {name!r}", fix=fix)
    exact = [one for one in CARDS if plain(one.name) == wanted]
    found = exact or [
        one for one in CARDS if one.name.rpartition("-")[0] and plain(one.name.rpartition("-")[0]) == wanted
    ]
    if len(found) == 1:
        return number, found[0]
    otherwise = 'or say how much memory it has instead, such as memory = "24GiB"'
    if found:
        fix = f"say which: {', '.join(one.name for one in found)}; {otherwise}"
        raise RonnaError("several cards are called so", where=f"device {name!r}", fix=fix)
    names = {plain(one.name): one.name for one in CARDS}
    near = [names[key] for key in get_close_matches(wanted, names, n=4, cutoff=0.5)] or list(names.values())
    raise RonnaError("no such card is known", where=f"device {name!r}", fix=f"one of {', '.join(near)}; {otherwise}")


def parse_bytes(text: str) -> int:
    """ "24GiB", "6.5 GiB" and "24g" by 1024, "24GB" by 1000; a unit must be there. Raises RonnaError."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt])(ib|b|)\s*", text, re.IGNORECASE)
    size = float(found[1]) * (1000 if found[3].lower() == "b" else 1024) ** UNITS[found[2].lower()] if found else 0.0
    if not isfinite(size) or size < 1:
        fix = 'give a number above 0 and a unit, such as "24GiB" (1024 each) or "24GB" (1000 each)'
        raise RonnaError("not an amount of memory", where=f"memory {text!r}", fix=fix)
    return round(size)


def gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB"
