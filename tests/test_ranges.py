"""Where a search looks, and that what it tries follows from the seed."""

import json
from typing import Any

import numpy as np
import pytest

from ronna.base.config import build
from ronna.base.errors import RonnaError
from ronna.ranges import Range, ask, merit, ranges_of, suggest, with_settings
from ronna.report import Trial
from ronna.runfile import FinetuneRun

optuna = pytest.importorskip("optuna")


def run_of(search: dict[str, Any] | None = None, **tables: Any) -> FinetuneRun:
    tree = {"out": "out", "model": {"name": "folder"}, "data": {"train": "file"}, **tables}
    return build(FinetuneRun, {**tree, "search": {"trials": 3, **(search or {})}}, where="test")


def ranges(**tables: Any) -> dict[str, Range]:
    run = run_of(**tables)
    assert run.search is not None
    return ranges_of(run, run.search)


def test_ranges_lie_around_what_the_run_says():
    usual = ranges(optim={"lr": 4e-5}, train={"epochs": 3, "batch": 32})
    assert usual == {"lr": Range(1e-5, 16e-5, log=True), "epochs": Range(1, 6), "batch": Range(choices=(16, 32, 64))}
    assert ranges(peft={"kind": "lora"})["rank"] == Range(choices=(4, 8, 16, 32))
    assert ranges(train={"epochs": 0.5})["epochs"] == Range(0.5, 1)
    assert set(ranges(train={"steps": 5})) == {"lr", "batch"}
    assert set(ranges(train={"epochs": None, "tokens": 500, "batch_tokens": 60})) == {"lr"}
    assert set(ranges(peft={"kind": "bitfit"})) == {"lr", "epochs", "batch"}
    given = {"over": ["rank", "lr"], "lr": [1e-5, 1e-3], "rank": [8, 2]}
    both = ranges(peft={"kind": "adalora"}, search=given)
    assert both == {"lr": Range(1e-5, 1e-3, log=True), "rank": Range(choices=(2, 8))}
    assert ranges(search={"epochs": [2, 10], "batch": [8]})["epochs"].whole
    assert not ranges(search={"epochs": [0.5, 2]})["epochs"].whole


WRONG = {
    "no trial": ({"trials": 0}, {}, ["search.trials", "0"]),
    "unknown setting": ({"over": ["dropout"]}, {}, ["search.over", "dropout", "batch"]),
    "unknown range": ({"dropout": [0, 1]}, {}, ["search.dropout", "unknown key"]),
    "one end": ({"lr": [1e-4]}, {}, ["search.lr"]),
    "negative": ({"lr": [-1e-4, 1e-4]}, {}, ["search.lr"]),
    "ends the wrong way round": ({"lr": [1e-3, 1e-5]}, {}, ["search.lr", "0.001 is above 1e-05"]),
    "no choice": ({"batch": []}, {}, ["search.batch"]),
    "half a batch": ({"batch": [1.5]}, {}, ["search.batch"]),
    "a rank without an adapter": ({"rank": [4, 8]}, {}, ["search.rank", "--peft lora"]),
    "a rank asked for without an adapter": ({"over": ["rank"]}, {}, ["search.rank", "adapter"]),
    "a rank of biases": ({"rank": [4]}, {"peft": {"kind": "bitfit"}}, ["search.rank", "bitfit has no rank"]),
    "epochs of a run of so many steps": ({"epochs": [1, 2]}, {"train": {"steps": 3}}, ["search.epochs", "steps"]),
    "batch of so many tokens": ({"batch": [4]}, {"train": {"batch_tokens": 99}}, ["search.batch", "batch_tokens"]),
    "a range that is left out": ({"over": ["lr"], "batch": [4]}, {}, ["search.batch", "search.over"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_search_that_cannot_be_is_refused(case):
    search, tables, words = WRONG[case]
    with pytest.raises(RonnaError) as caught:
        ranges(search=search, **tables)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_settings_follow_from_the_seed_and_none_comes_twice():
    def series(seed: int, n: int = 12) -> list[dict[str, Any]]:
        run, own, trials = run_of(seed=seed), ranges(), []
        for number in range(1, n + 1):
            found = suggest(optuna, run, own, trials)
            assert found is not None and all(own[name].holds(value) for name, value in found.items())
            value = -abs(np.log(found["lr"] / 3e-3))
            ended = {"state": "complete", "monitor": "accuracy", "value": value} if number % 4 else {"state": "failed"}
            trials.append(Trial.model_validate({"number": number, "run": "", "settings": found, **ended}))
        return [trial.settings for trial in trials]

    first = series(0)
    assert first == series(0) and first[0] == series(1)[0] and first[1:] != series(1)[1:]
    assert len({json.dumps(s) for s in first}) == 12
    assert all(isinstance(s["epochs"], int) and isinstance(s["batch"], int) for s in first)


@pytest.mark.parametrize("monitor", ["accuracy", "loss"])
def test_the_sampler_goes_where_the_score_is_better(monitor):
    wide, rng = {"lr": Range(1e-6, 1e-2, log=True)}, np.random.default_rng(0)
    sign = -1 if monitor == "accuracy" else 1
    trials = []
    for number in range(1, 31):
        lr = 10 ** rng.uniform(-6, -2)
        values = {"monitor": monitor, "value": sign * abs(np.log10(lr / 1e-5)), "settings": {"lr": lr}}
        trials.append(Trial.model_validate({"number": number, "run": "", "state": "complete", **values}))
    assert max(trials, key=merit).value == sign * min(abs(t.value or 0) for t in trials)
    found = [np.log10(ask(optuna, wide, trials, seed)["lr"]) for seed in range(30)]
    assert abs(np.median(found) + 5) < 0.5  # at random: -4


def test_the_sampler_keeps_away_from_where_trials_failed():
    wide, trials = {"lr": Range(1e-6, 1e-2, log=True)}, []
    for number, lr in enumerate(np.logspace(-6, -2, 24).tolist(), 1):
        good = {"state": "complete", "monitor": "accuracy", "value": 0.5 + 0.01 * (number % 3)}
        ended = good if lr < 1e-4 else {"state": "failed"}
        trials.append(Trial.model_validate({"number": number, "run": "", "settings": {"lr": lr}, **ended}))
    found = [ask(optuna, wide, trials, seed)["lr"] for seed in range(40)]
    assert sum(lr > 1e-4 for lr in found) <= 4  # at random: 20


def test_settings_go_where_they_belong_and_adalora_is_cut_by_the_same_share(tmp_path):
    run = with_settings(run_of(), {"lr": 2e-4, "epochs": 2, "batch": 8}, tmp_path)
    assert (run.optim.lr, run.train.epochs, run.train.batch) == (2e-4, 2, 8)
    assert run.out == str(tmp_path) and run.search is None and run.optim.kind == "adamw"
    method = with_settings(run_of(peft={"kind": "adalora"}), {"rank": 24}, tmp_path).peft
    assert (method.rank, method.target_rank) == (24, 16)  # type: ignore[union-attr]
