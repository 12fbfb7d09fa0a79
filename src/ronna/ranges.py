"""Which settings of a fine-tuning run a search tries, where, and what it tries next."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ronna.assemble import higher_is_better
from ronna.base.config import build
from ronna.base.device import seed_for
from ronna.base.errors import RonnaError
from ronna.peft.adalora import AdaLoraConfig
from ronna.report import Trial
from ronna.runfile import FinetuneRun, SearchConfig

Settings = dict[str, int | float]

PLACES = {"lr": ("optim", "lr"), "epochs": ("train", "epochs"), "batch": ("train", "batch"), "rank": ("peft", "rank")}
AT_RANDOM = 5  # trials before the sampler begins to learn from them
ATTEMPTS = 100  # at settings that no trial has had


def import_optuna() -> Any:
    try:
        return importlib.import_module("optuna")
    except ImportError:
        raise RonnaError("optuna is not installed", where="search", fix="pip install 'ronna[search]'") from None


@dataclass(frozen=True)
class Range:
    """One of `choices`, or from `low` to `high`, both included; by `log`, or whole numbers where both ends are."""

    low: float = 0.0
    high: float = 0.0
    choices: tuple[int, ...] = ()
    log: bool = False

    @property
    def whole(self) -> bool:
        return not self.choices and not self.log and self.low.is_integer() and self.high.is_integer()

    def holds(self, value: float) -> bool:
        if self.choices:
            return value in self.choices
        return self.low <= value <= self.high and (not self.whole or float(value).is_integer())

    def distribution(self, optuna: Any) -> Any:
        kinds = optuna.distributions
        if self.choices:
            return kinds.CategoricalDistribution(self.choices)
        if self.whole:
            return kinds.IntDistribution(int(self.low), int(self.high))
        return kinds.FloatDistribution(self.low, self.high, log=self.log)

    def rounded(self, value: float) -> int | float:
        """To three digits, as a person would write it, and still inside."""
        if self.choices or self.whole:
            return int(value)
        return min(self.high, max(self.low, float(f"{value:.3g}")))


def ranges_of(run: FinetuneRun, config: SearchConfig) -> dict[str, Range]:
    """What is searched, and where. Raises RonnaError for a setting that the run does not have."""
    usual, missing = usual_ranges(run), reasons(run)
    given = {"lr": config.lr, "epochs": config.epochs, "batch": config.batch, "rank": config.rank}
    for name in PLACES:
        asked = given[name] is not None or name in (config.over or ())
        if asked and name in missing:
            raise RonnaError(missing[name], where=f"search.{name}", fix="leave it out of the search")
        if asked and config.over is not None and name not in config.over:
            raise RonnaError("has a range but is not in search.over", where=f"search.{name}", fix="add it there")
    for name in ("lr", "epochs"):
        if (ends := given[name]) is not None and ends[0] > ends[1]:
            raise RonnaError(
                f"{ends[0]:g} is above {ends[1]:g}", where=f"search.{name}", fix="the lower end comes first"
            )
    if config.lr is not None:
        usual["lr"] = Range(*config.lr, log=True)
    if config.epochs is not None:
        usual["epochs"] = Range(*config.epochs)
    for name in ("batch", "rank"):
        if (choices := given[name]) is not None:
            usual[name] = Range(choices=tuple(sorted(set(map(int, choices)))))
    return {name: usual[name] for name in PLACES if name in (config.over or usual) and name not in missing}


def reasons(run: FinetuneRun) -> dict[str, str]:
    """Why a setting is none of this run's, by its name."""
    found = {}
    if run.train.steps is not None or run.train.tokens is not None:
        found["epochs"] = "train.steps or train.tokens says how long the run is"
    if run.train.batch_tokens is not None:
        found["batch"] = "train.batch_tokens says how large a step is"
    if not hasattr(run.peft, "rank"):
        found["rank"] = f"{run.peft.kind} has no rank" if run.peft else "without an adapter (--peft lora) there is none"
    return found


def usual_ranges(run: FinetuneRun) -> dict[str, Range]:
    """Around what the run file says, or has by default for its method."""
    lr, epochs, batch = run.optim.lr, run.train.epochs or 1.0, run.train.batch
    rank = getattr(run.peft, "rank", 1)
    return {
        "lr": Range(lr / 4, lr * 4, log=True),
        "epochs": Range(min(1.0, epochs), 2 * epochs),
        "batch": Range(choices=tuple(sorted({max(1, batch // 2), batch, batch * 2}))),
        "rank": Range(choices=tuple(sorted({max(1, rank // 2), rank, rank * 2, rank * 4}))),
    }


def suggest(optuna: Any, run: FinetuneRun, ranges: Mapping[str, Range], trials: Sequence[Trial]) -> Settings | None:
    """The settings of the next trial, None where every one has been tried. The first are the run's own if they lie in
    the ranges: what a search finds can then be no worse on the validation data."""
    tried = [trial.settings for trial in trials]
    own = {name: getattr(getattr(run, PLACES[name][0]), PLACES[name][1]) or 1.0 for name in ranges}
    if not tried and all(ranges[name].holds(value) for name, value in own.items()):
        return {name: int(value) if ranges[name].whole else value for name, value in own.items()}
    for attempt in range(ATTEMPTS):
        found = ask(optuna, ranges, trials, seed_for(run.seed, len(trials), attempt) % 2**32)
        if found not in tried:
            return found
    return None


def ask(optuna: Any, ranges: Mapping[str, Range], trials: Sequence[Trial], seed: int) -> Settings:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), which is given the trials anew each time."""
    space = {name: some.distribution(optuna) for name, some in ranges.items()}
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # or it tells of every study that is made
    try:
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=AT_RANDOM)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for trial in trials:
            # A stopped trial counts with the best it had. A failed one would teach nothing; a pruned one without a
            # value is to the sampler the worst there is.
            known = {"value": merit(trial)} if trial.value is not None else {"state": optuna.trial.TrialState.PRUNED}
            study.add_trial(optuna.create_trial(params=trial.settings, distributions=space, **known))
        chosen = study.ask(space).params
    finally:
        optuna.logging.set_verbosity(before)
    return {name: ranges[name].rounded(value) for name, value in chosen.items()}


def with_settings(run: FinetuneRun, settings: Settings, out: Path) -> FinetuneRun:
    """The run of one trial: those settings, its own folder, and no search."""
    tree = run.model_dump(mode="json", exclude_none=True, exclude={"search"}) | {"out": str(out)}
    for name, value in settings.items():
        table, key = PLACES[name]
        tree[table][key] = value
    if isinstance(run.peft, AdaLoraConfig) and "rank" in settings:  # it is cut down by the same share
        tree["peft"]["target_rank"] = max(1, round(settings["rank"] * run.peft.target_rank / run.peft.rank))
    return build(FinetuneRun, tree, where="search")


def merit(trial: Trial) -> float:
    """The higher the better, whatever is measured."""
    assert trial.value is not None
    return trial.value if higher_is_better(trial.monitor) else -trial.value
