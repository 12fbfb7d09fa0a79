"""The one training loop: pre-training, fine-tuning and distillation differ only in their objective."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

from ronna.base.config import Config, one_or_more
from ronna.base.device import resident_bytes, seed_for
from ronna.base.errors import RonnaError
from ronna.model.recompute import Recompute
from ronna.model.transformer import Transformer
from ronna.objectives.base import Batch, Loss, Objective, Totals, WholeBatch, of_whole_batch
from ronna.parallel.pipeline import Handed, turning, turns_of
from ronna.parallel.sharded import rest
from ronna.parallel.world import ALONE, World
from ronna.plan.hardware import parse_bytes
from ronna.train.rows import EmbeddingRows
from ronna.train.schedule import Schedule, lr_scale, set_lr
from ronna.train.update import Backward, Update, WholeUpdate


def amount(text: str) -> str:
    """Raises RonnaError where it is none, before any data are read."""
    parse_bytes(text)
    return text


Amount = Annotated[str, AfterValidator(amount)]
Offload = Annotated[tuple[Literal["optimizer", "activations"], ...], BeforeValidator(one_or_more)]


class TrainConfig(Config):
    """How long, in what portions and how carefully."""

    steps: int | None = Field(None, ge=1)  # wins over tokens and epochs
    epochs: float | None = Field(None, gt=0)  # where steps and tokens say nothing; None: 1
    tokens: int | None = Field(None, ge=1)  # where steps says nothing
    batch: int = Field(32, ge=1)  # sequences (fine-tuning) or full rows (pre-training) a step
    batch_tokens: int | None = Field(None, ge=1)  # fine-tuning: as many tokens a step instead, of sequences alike
    micro_batch: int | None = Field(None, ge=1)  # as many sequences or rows at a time; None: all
    length: int = Field(128, ge=8)  # tokens of a row or, fine-tuning, the most of a sequence
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto", "always", "never"] = "auto"  # auto: where it pays, which is on CUDA
    recompute: Recompute = Recompute()
    weights: Literal["fp32", "bf16"] = "fp32"  # what matrices are held in; bf16 is rounded by chance (`portions`)
    fused_backward: bool = False  # step each parameter inside the backward pass, and free its gradient at once
    offload: Offload = ()  # to the host's memory, or of a CPU run to disk
    memory: Amount | None = None  # "6GiB": the most to hold; the planner then chooses what above and below saves memory
    clip: float = Field(1.0, ge=0)  # the most that the norm of the gradient may be; 0: anything
    log_every: int | None = Field(None, ge=1)  # None: fifty times in the run
    evaluate_every: int | None = Field(None, ge=1)  # None: ten times in the run
    save_every: int | None = Field(None, ge=1)  # None: at every evaluation
    keep: int = Field(2, ge=2)  # checkpoints
    patience: int | None = Field(None, ge=1)  # evaluations without improvement before stopping
    max_skipped: int = Field(10, ge=1)  # non-finite steps in a row before giving up


@dataclass
class Progress:
    """Everything a run knows besides weights and optimizer states: plain numbers."""

    step: int = 0
    tokens: int = 0
    positions: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    monitor: str = ""  # the score that evaluations are compared by
    best: float | None = None
    best_step: int = 0
    since_best: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)  # evaluations

    def to_json(self) -> dict[str, Any]:
        """Ready for strict JSON: a score that is undefined is null."""
        return {name: finite(value) for name, value in asdict(self).items()}


def finite(value: Any) -> Any:
    if isinstance(value, list):
        return [finite(x) for x in value]
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Evaluation:
    """Scores of one evaluation and the one to select by."""

    scores: dict[str, float]
    monitor: str
    higher_is_better: bool

    @property
    def merit(self) -> float:
        value = self.scores[self.monitor]
        return value if self.higher_is_better else -value


class Log(Protocol):
    def log(self, step: int, values: dict[str, float], kind: str = "train") -> None: ...


class Diverged(RonnaError):
    """The losses or gradients of a run stay non-finite."""


class Interrupted(Exception):
    """The run was asked to stop; it has saved what it had."""


@contextmanager
def stop_flag() -> Iterator[Callable[[], bool]]:
    """Turns SIGTERM and the first Ctrl-C into a flag, so that a step is never torn."""
    asked: list[int] = []
    previous = {}

    def note(number: int, _: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: whoever owns it handles signals
        pass
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def gradients(
    model: Transformer,
    objective: Objective,
    batches: list[Batch],
    seed: int,
    walk: Backward = Tensor.backward,
    world: World = ALONE,
) -> Totals:
    """Add the gradient of one step to the parameters, or do with it what `walk` does; return the counts of all ranks,
    and losses and statistics of this one.

    Each term is divided once, by its count over all micro-batches of all ranks: how the step is cut up cannot matter.
    """
    counts: dict[str, int] = {}
    for batch in batches:
        for term, n in batch.counts.items():
            counts[term] = counts.get(term, 0) + n
    totals = Totals(counts=world.total_counts(counts))
    if len(batches) > 1 and of_whole_batch(objective):
        cached_gradients(model, objective, batches, seed, totals)
        return totals
    means: dict[tuple[int, int], Tensor | None] = {}
    turns = turns_of(model, len(batches))
    for turn in turns:
        batch = batches[turn.micro]
        with turning(model, turn, turns):
            if turn.forward:
                place = (turn.micro,) if world.size == 1 else (turn.micro, world.rank // world.tensor)
                # Dropout follows from (seed, step, micro-batch, part of the tokens).
                torch.manual_seed(seed_for(seed, *place))
                means[turn[:2]] = mean_of(model, objective, batch, totals)
            else:
                go_back(means.pop(turn[:2]), walk)
    totals.sums = world.of_last_stage(totals.sums)
    return totals


def go_back(mean: Tensor | None, walk: Backward) -> None:
    if mean is not None:
        walk(mean)


def mean_of(model: Transformer, objective: Objective, batch: Batch, totals: Totals) -> Tensor | None:
    """Of a micro-batch the mean of the loss's terms, or what stands for it where another rank goes on; None without
    any term."""
    if not any(totals.counts.values()):
        return None
    try:
        return added(objective.loss(model, batch), totals, batch.stands_in)
    except Handed as handed:
        return handed.on


def added(loss: Loss, totals: Totals, stands_in: bool = False) -> Tensor | None:
    """The sum of the terms' means, whose sums are added to the totals, whose counts divide; of a batch that only stands
    in for others, nothing."""
    terms = [total / totals.counts[term] for term, total in loss.sums.items() if totals.counts[term]]
    totals.add(loss.nothing() if stands_in else loss.sums | loss.stats, {})
    if not terms:
        return None
    mean = torch.stack(terms).sum()
    return mean * 0.0 if stands_in else mean


def cached_gradients(
    model: Transformer, objective: WholeBatch, batches: list[Batch], seed: int, totals: Totals
) -> None:
    """`gradients` where the loss is of all micro-batches together: GradCache (Gao et al. 2021).

    The vectors of all, the loss and its gradient for each vector; then each micro-batch once more, with that gradient
    fed in. Only one micro-batch's activations are held at a time, for twice the forward passes.
    """

    def vectors(i: int) -> Tensor:
        torch.manual_seed(seed_for(seed, i))  # the same dropout both times
        return objective.vectors(model, batches[i])

    # With a graph, which goes at once: without one other kernels would compute, and round otherwise.
    leaves = [vectors(i).detach().requires_grad_() for i in range(len(batches))]
    if (mean := added(objective.loss_of(torch.cat(leaves), batches), totals)) is not None:
        mean.backward()
    for i, leaf in enumerate(leaves):
        if leaf.grad is not None:
            vectors(i).backward(leaf.grad)


@dataclass
class Window:
    """What happened since the last log line."""

    totals: Totals = field(default_factory=Totals)
    tokens: int = 0
    started: float = field(default_factory=time.perf_counter)

    def values(self) -> dict[str, float]:
        seconds = max(time.perf_counter() - self.started, 1e-9)
        return {**self.totals.means(), "tokens_per_second": self.tokens / seconds}


@dataclass
class Run:
    """What a run consists of. `save` and `improved` write to disk; `hooks` run after each optimizer step."""

    model: Transformer
    objective: Objective
    feed: Callable[[int], list[Batch]]
    optimizers: list[Optimizer]
    schedule: Schedule
    config: TrainConfig
    total_steps: int
    seed: int
    log: Log
    progress: Progress = field(default_factory=Progress)
    evaluate: Callable[[Callable[[], bool]], Evaluation | None] | None = None  # given a way to ask whether to stop
    save: Callable[[Progress], None] | None = None
    improved: Callable[[], None] | None = None
    give_up: Callable[[Progress], bool] | None = None  # asked after each evaluation
    hooks: list[Callable[[int], None]] = field(default_factory=list)
    saved_step: int = -1
    away: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None = None  # where activations wait, if not here
    update: Update | None = None  # None: all gradients, clipped together, then the optimizers
    world: World = ALONE

    def __post_init__(self) -> None:
        self.parameters = list(self.model.parameters())  # to walk the modules at every step takes half a millisecond
        if self.update is None:
            rows = EmbeddingRows(self.model)
            self.update = WholeUpdate(self.parameters, self.config.clip or math.inf, rows, self.optimizers)

    def train(self) -> Progress:
        """Train to the end, early stop or interruption.

        Raises Interrupted after saving when asked to stop, Diverged when losses stay non-finite.
        """
        p, window = self.progress, Window()
        log_every = self.config.log_every or max(1, self.total_steps // 50)
        evaluate_every = self.config.evaluate_every or max(1, self.total_steps // 10)
        save_every = self.config.save_every or evaluate_every
        self.model.train()
        with stop_flag() as asked:

            def stop() -> bool:  # of every rank where one is asked to
                return self.world.any(asked())

            while True:
                last = p.step >= self.total_steps
                paused = time.perf_counter()
                if p.step and (p.step % evaluate_every == 0 or last):
                    last = self.judge(stop) or last
                stopping = stop()
                if stopping or (p.step and (p.step % save_every == 0 or last)):
                    self.keep()
                if last:
                    self.world.at_rest()
                    return p
                if stopping:
                    raise Interrupted
                began = time.perf_counter()
                window.started += began - paused  # evaluating and saving are not training
                self.step(window)
                p.seconds += time.perf_counter() - began
                if p.step % log_every == 0 or p.step == self.total_steps:
                    self.report(window)
                    window = Window()

    def step(self, window: Window) -> None:
        p = self.progress
        batches = self.feed(p.step)
        seed = seed_for(self.seed, p.step)
        set_lr(self.optimizers, lr_scale(self.schedule, p.step, self.total_steps))
        assert self.update is not None
        totals, norm, done = self.update(partial(self.gradients, batches, seed), seed)
        if not done:
            self.skip(norm)
        else:
            p.skipped_in_a_row = 0
            for hook in self.hooks:
                hook(p.step)
            seen = [sum(b.real_tokens for b in batches), sum(b.computed_positions for b in batches)]
            tokens, positions = self.world.total(seen)
            window.totals.add(totals.sums, totals.counts)
            window.tokens += tokens
            p.tokens += tokens
            p.positions += positions
        for parameter in self.parameters:
            parameter.grad = None
        p.step += 1

    def gradients(self, batches: list[Batch], seed: int, walk: Backward) -> Totals:
        with nullcontext() if self.away is None else saved_tensors_hooks(*self.away):
            return gradients(self.model, self.objective, batches, seed, walk, self.world)

    def skip(self, norm: Tensor) -> None:
        """A step without a usable gradient leaves weights and optimizer as they are."""
        p = self.progress
        p.skipped += 1
        p.skipped_in_a_row += 1
        self.log.log(p.step, {"gradient_norm": float(norm)}, kind="skipped")
        if p.skipped_in_a_row >= self.config.max_skipped:
            raise Diverged(
                f"{p.skipped_in_a_row} steps in a row had no finite gradient",
                where=f"step {p.step}",
                fix="lower optim.lr, use train.precision=fp32, or look at the data of these steps",
            )

    def report(self, window: Window) -> None:
        if not window.totals.counts:
            return
        p = self.progress
        window.totals.sums = self.world.total_sums(window.totals.sums)
        scale = lr_scale(self.schedule, p.step - 1, self.total_steps)
        values = window.values() | {"lr_scale": scale, "tokens": p.tokens, "memory_bytes": resident_bytes()}
        self.log.log(p.step, values)

    def judge(self, stop: Callable[[], bool]) -> bool:
        """Evaluate unless this step has been evaluated before a restart; True when it is time to stop."""
        p = self.progress
        if self.evaluate is not None and not (p.history and p.history[-1]["step"] == p.step):
            self.world.at_rest()
            evaluation = self.evaluate(stop)
            self.model.train()
            rest(self.model)
            if evaluation is None:  # asked to stop in the middle of it
                return False
            self.log.log(p.step, evaluation.scores, kind="validation")
            p.history.append({"step": p.step, **evaluation.scores})
            p.monitor = evaluation.monitor
            if p.best is None or evaluation.merit > p.best:
                p.best, p.best_step, p.since_best = evaluation.merit, p.step, 0
                if self.improved is not None:
                    self.improved()
            else:
                p.since_best += 1
        if self.config.patience is not None and p.since_best >= self.config.patience:
            return True
        return self.give_up is not None and self.give_up(p)

    def keep(self) -> None:
        if self.save is not None and self.progress.step != self.saved_step:
            self.save(self.progress)
            self.saved_step = self.progress.step
