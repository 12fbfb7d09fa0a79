"""An objective with a further term that no sample has a part in: what the weights themselves are to be like."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ronna.model.transformer import Transformer
from ronna.objectives.base import Batch, Loss, Objective, Sample, of_whole_batch


@dataclass(frozen=True)
class Penalised:
    """`penalty` gives a number; it counts once a step, however the batch is cut into micro-batches."""

    objective: Objective
    name: str
    penalty: Callable[[], Tensor]

    @property
    def whole_batch(self) -> bool:
        return of_whole_batch(self.objective)

    @property
    def together(self) -> int:
        return getattr(self.objective, "together", 1)

    def samples(self, item: Any, rng: np.random.Generator) -> list[Sample]:
        return self.objective.samples(item, rng)

    def counts(self, batch: Batch) -> dict[str, int]:
        return self.objective.counts(batch) | {self.name: 1}

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        loss = self.objective.loss(model, batch)
        return Loss(loss.sums | {self.name: self.penalty()}, loss.stats)

    # Where the loss is of the whole batch

    def vectors(self, model: Transformer, batch: Batch) -> Tensor:
        assert of_whole_batch(self.objective)
        return self.objective.vectors(model, batch)

    def loss_of(self, vectors: Tensor, batches: Sequence[Batch]) -> Loss:
        assert of_whole_batch(self.objective)
        loss = self.objective.loss_of(vectors, batches)
        return Loss(loss.sums | {self.name: self.penalty() * len(batches)}, loss.stats)  # each batch counts one
