"""metrics.jsonl survives what runs die of; the other trackers get the same numbers."""

import io
import json
import math
import os
import re
import resource
import signal

import pytest

from ronna.base import track
from ronna.base.errors import RonnaError
from ronna.base.track import METRICS_FILE, Tracker, WandbConfig, read_metrics, say


def losses(folder):
    return [(record["step"], record["loss"]) for record in read_metrics(folder / METRICS_FILE)]


def test_every_line_is_strict_json(tmp_path):
    with Tracker(tmp_path / "a" / "run", quiet=True) as tracker:
        tracker.log(1, {"loss": 0.1 + 0.2, "tokens": 12}, kind="validation")
        tracker.log(2, {"loss": math.nan, "high": math.inf, "low": -math.inf})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    path = tmp_path / "a" / "run" / METRICS_FILE
    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert lines[0].items() >= {"step": 1, "kind": "validation", "loss": 0.1 + 0.2, "tokens": 12}.items()
    first, second = read_metrics(path)
    assert first == lines[0]
    assert math.isnan(second["loss"]) and second["high"] == math.inf and second["low"] == -math.inf


def test_lines_are_there_before_the_run_ends(tmp_path):
    with Tracker(tmp_path, quiet=True) as tracker:
        tracker.log(1, {"loss": 1.0})
        assert losses(tmp_path) == [(1, 1.0)]


def test_names_of_the_record_are_refused(tmp_path):
    with Tracker(tmp_path, quiet=True) as tracker, pytest.raises(ValueError, match="step"):
        tracker.log(1, {"step": 1.0})


def test_a_torn_last_line_is_dropped(tmp_path):
    with Tracker(tmp_path, quiet=True) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"loss": step / 2})
    path = tmp_path / METRICS_FILE
    path.write_bytes(path.read_bytes()[:-9])
    assert losses(tmp_path) == [(1, 0.5), (2, 1.0)]
    with Tracker(tmp_path, quiet=True) as tracker:
        tracker.log(3, {"loss": 9.0})
    assert losses(tmp_path) == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert path.read_bytes().count(b"\n") == 3


def test_resume_forgets_what_will_be_done_again(tmp_path):
    with Tracker(tmp_path, quiet=True) as tracker:
        for step in range(1, 6):
            tracker.log(step, {"loss": float(step)})
            tracker.log(step, {"loss": math.nan}, kind="validation")
    with Tracker(tmp_path, quiet=True) as tracker:
        tracker.resume(4)
        tracker.log(4, {"loss": 40.0})
    records = read_metrics(tmp_path / METRICS_FILE)
    assert [r["step"] for r in records] == [1, 1, 2, 2, 3, 3, 4]
    assert records[-1]["loss"] == 40.0 and math.isnan(records[-2]["loss"])
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_a_full_disk_does_not_end_the_run(tmp_path, capsys):
    with Tracker(tmp_path, quiet=True) as tracker:
        tracker.log(1, {"loss": 1.0})
        size = (tmp_path / METRICS_FILE).stat().st_size
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
            tracker.log(2, {"loss": 2.0})
            tracker.log(3, {"loss": 3.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, ignored)
        tracker.log(4, {"loss": 4.0})
    assert losses(tmp_path) == [(1, 1.0), (4, 4.0)]
    assert capsys.readouterr().err.count("training goes on") == 1


def test_progress_without_a_terminal(tmp_path, capsys):
    with Tracker(tmp_path, total_steps=10) as tracker:
        tracker.log(5, {"loss": 1.25, "tokens_per_second": 12345.6, "memory_bytes": 3 * 2**30})
        tracker.log(5, {"loss": 2.5, "accuracy": 1 / 3}, kind="validation")
        say("prose")
    out, err = capsys.readouterr()
    first, second, third = err.splitlines()
    assert out == ""
    assert re.fullmatch(r"step 5/10  loss 1\.2500  12,346 tokens/s  ETA 0:00:0\d  3\.00 GiB", first)
    assert second == "step 5  validation: loss 2.5  accuracy 0.33333"
    assert third == "prose"


def test_progress_on_a_terminal(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "120")
    with Tracker(tmp_path, total_steps=10) as tracker:
        tracker.log(5, {"loss": 1.25})
        say("prose")
    assert "step 5/10  loss 1.2500" in terminal.getvalue()
    assert "━" in terminal.getvalue() and "prose" in terminal.getvalue()


def test_eta_counts_from_the_resumed_step(tmp_path, monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(track.time, "monotonic", lambda: now)
    with Tracker(tmp_path, total_steps=1000) as tracker:
        tracker.resume(901)
        now += 30.0
        tracker.log(910, {})
    assert "ETA 0:04:30" in capsys.readouterr().err


def test_quiet_is_quiet(tmp_path, capsys):
    with Tracker(tmp_path, quiet=True) as tracker:
        tracker.log(1, {"loss": 1.0})
    assert capsys.readouterr() == ("", "")


def test_tensorboard_holds_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker(tmp_path, tensorboard=True, quiet=True) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"loss": float(step)})
    with Tracker(tmp_path, tensorboard=True, quiet=True) as tracker:
        tracker.resume(2)
        tracker.log(2, {"loss": 20.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 20.0)]


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    config = WandbConfig(project="ronna-test", name="offline", mode="offline")
    with Tracker(tmp_path, wandb=config, quiet=True) as tracker:
        tracker.log(1, {"loss": 1.0})
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("package", "asked"),
    [
        ("tensorboard", {"tensorboard": True}),
        ("wandb", {"wandb": WandbConfig()}),
        ("trackio", {"trackio": True}),
    ],
)
def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch, package, asked):
    monkeypatch.setitem(track.sys.modules, package, None)
    with pytest.raises(RonnaError) as caught, Tracker(tmp_path, **asked):
        pass
    assert str(caught.value).startswith(f"tracking: {package} is not installed")
    assert "ronna[track]" in str(caught.value)
    assert os.listdir(tmp_path) == [METRICS_FILE]
