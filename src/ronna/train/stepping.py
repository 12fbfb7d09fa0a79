"""How gradients become steps in a run: all optimizers at once, or tensor by tensor where memory goes before time."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ronna.model.transformer import Transformer
from ronna.parallel.pipeline import learning, stages_of
from ronna.train.loop import TrainConfig
from ronna.train.optim import OptimizerConfig, build_optimizer
from ronna.train.portions import Portions
from ronna.train.rows import EmbeddingRows
from ronna.train.shelf import Shelf, away
from ronna.train.update import FusedUpdate, Update, WholeUpdate

LEAN = {"adamw8bit", "apollo"}  # optimizers that take more room for a step the larger the tensor is
Named = Callable[[], Iterator[tuple[str, Parameter]]]


@dataclass(frozen=True)
class Stepping:
    """named: what the optimizers step, by name. update: how gradients come to them. away: for
    `saved_tensors_hooks`, where activations wait elsewhere. written: to be told of each tensor that was saved."""

    named: Named
    optimizers: list[Optimizer]
    update: Update
    away: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None = None
    written: Callable[[Tensor], object] = lambda tensor: None


def is_lean(optim: OptimizerConfig, config: TrainConfig) -> bool:
    """Whether memory goes before time: one tensor is stepped at a time."""
    ways = (config.weights == "bf16", config.fused_backward, "optimizer" in config.offload)
    return any(ways) or optim.kind in LEAN


def stepping(
    model: Transformer, optim: OptimizerConfig, config: TrainConfig, used: Tensor | None, shelf: Shelf | None
) -> Stepping:
    """used: token ids in the data, None if not counted. shelf: where a CPU run has what is offloaded."""
    parameters, clip = list(model.parameters()), config.clip or math.inf
    if optim.rates:
        optim.refuse_unknown(learning(model))
    elsewhere = away(shelf) if "activations" in config.offload else None
    if not is_lean(optim, config):
        rows = EmbeddingRows(model, used)
        named: Named = lambda: rows.named_parameters(model.named_parameters())  # noqa: E731
        optimizers = build_optimizer(optim, named())
        whole = WholeUpdate(parameters, clip, rows, optimizers, stages=stages_of(model))
        return Stepping(named, optimizers, whole, elsewhere)
    rows = EmbeddingRows(model, sparse=False)
    portions = Portions(optim, model.named_parameters(), "optimizer" in config.offload, shelf)
    update: Update
    if config.fused_backward:
        update = FusedUpdate(parameters, clip, portions)
    else:
        update = WholeUpdate(parameters, clip, rows, portions.optimizers, portions)
    return Stepping(portions.named_parameters, portions.optimizers, update, elsewhere, portions.release)
