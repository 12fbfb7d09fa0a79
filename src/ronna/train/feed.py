"""Which samples a step sees: a function of (seed, step) and nothing else, so a run can be cut anywhere."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from ronna.data.loader import Order, positions_for, sample_rng
from ronna.data.packing import length_batches
from ronna.objectives.base import Batch, Objective, Sample, collate
from ronna.parallel.world import ALONE, World

Plan = list[list[tuple[int, int]]]  # micro-batches of (position in the whole run, index in the data)


@dataclass(frozen=True)
class Feed:
    """Calling it with a step gives that step's micro-batches on the device, of each the part of this rank."""

    objective: Objective
    data: Sequence[Any]
    plan: Callable[[int], Plan]
    seed: int
    device: torch.device
    world: World = ALONE

    def samples(self, step: int) -> list[list[Sample]]:
        """The samples of each micro-batch of a step, those of all ranks, with masks and choices drawn for them."""
        return [self.drawn(micro) for micro in self.plan(step)]

    def drawn(self, places: Sequence[tuple[int, int]]) -> list[Sample]:
        return [
            sample
            for position, index in places
            for sample in self.objective.samples(self.data[index], sample_rng(self.seed, position))
        ]

    def __call__(self, step: int) -> list[Batch]:
        alone = self.world.size == 1  # else every rank computes as many micro-batches as the others
        parts = [self.drawn(self.world.share(micro)) for micro in self.plan(step)]
        return [self.batch(samples) for samples in parts if samples or not alone]

    def batch(self, samples: list[Sample]) -> Batch:
        if samples:
            return collate(self.objective, samples, self.device)
        return collate(self.objective, self.substitute, self.device).standing_in()

    @cached_property
    def substitute(self) -> list[Sample]:
        """Of the first item that has samples."""
        drawn = (self.objective.samples(item, sample_rng(self.seed, 0)) for item in self.data)
        return next(filter(None, drawn))


def row_plan(items: int, seed: int, batch: int, micro: int) -> tuple[Callable[[int], Plan], int]:
    """`batch` items a step in shuffled order, at most `micro` at a time; and the steps of one pass over the data."""
    order, pieces = Order(items, seed), -(-batch // micro)

    def plan(step: int) -> Plan:
        parts = [positions_for(step, batch=batch, micro=i, accumulation=pieces) for i in range(pieces)]
        return [list(zip(p.tolist(), order.at(p).tolist(), strict=True)) for p in parts]

    return plan, max(1, -(-items // batch))


def length_plan(
    lengths: np.ndarray, seed: int, batch: int, micro: int | None, batch_tokens: int | None = None
) -> tuple[Callable[[int], Plan], int]:
    """Batches of items of like length, each item once an epoch; the epoch's last batch may be smaller.

    With `batch_tokens` a batch is as many items as have no more tokens together, and epochs may differ by a few
    steps; the number given back is that of the first.
    """
    size = {"batch_size": batch} if batch_tokens is None else {"batch_tokens": batch_tokens}

    @lru_cache(maxsize=2)
    def epoch_batches(epoch: int) -> list[np.ndarray]:
        return length_batches(lengths, seed=seed, epoch=epoch, **size)

    starts = [0]  # step at which an epoch begins

    def plan(step: int) -> Plan:
        while step >= starts[-1]:
            starts.append(starts[-1] + len(epoch_batches(len(starts) - 1)))
        epoch = bisect_right(starts, step) - 1
        indices = epoch_batches(epoch)[step - starts[epoch]].tolist()
        pairs = [(epoch * len(lengths) + i, i) for i in indices]
        micro_batch = micro or len(pairs)
        return [pairs[i : i + micro_batch] for i in range(0, len(pairs), micro_batch)]

    return plan, len(epoch_batches(0))
