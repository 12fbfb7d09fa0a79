"""Ranks on a Ray cluster of this machine: they train, and are started again where one of its workers is killed."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ronna import launch_ray
from ronna.base.config import dump_toml
from ronna.base.errors import RonnaError
from ronna.cli import main
from ronna.launch_ray import Attempts, free_port, launch_on_ray, refuse_few
from ronna.run import execute
from ronna.runfile import PretrainRun


def test_more_ranks_than_a_cluster_has_room_for_are_refused():
    with pytest.raises(RonnaError, match=r"--nproc: 3 ranks need as many CPUs, and the cluster has 2"):
        refuse_few(3, {"CPU": 2.0}, "CPU")
    refuse_few(2, {"CPU": 2.0}, "CPU")
    with pytest.raises(RonnaError, match="need as many GPUs, and the cluster has 0"):
        refuse_few(1, {"CPU": 2.0}, "GPU")


def test_numbers_that_make_no_sense():
    with pytest.raises(RonnaError, match="--nproc"):
        launch_on_ray(0, [], 3, "out", False)


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RonnaError, match="Ray is not installed"):
        launch_on_ray(2, [], 3, "out", False)


def test_the_number_of_ranks_has_to_be_said(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    asked = [
        "pretrain",
        "--model",
        "bert-tiny",
        "--objective",
        "mlm",
        "--data",
        "x",
        "--out",
        "y",
        "--steps",
        "2",
        "--launcher",
        "ray",
    ]
    assert main(asked) == 2 and "--launcher ray: how many ranks is not said" in capsys.readouterr().err


def test_what_an_attempt_leaves():
    attempts = Attempts()
    assert attempts.begin() == 1
    attempts.end(0, 1, "")
    assert attempts.begin() == 2
    attempts.end(0, 0, "report\n")
    attempts.end(1, 0, "")
    assert attempts.outcome() == ([0, 0], "report\n")
    assert 0 < free_port() < 2**16


def rank_in(out: Path, rank: int) -> int:
    """The process of a rank of the run in this folder."""
    for entry in Path("/proc").iterdir():
        try:
            here = entry.name.isdigit() and str(out).encode() in (entry / "cmdline").read_bytes()
            if here and f"\0RANK={rank}\0".encode() in b"\0" + (entry / "environ").read_bytes():
                return int(entry.name)
        except OSError:  # gone, or another user's
            continue
    raise AssertionError("no such rank")


def worker_of(process: int) -> int:
    """Its parent, one of Ray's workers."""
    status = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("PPid:")))


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_killed_worker_is_survived(shards, tmp_path, monkeypatch, capfd):
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    out = tmp_path / "out"
    train = {"steps": 8, "batch": 4, "length": 32, "log_every": 1, "save_every": 1, "precision": "fp32"}
    run = {"seed": 3, "device": "cpu", "model": {"name": "bert-tiny", "dropout": 0.0}, "objective": {"kind": "mlm"}}
    run |= {"data": {"train": str(shards["wordpiece"])}, "train": train}
    command = ["pretrain", str(tmp_path / "run.toml"), "--out", str(out), "--json"]
    (tmp_path / "run.toml").write_text(dump_toml(PretrainRun.model_validate(run | {"out": str(out)})))
    killed = []

    def kill() -> None:
        for _ in range(1200):
            if (out / "checkpoints" / "step-00000002").exists():
                killed.append(worker_of(rank_in(out, 1)))
                os.kill(killed[0], signal.SIGKILL)
                return
            time.sleep(0.05)

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setattr(launch_ray, "join", lambda ray: None)
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, logging_level="error")
    thread = threading.Thread(target=kill)
    try:
        thread.start()
        assert launch_on_ray(2, command, 3, str(out), cards=False) == 0
    finally:
        thread.join()
        ray.shutdown()
    assert killed
    report = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert report["train"]["steps"] == 8 and report["train"]["devices"] == 2
    execute(PretrainRun.model_validate(run | {"out": str(tmp_path / "alone")}))
    whole, found = (load_file(f / "model" / "model.safetensors") for f in (tmp_path / "alone", out))
    assert all((found[n] - t).abs().max() < 1e-4 for n, t in whole.items())
