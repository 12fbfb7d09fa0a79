"""Devices by name, amounts of memory by unit, and what a CPU's flags say."""

import pytest

from ronna.base.errors import RonnaError
from ronna.base.rates import Rates
from ronna.plan.hardware import CARDS, GB, GIB, REACHED, TERA, cpu, device, measured, parse_bytes


def test_names() -> None:
    assert len({card.name for card in CARDS}) == len(CARDS)
    for card in CARDS:
        assert device(card.name) == (1, card)
        assert device(f"3x{card.name.upper()}") == (3, card)
    assert device("8xh100-80gb")[0] == 8
    assert device(" 4 x A100-80GB ") == (4, device("a100-80gb")[1])
    assert device("NVIDIA GeForce RTX 4090") == device("rtx4090") == device("4090")
    assert device("h800")[1].name == "h800-80gb"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a100", "a100-40gb, a100-80gb"),  # two cards
        ("rtx4900", "rtx4090"),  # the nearest
        ("h300", "h200"),
        ("quantum", "memory ="),
        ("", '"h200"'),
        ("0xh200", '"8xh100-80gb"'),
    ],
)
def test_unknown_names(name: str, says: str) -> None:
    with pytest.raises(RonnaError) as found:
        device(name)
    assert says in str(found.value.fix)
    assert name in str(found.value.where)


def test_cards_are_plausible() -> None:
    for card in CARDS:
        assert card.kind == "cuda"
        assert 9 * GIB < card.room < card.memory < 180 * GIB
        assert card.rates["fp32"] > 6 * TERA
        assert card.link <= card.bandwidth
        assert 60 < card.watts <= 1000
        assert card.precision() == ("bf16" if card.rates["bf16"] else "fp32")
    h200 = device("h200")[1]
    assert h200.rates["bf16"] == 989 * TERA * REACHED
    assert device("t4")[1].rates["bf16"] == device("v100-16gb")[1].rates["bf16"] == 0
    assert device("4090")[1].host < h200.host


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("24g", 24 * 2**30),
        (" 6.5 gib ", 13 * 2**29),
        ("512m", 2**29),
        ("1TB", 10**12),
        (".5k", 512),
    ],
)
def test_amounts(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "24", "GiB", "-3GiB", "0GiB", "0.0001kB", "nanGiB", "1e3GiB", "24GiBs", "9" * 400 + "g"]
)
def test_no_amounts(text: str) -> None:
    with pytest.raises(RonnaError, match="not an amount"):
        parse_bytes(text)


def test_cpus() -> None:
    old, wide, narrow, tiles = (
        cpu(8, flags, 16 * GIB)
        for flags in (["sse2"], ["avx2", "avx512f"], ["avx2", "avx512f", "avx512_bf16"], ["avx512_bf16", "amx_bf16"])
    )
    assert old.rates["fp32"] < wide.rates["fp32"] < tiles.rates["fp32"]
    assert (old.precision(), wide.precision(), narrow.precision(), tiles.precision()) == (
        "fp32",
        "fp32",
        "bf16",
        "bf16",
    )
    assert narrow.rates["bf16"] < tiles.rates["bf16"]
    assert cpu(16, ["avx2"], 1).rates["fp32"] == 2 * cpu(8, ["avx2"], 1).rates["fp32"]
    assert cpu(64, ["avx2"], 1).bandwidth == cpu(128, ["avx2"], 1).bandwidth
    assert cpu(4, ["asimd", "bf16"], 1).precision() == "bf16"
    assert 0 < old.room < old.memory


def test_a_measured_machine() -> None:
    found = Rates("cpu", "some CPU", 2, "2.13", {"bytes": 1 / GB}, {"bf16": 4e11, "fp32": 2e11}, float(GB))
    one = measured(found, 8 * GIB)
    assert (one.name, one.memory, one.bandwidth, one.costs["bytes"]) == ("some CPU", 8 * GIB, GB, 1 / GB)
    assert one.rates == {"bf16": 4e11, "fp32": 2e11}
    assert measured(Rates("cuda", "a card", 2, "2.13", {}, found.products, 9e11), GIB).kind == "cuda"
