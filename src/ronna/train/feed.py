"""Which samples a step sees: a function of (seed, step) and nothing else, so a run can be cut anywhere."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ronna.data.loader import Order, positions_for, sample_rng
from ronna.data.packing import length_batches
from ronna.objectives.base import Batch, Objective, Sample, collate

Plan = list[list[tuple[int, int]]]  # micro-batches of (position in the whole run, index in the data)


@dataclass(frozen=True)
class Feed:
    """Calling it with a step gives that step's micro-batches on the device."""

    objective: Objective
    data: Sequence[Any]
    plan: Callable[[int], Plan]
    seed: int
    device: torch.device

    def samples(self, step: int) -> list[list[Sample]]:
        """The samples of each micro-batch of a step, with masks and choices drawn for them."""
        return [
            [
                sample
                for position, index in micro
                for sample in self.objective.samples(self.data[index], sample_rng(self.seed, position))
            ]
            for micro in self.plan(step)
        ]

    def __call__(self, step: int) -> list[Batch]:
        return [collate(self.objective, samples, self.device) for samples in self.samples(step) if samples]


def row_plan(items: int, seed: int, batch: int, micro: int) -> tuple[Callable[[int], Plan], int]:
    """`batch` items a step in shuffled order, at most `micro` at a time; and the steps of one pass over the data."""
    order, pieces = Order(items, seed), -(-batch // micro)

    def plan(step: int) -> Plan:
        parts = [positions_for(step, batch=batch, micro=i, accumulation=pieces) for i in range(pieces)]
        return [list(zip(p.tolist(), order.at(p).tolist(), strict=True)) for p in parts]

    return plan, max(1, -(-items // batch))


def length_plan(lengths: np.ndarray, seed: int, batch: int, micro: int) -> tuple[Callable[[int], Plan], int]:
    """Batches of items of like length, each item once an epoch; the epoch's last batch may be smaller."""
    per_epoch = -(-len(lengths) // batch)

    @lru_cache(maxsize=2)
    def epoch_batches(epoch: int) -> list[np.ndarray]:
        return length_batches(lengths, batch_size=batch, seed=seed, epoch=epoch)

    def plan(step: int) -> Plan:
        epoch, place = divmod(step, per_epoch)
        indices = epoch_batches(epoch)[place].tolist()
        pairs = [(epoch * len(lengths) + i, i) for i in indices]
        return [pairs[i : i + micro] for i in range(0, len(pairs), micro)]

    return plan, per_epoch
