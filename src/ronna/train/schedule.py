"""Learning-rate schedules: the rate at a step is a function of the step, with nothing to save or restore."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ronna.base.config import Config

if TYPE_CHECKING:
    from torch.optim import Optimizer

# A whole number of steps, or the part of the run they take: `warmup = 500`, `warmup = 0.05`.
StepsOrPart = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0.0, lt=1.0)]
MinRatio = Annotated[float, Field(ge=0.0, le=1.0)]


class Constant(Config):
    """The full rate after the warmup."""

    kind: Literal["constant"] = "constant"
    warmup: StepsOrPart = 0


class Linear(Config):
    """A straight line from the full rate down to `min_ratio` of it (Devlin et al. 2019)."""

    kind: Literal["linear"] = "linear"
    warmup: StepsOrPart = 0
    min_ratio: MinRatio = 0.0


class Cosine(Config):
    """Half a cosine from the full rate down to `min_ratio` of it (Loshchilov & Hutter 2017)."""

    kind: Literal["cosine"] = "cosine"
    warmup: StepsOrPart = 0
    min_ratio: MinRatio = 0.1


class WSD(Config):
    """Warmup, stable, decay (Hu et al. 2024): the full rate, then a decay over the last `decay` of the run.

    The stable part does not depend on the length of the run, so a run can be prolonged from before its decay.
    `shape` "sqrt" is the 1 - sqrt(p) that Hägele et al. (2024) found best, "linear" is 1 - p.
    """

    kind: Literal["wsd"] = "wsd"
    warmup: StepsOrPart = 0
    decay: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    shape: Literal["sqrt", "linear"] = "sqrt"
    min_ratio: MinRatio = 0.0


Schedule = Annotated[Constant | Linear | Cosine | WSD, Field(discriminator="kind")]


def warmup_steps(config: Schedule, total_steps: int) -> int:
    """The warmup in steps; a part of the run is rounded to the nearest step."""
    return config.warmup if isinstance(config.warmup, int) else round(config.warmup * total_steps)


def lr_scale(config: Schedule, step: int, total_steps: int) -> float:
    """What the peak learning rate is multiplied by at `step`, in [0, 1].

    `step` s counts from 0, the run has N = `total_steps`, the warmup W:
        s < W    (s + 1) / W, so the first step already learns and step W - 1 has the full rate
        s >= W   m + (1 - m) f(p), with m = `min_ratio` and p = (s - D) / (N - D) cut to [0, 1], where the
                 decay starts at D = W, except wsd: D = max(W, N - round(decay N)), and f = 1 before D
        f(p)     constant 1, linear 1 - p, cosine (1 + cos(pi p)) / 2, wsd 1 - sqrt(p) or 1 - p
    Thus p = 0 at D and would be 1 at step N: the last step still learns, and steps past the end stay at m.
    A warmup longer than the run is cut off by its end, and never reaches the full rate.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if isinstance(config, Constant):
        return 1.0
    start = warmup
    if isinstance(config, WSD):
        start = max(warmup, total_steps - round(config.decay * total_steps))
    progress = 1.0 if step >= total_steps else max(0.0, (step - start) / max(1, total_steps - start))
    return config.min_ratio + (1.0 - config.min_ratio) * _decay(config, progress)


def _decay(config: Linear | Cosine | WSD, progress: float) -> float:
    if isinstance(config, Cosine):
        return (1.0 + math.cos(math.pi * progress)) / 2.0
    if isinstance(config, WSD) and config.shape == "sqrt":
        return 1.0 - math.sqrt(progress)
    return 1.0 - progress


def set_lr(optimizers: Iterable["Optimizer"], scale: float) -> None:
    """Give every parameter group `scale` times the rate it was built with (`build_optimizer`)."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
