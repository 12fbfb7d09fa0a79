"""From gradients to weights: all at once, or each gradient as soon as it is there."""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter
from torch.optim import Optimizer

from ronna.objectives.base import Totals
from ronna.train.optim import clip_gradients, norm_of, scaled_to
from ronna.train.portions import Portions
from ronna.train.rows import EmbeddingRows

Backward = Callable[[Tensor], None]
Compute = Callable[[Backward], Totals]  # the losses of a step, each given to what takes its gradient


class Outcome(NamedTuple):
    totals: Totals
    norm: Tensor  # of the gradient, before clipping
    done: bool  # not so where there was no gradient, or one that is not finite: then nothing has changed


class Update(Protocol):
    def __call__(self, compute: Compute, seed: int) -> Outcome: ...

    def gradient_norm(self, parameter: Parameter) -> float | None:
        """Of the step just taken; None where the parameter had no gradient."""
        ...


def usable(totals: Totals, norm: Tensor) -> bool:
    return sum(totals.counts.values()) > 0 and math.isfinite(float(norm))


def gradient_norm(parameter: Parameter) -> float | None:
    """Of the gradient that a parameter has now."""
    if parameter.grad is None:
        return None
    gradient = parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad
    return float(norm_of(gradient))


class WholeUpdate:
    """All gradients, their common norm, then the optimizers."""

    def __init__(
        self,
        parameters: list[Parameter],
        clip: float,
        rows: EmbeddingRows,
        optimizers: list[Optimizer],
        portions: Portions | None = None,
        stages: ProcessGroup | None = None,
    ):
        """`portions` take the step where there are some, else `optimizers`. stages: as `clip_gradients` has it."""
        self.parameters, self.clip, self.rows = parameters, clip, rows
        self.optimizers, self.portions, self.stages = optimizers, portions, stages

    def __call__(self, compute: Compute, seed: int) -> Outcome:
        totals = compute(lambda loss: loss.backward())
        self.rows.merge()
        norm = clip_gradients(self.parameters, self.clip, self.stages)
        done = usable(totals, norm)
        if done and self.portions is not None:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    self.portions.step(parameter, seed)
        elif done:
            with self.rows.dense():
                for optimizer in self.optimizers:
                    optimizer.step()
        return Outcome(totals, norm, done)

    gradient_norm = staticmethod(gradient_norm)


class FusedUpdate:
    """Each parameter takes its step inside the backward pass, and its gradient is gone before the next one is there
    (LOMO, Lv et al. 2023).

    To clip by the norm of all, gradients are computed twice: first for their norms alone, then to be used. With an
    infinite `clip` once is enough; a gradient that is not finite then stops the steps of the layers before it, not
    those already taken behind it.
    """

    def __init__(self, parameters: list[Parameter], clip: float, portions: Portions):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.clip, self.portions = clip, portions
        self.norms: dict[Parameter, Tensor] = {}
        self.scale: Tensor | None = None  # of a gradient that is clipped
        self.active = self.stepping = False
        self.seed = 0
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self.take)

    def __call__(self, compute: Compute, seed: int) -> Outcome:
        self.norms, self.seed, self.scale = {}, seed, None
        self.active = True
        try:
            totals = compute(self.backward)
        finally:
            self.active = False
        norm = self.norm()
        return Outcome(totals, norm, usable(totals, norm))

    def backward(self, loss: Tensor) -> None:
        self.stepping = not math.isfinite(self.clip)
        if not self.stepping:
            loss.backward(retain_graph=True)
            norm = self.norm()
            if not math.isfinite(float(norm)):
                return
            self.scale = scaled_to(norm, self.clip) if float(norm) > self.clip else None
            self.stepping = True
        loss.backward()

    def take(self, parameter: Parameter) -> None:
        """Called by autograd with the whole gradient of a parameter."""
        if not self.active:
            return
        assert parameter.grad is not None
        if parameter not in self.norms:
            self.norms[parameter] = norm_of(parameter.grad)
            self.stepping = self.stepping and math.isfinite(float(self.norms[parameter]))
        if self.stepping:
            if self.scale is not None:
                parameter.grad.mul_(self.scale)
            self.portions.step(parameter, self.seed)
        parameter.grad = None

    def norm(self) -> Tensor:
        """Of all gradients together, summed in the order of the parameters."""
        norms = [self.norms[p] for p in self.parameters if p in self.norms]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())

    def gradient_norm(self, parameter: Parameter) -> float | None:
        found = self.norms.get(parameter)
        return None if found is None else float(found)
