"""What is measured of a machine, and the file that remembers it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ronna.base import rates as module
from ronna.base.errors import RonnaError
from ronna.base.rates import Probe, Rates, cache_folder, drop, fitted, keep, rates, read, write

KINDS = {"linear", "linear operands", "linear calls", "batched", "batched operands", "batched calls", "flash",
         "flash backward", "words"}  # fmt: skip
BOTH_WAYS = {"gelu", "gelu_tanh", "silu", "relu", "tanh", "mask", "softmax", "layer", "rms", "dropout"}
SHARED = {"bytes", "calls", "adamw", "sgd", "adafactor"}


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threads of each measurement, none of which takes place."""
    made = list[int]()

    def measured(device: str, name: str, threads: int) -> Rates:
        made.append(threads)
        return Rates(device, name, threads, torch.__version__, {"bytes": 1e-10}, {"fp32": 1e11, "bf16": 1e9}, 1e10)

    monkeypatch.setattr(module, "measured_apart", measured)
    return made


def test_measured_once(tmp_path: Path, measurements: list[int]) -> None:
    first = rates("cpu", 1, tmp_path)
    began = time.perf_counter()
    assert rates("cpu", 1, tmp_path) == first
    assert time.perf_counter() - began < 0.2
    assert measurements == [1]
    rates("cpu", 2, tmp_path)
    assert measurements == [1, 2]
    assert len(list(tmp_path.iterdir())) == 2  # no draft is left
    assert rates("cpu", None, tmp_path).threads == torch.get_num_threads()


@pytest.mark.parametrize(
    "spoilt",
    ["", "{", "[]", "null", '{"kind": "cpu"}', {"version": 0}, {"torch": "1.0"}, {"name": "another"}, {"threads": 7},
     {"bandwidth": -1.0}, {"costs": {"bytes": "many"}}, {"costs": None}],
)  # fmt: skip
def test_what_cannot_be_used_is_measured_anew(tmp_path: Path, measurements: list[int], spoilt: str | dict) -> None:
    whole = rates("cpu", 1, tmp_path)
    (path,) = tmp_path.iterdir()
    text = spoilt if isinstance(spoilt, str) else json.dumps(json.loads(path.read_text()) | spoilt)
    path.write_text(text)
    assert rates("cpu", 1, tmp_path) == whole
    assert measurements == [1, 1]
    assert rates("cpu", 1, tmp_path) == whole
    assert measurements == [1, 1]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, measurements: list[int]) -> None:
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert rates("cpu", 1, tmp_path / "file" / "ronna").bandwidth == 1e10
    assert measurements == [1, 1]


def test_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measurements: list[int]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "ronna"
    found = rates("cpu", 1)
    (path,) = (tmp_path / "ronna").iterdir()
    assert read(path) == found
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "ronna"


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Rates("cpu", "x", 1, "2", {}, {}, 1.0)
    write(tmp_path / "a.json", found)

    def torn(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(Path, "replace", torn)
    write(tmp_path / "a.json", Rates("cpu", "y", 1, "2", {}, {}, 1.0))
    assert read(tmp_path / "a.json") == found


def test_every_kind_is_measured() -> None:
    code = (
        "from ronna.base import rates as r; r.SAMPLE, r.STREAM, r.ROWS = 1e-4, 2**16, 256;"
        "r.WEIGHTS, r.WORDS = 2**14, (256, 512);"
        "r.LINEAR = ((64, 64, 64), (256, 64, 128), (128, 256, 64)); r.main('cpu', 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = Rates(name="here", **json.loads(done.stdout))
    each = KINDS | BOTH_WAYS | {f"{kind} backward" for kind in BOTH_WAYS}
    assert set(found.costs) == SHARED | {f"{dtype} {kind}" for dtype in ("fp32", "bf16") for kind in each}
    assert all(cost >= 0 for cost in found.costs.values())
    assert all(0 < found.costs[f"{dtype} {kind}"] < 1e-6 for dtype in ("fp32", "bf16") for kind in BOTH_WAYS)
    assert set(found.products) == {"fp32", "bf16"}
    assert min(found.products.values()) > 1e8
    assert found.bandwidth > 1e8
    assert 1e-8 < found.costs["calls"] < 1e-3


def test_no_result(tmp_path: Path) -> None:
    with pytest.raises(RonnaError, match="no such device"):
        module.measured_apart("cuda:99", "none", 1)


def test_seconds_are_those_of_a_call() -> None:
    probe = Probe(torch.device("cpu"), None)
    assert probe.seconds(lambda: time.sleep(0.01)) == pytest.approx(0.01, rel=0.3)


def test_costs_that_fit() -> None:
    sizes = [(1e6, 1e4), (1e8, 1e5), (1e8, 3e6), (1e9, 1e6), (5e9, 1e7)]
    for costs in ((1e-11, 1e-10, 1e-5), (2e-12, 0.0, 3e-5), (2e-12, 1e-10, 0.0), (1e-11, 0.0, 0.0)):
        samples = [(f, b, costs[0] * f + costs[1] * b + costs[2]) for f, b in sizes]
        assert fitted(samples) == pytest.approx(costs, rel=1e-6, abs=1e-15)
    noisy = [(f, b, 1e-11 * f / (1 + b * 1e-9)) for f, b in sizes]  # more bytes, less time: no cost below 0
    assert min(fitted(noisy)) >= 0


def test_dropout_masks() -> None:
    x = torch.randn(64, 64)
    y, mask = drop(x)
    assert torch.equal(y, torch.where(mask.bool(), 2 * x, 0.0))
    assert 0.4 < mask.bool().float().mean() < 0.6
    assert torch.equal(keep(x.bfloat16(), mask) == 0, ~mask.bool())
