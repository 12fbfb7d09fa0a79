"""A search tries settings on the validation data alone, survives any kill, and hands over the model that won."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ronna
from ronna import search as module
from ronna.base.config import build, dump_toml, read_toml
from ronna.base.errors import RonnaError
from ronna.cli import main
from ronna.report import Trial
from ronna.run import Training, execute
from ronna.runfile import FinetuneRun
from ronna.search import (
    finetune,
    hopeless,
)
from ronna.train.loop import Interrupted, Progress

optuna = pytest.importorskip("optuna")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    """Splits whose label is told by one word."""
    folder, rng = tmp_path_factory.mktemp("reviews"), random.Random(0)
    for split, n in (("train", 96), ("validation", 40), ("test", 20)):
        rows = []
        for i in range(n):
            words = rng.choices("the film was a plot with acting and music".split(), k=rng.randint(4, 9))
            words.insert(rng.randrange(len(words)), "great" if i % 2 else "awful")
            rows.append({"text": f"{' '.join(words)} {split} {i}", "label": "pos" if i % 2 else "neg"})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture
def run_of(tiny_bert, reviews):
    """Makes the run of a search into a folder; keyword arguments are further tables."""

    def make(out: Path, **more: Any) -> FinetuneRun:
        tree = {
            "out": str(out),
            "device": "cpu",
            "model": {"name": str(tiny_bert), "dropout": 0.0},
            "data": {"train": str(reviews)},
            "optim": {"lr": 3e-3},
            "train": {"epochs": 3, "batch": 8, "length": 32, "precision": "fp32", "evaluate_every": 8},
            "search": {"trials": 3},
        }
        for name, table in more.items():
            tree[name] = {**tree.get(name, {}), **table} if isinstance(table, dict) else table
        return build(FinetuneRun, tree, where="test")

    return make


def lines(out: Path) -> list[dict[str, Any]]:
    """What is to be the same in two searches."""
    found = [json.loads(line) for line in (out / "search.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "run")} for line in found]


def digest(out: Path) -> str:
    return hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(tiny_bert, reviews, tmp_path_factory):
    """A search that nothing disturbed, and its report."""
    out = tmp_path_factory.mktemp("whole") / "out"
    make = run_of.__wrapped__(tiny_bert, reviews)  # type: ignore[attr-defined]
    return out, finetune(make(out))


def test_the_best_trial_is_the_run(whole, tmp_path):
    out, report = whole
    trials = lines(out)
    assert [t["number"] for t in trials] == [1, 2, 3] and all(t["state"] == "complete" for t in trials)
    assert trials[0]["settings"] == {"lr": 3e-3, "epochs": 3, "batch": 8}  # as the run file stands
    values = [t["value"] for t in trials]
    assert len({json.dumps(t["settings"]) for t in trials}) == 3 and len(set(values)) > 1
    best = values.index(max(values))
    assert report["search"]["best"] == best + 1 and len(report["search"]["trials"]) == 3
    assert report["validation"]["accuracy"]["value"] == pytest.approx(max(values), abs=1e-6)
    assert report["test"]["accuracy"]["value"] is not None
    run = build(FinetuneRun, read_toml(out / "run.toml"), where="run.toml")
    assert run.search is None and run.out == str(out)
    found = {"lr": run.optim.lr, "epochs": run.train.epochs, "batch": run.train.batch}
    assert found == trials[best]["settings"]
    # The model that is kept is the one that a plain run of these settings gives.
    again = execute(run.model_copy(update={"out": str(tmp_path / "again")}))
    assert digest(tmp_path / "again") == digest(out) and again["test"] == report["test"]


def test_the_folder_holds_what_a_run_has_and_no_loser_keeps_its_weights(whole):
    out, _ = whole
    assert {p.name for p in out.iterdir()} >= {"model", "checkpoints", "metrics.jsonl", "report.html", "search.toml"}
    assert not list((out / "trials").rglob("*.safetensors"))
    assert len(list((out / "trials").glob("*/metrics.jsonl"))) == 2
    page = (out / "report.html").read_text()
    assert "<h2>Search</h2>" in page and "3 trials, compared by accuracy" in page and 'alt="Score by setting"' in page
    assert build(FinetuneRun, read_toml(out / "search.toml"), where="search.toml").search is not None


def test_the_test_split_plays_no_part(run_of, reviews, whole, tmp_path, monkeypatch, capsys):
    """With other labels on the test data the same trials are run, with the same ends; only its scores differ."""
    rows = [json.loads(line) for line in (reviews / "test.jsonl").read_text().splitlines()]
    flipped = [{**row, "label": {"pos": "neg", "neg": "pos"}[row["label"]]} for row in rows]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flipped))
    given, prepare = [], module.prepare_run
    monkeypatch.setattr(
        module, "prepare_run", lambda *a, **k: given.append(k["data"].examples.keys()) or prepare(*a, **k)
    )
    report = finetune(run_of(tmp_path / "out", data={"test": str(tmp_path / "test.jsonl")}))
    assert given == [*[{"train", "validation"}] * 3, {"train", "validation", "test"}]
    assert lines(tmp_path / "out") == lines(whole[0])
    assert capsys.readouterr().err.count("resuming from step-") == 1  # the best one's end: nothing is trained twice
    assert report["test"]["accuracy"]["value"] == pytest.approx(1 - whole[1]["test"]["accuracy"]["value"])


class Killed(BaseException):
    pass


def test_a_kill_before_or_after_any_change_of_the_folder_loses_nothing(run_of, whole, tmp_path, monkeypatch):
    """Killed before its first change and after it, before its second and after it, and so on to the end."""
    out, replace, kills = tmp_path / "out", os.replace, 0

    def killing(source: Any, target: Any) -> None:
        moved = Path(target).parent == out and out / "trials" in Path(source).parents
        change = moved or Path(target).name == "search.jsonl"
        if change and kills % 2 == 0:
            raise Killed
        replace(source, target)
        if change:
            raise Killed

    monkeypatch.setattr(os, "replace", killing)
    for _ in range(40):
        try:
            report = finetune(run_of(out), resume=True)
            break
        except Killed:
            kills += 1
    assert kills == 2 * (2 * 3 + 4)  # each trial begins and ends; checkpoints, metrics, model and run.toml are moved
    assert lines(out) == lines(whole[0]) and digest(out) == digest(whole[0])
    assert report["test"] == whole[1]["test"]


def test_sigkill_in_the_middle_of_a_trial(run_of, whole, tmp_path):
    out, file = tmp_path / "out", tmp_path / "run.toml"
    file.write_text(dump_toml(run_of(out)))
    command = [sys.executable, "-m", "ronna", "finetune", str(file), "--resume"]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while child.poll() is None and not list((out / "trials" / "trial-2").glob("checkpoints/step-????????")):
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert [line["state"] for line in lines(out)] == ["complete", "running"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0 and "trial 1 of" not in done.stderr, done.stderr
    assert "resuming from step-" in done.stderr.partition("trial 3 of")[0]
    assert lines(out) == lines(whole[0]) and digest(out) == digest(whole[0])


def test_asked_to_stop_it_stops_and_goes_on(run_of, whole, tmp_path, monkeypatch):
    prepare = module.prepare_run

    def prepared(run: FinetuneRun, **more: Any) -> Training:
        training = prepare(run, **more)
        if Path(run.out).name == "trial-2":
            feed = training.feed

            class Cut:
                samples = feed.samples

                def __call__(self, step: int) -> Any:
                    if step == 1:
                        os.kill(os.getpid(), signal.SIGTERM)
                    return feed(step)

            training.feed = Cut()  # type: ignore[assignment]
        return training

    monkeypatch.setattr(module, "prepare_run", prepared)
    with pytest.raises(Interrupted):
        finetune(run_of(tmp_path / "out"))
    monkeypatch.undo()
    finetune(run_of(tmp_path / "out"), resume=True)
    assert lines(tmp_path / "out") == lines(whole[0]) and digest(tmp_path / "out") == digest(whole[0])


def test_a_later_call_may_ask_for_more_trials(run_of, whole, tmp_path):
    out = tmp_path / "out"
    assert finetune(run_of(out, search={"trials": 1}))["search"]["best"] == 1
    assert lines(out) == lines(whole[0])[:1]
    finetune(run_of(out), resume=True)
    assert lines(out) == lines(whole[0]) and digest(out) == digest(whole[0])
    assert finetune(run_of(out, search={"trials": 2}), resume=True)["test"] == whole[1]["test"]  # nothing is undone


def test_a_used_folder_other_settings_and_other_data_are_refused(run_of, reviews, whole, tmp_path):
    out, _ = whole
    with pytest.raises(RonnaError, match="holds a run already"):
        finetune(run_of(out))
    for other in ({"seed": 1}, {"search": {"over": ["lr"]}}, {"data": {"limit": 50}}):
        with pytest.raises(RonnaError, match="other settings or data"):
            finetune(run_of(out, **other), resume=True)
    changed = tmp_path / "train.jsonl"
    changed.write_text((reviews / "train.jsonl").read_text())
    run = run_of(tmp_path / "a", data={"train": str(changed)}, search={"trials": 1})
    finetune(run)
    changed.write_text(changed.read_text().replace("music", "plot"))
    with pytest.raises(RonnaError, match="other settings or data"):
        finetune(run, resume=True)
    plain = run_of(tmp_path / "b", search=None)
    execute(plain)
    with pytest.raises(RonnaError, match="a run without a search"):
        finetune(run_of(tmp_path / "b"), resume=True)


@pytest.mark.parametrize("lacking", [torch.OutOfMemoryError(), RuntimeError("[enforce] can't allocate memory"), None])
def test_a_failed_trial_is_passed_over(lacking, run_of, tmp_path, monkeypatch):
    """The first diverges, the second finds no memory, or is planned to find none; the third is what there is."""
    prepare = module.prepare_run

    def prepared(run: FinetuneRun, **more: Any) -> Training:
        if Path(run.out).name == "trial-1":
            run = run.model_copy(update={"optim": run.optim.model_copy(update={"lr": 1e30})})
        if Path(run.out).name == "trial-2":
            if lacking is not None:
                raise lacking
            run = run.model_copy(update={"train": run.train.model_copy(update={"memory": "1MiB"})})
        return prepare(run, **more)

    monkeypatch.setattr(module, "prepare_run", prepared)
    report = finetune(run_of(tmp_path / "out", train={"steps": 6, "max_skipped": 1}))
    one, two, three = lines(tmp_path / "out")
    assert (one["state"], two["state"], three["state"]) == ("failed", "failed", "complete")
    assert "no finite gradient" in one["error"] and report["search"]["best"] == 3
    assert ("memory" if lacking else "nothing fits") in two["error"]
    assert not list((tmp_path / "out" / "trials").rglob("*.safetensors"))


def test_what_is_our_fault_ends_the_search(run_of, tmp_path, monkeypatch):
    def broken(run: FinetuneRun, **more: Any) -> Training:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(module, "prepare_run", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        finetune(run_of(tmp_path / "out"))


def test_where_all_trials_fail_the_error_says_so(run_of, tmp_path):
    wide = {"search": {"trials": 2, "over": ["lr"], "lr": [1e20, 1e30]}, "train": {"max_skipped": 1}}
    with pytest.raises(RonnaError, match="all 2 trials failed") as caught:
        finetune(run_of(tmp_path / "out", **wide))
    assert "no finite gradient" in str(caught.value) and not (tmp_path / "out" / "model").exists()


def test_an_undefined_score_is_a_failure_too():
    trial = Trial(number=1, run="", state="running", settings={"lr": 1.0})
    for best in (None, float("-inf")):
        progress = Progress(step=5, monitor="pearson", best=best, history=[{"step": 5, "pearson": best}])
        ended = module.ending(trial, progress, 5, stopped=False)
        assert ended.state == "failed" and ended.error == "pearson is undefined on the validation data"


def test_a_trial_behind_most_others_is_stopped(run_of, tmp_path, monkeypatch):
    """One whole trial is enough to compare with here; the rates drawn are far too small to learn anything."""
    monkeypatch.setattr(module, "COMPARED", 1)
    settings = {"train": {"evaluate_every": 4}, "search": {"trials": 2, "over": ["lr"], "lr": [1e-12, 3e-3]}}
    finetune(run_of(tmp_path / "out", **settings))
    first, second = lines(tmp_path / "out")
    assert (first["state"], second["state"]) == ("complete", "stopped")
    assert second["evaluations"][-1][0] < 1 and second["value"] < first["value"]
    settings["search"]["prune"] = False  # type: ignore[index]
    finetune(run_of(tmp_path / "whole", **settings))
    assert lines(tmp_path / "whole")[1]["state"] == "complete"


@pytest.mark.parametrize("monitor", ["accuracy", "loss"])
def test_the_rule_that_stops_a_trial_is_that_of_optuna(monitor):
    rng, direction = np.random.default_rng(0), "maximize" if monitor == "accuracy" else "minimize"
    sign = 1 if monitor == "accuracy" else -1
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=3)
    found = []
    for _ in range(60):
        runs = rng.integers(2, 8)
        curves = (rng.random((runs, 1)) + 0.2 * rng.random((runs, 10))).round(2).tolist()
        study = optuna.create_study(direction=direction, pruner=pruner)
        trials = []
        for number, curve in enumerate(curves[:-1], 1):
            ended = study.ask()
            for step, score in enumerate(curve, 1):
                ended.report(score, step)
            study.tell(ended, curve[-1])
            evaluations = [(step / 10, score) for step, score in enumerate(curve, 1)]
            values = {"settings": {}, "monitor": monitor, "value": curve[-1], "evaluations": evaluations}
            trials.append(Trial.model_validate({"number": number, "run": "", "state": "complete", **values}))
        asked = study.ask()
        for step, score in enumerate(curves[-1][:9], 1):
            asked.report(score, step)
            best = max(sign * score for score in curves[-1][:step])
            progress = Progress(step=step * 7, monitor=monitor, best=best)
            found.append(hopeless(progress, 70, trials))
            assert found[-1] == asked.should_prune(), (step, curves)
    assert 20 < sum(found) < len(found) - 20


# What is searched


def test_the_search_ends_where_the_ranges_do(run_of, tmp_path, capsys):
    few = {"trials": 5, "over": ["batch"], "batch": [16, 32]}
    assert len(finetune(run_of(tmp_path / "out", search=few))["search"]["trials"]) == 2
    assert "no more than these 2 settings" in capsys.readouterr().err


def test_the_rank_of_an_adapter(run_of, tmp_path):
    few = {"trials": 2, "over": ["rank"], "rank": [4, 6]}
    run = run_of(tmp_path / "out", peft={"kind": "lora"}, train={"steps": 4}, search=few)
    best = finetune(run)["search"]["best"]
    rank = lines(tmp_path / "out")[best - 1]["settings"]["rank"]
    assert json.loads((tmp_path / "out" / "model" / "adapter_config.json").read_text())["r"] == rank
    assert sorted(line["settings"]["rank"] for line in lines(tmp_path / "out")) == [4, 6]


# From outside


def test_command_line_and_python(run_of, tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text(dump_toml(run_of(tmp_path / "out", search=None, train={"steps": 2})))
    assert main(["finetune", str(file), "--search", "2", "--json"]) == 0
    said = capsys.readouterr()
    assert len(json.loads(said.out)["search"]["trials"]) == 2
    table = [line.split() for line in said.err.splitlines() if line.split()[-1:] in (["best"], ["complete"])]
    assert sorted(row[0] for row in table) == ["1", "2"] and "accuracy" in said.err
    assert main(["finetune", str(file), "--search", "0"]) == 2
    assert "search.trials" in capsys.readouterr().err
    tables = run_of(tmp_path / "python", train={"steps": 2}, search={"trials": 1}).model_dump(exclude_none=True)
    assert len(ronna.finetune(**tables)["search"]["trials"]) == 1


def test_doctor_looks_at_the_ranges(run_of, tmp_path, capsys):
    (tmp_path / "run.toml").write_text(dump_toml(run_of(tmp_path / "out", search={"rank": [4]})))
    assert main(["doctor", str(tmp_path / "run.toml")]) == 2
    assert "search.rank" in capsys.readouterr().err


def test_without_optuna_it_says_what_to_install(run_of, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RonnaError, match=r"pip install 'ronna\[search\]'"):
        finetune(run_of(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    execute(run_of(tmp_path / "plain", search=None, train={"steps": 1}))
