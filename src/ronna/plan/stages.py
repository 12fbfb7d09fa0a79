"""What the ranks of a pipeline have: the first has most micro-batches on their way, the last the loss.

Legend: P ranks, K runs of blocks a rank, M micro-batches.
"""

from dataclasses import dataclass, replace

from ronna.model import config as c
from ronna.plan.ranks import Ranks
from ronna.plan.stretches import Step


@dataclass(frozen=True)
class Stage:
    """holds: the model with the blocks that are there. computes: that without the head, where it is another rank's.
    behind: of how many more micro-batches activations are kept."""

    holds: c.Model
    computes: c.Model
    step: Step
    behind: float = 0.0


def stages(model: c.Model, step: Step) -> list[Stage]:
    """The first and the last, or all of it where there is no pipeline."""
    ranks = step.ranks
    if ranks.pipeline == 1:
        return [Stage(model, model, step)]
    found = []
    for rank in (0, ranks.pipeline - 1):
        here = blocks_of(len(model.last.blocks), ranks, rank)
        holds = with_blocks(model, here)
        computes = holds if rank else replace(holds, head=None, classifier=None)
        whole = sum(i < step.blocks for i in here)
        feeds = sum(step.blocks <= i < step.blocks + step.feeds for i in here)
        own = replace(step, blocks=whole, feeds=feeds)
        found.append(Stage(holds, computes, own, on_their_way(ranks, rank, step.micro_batches) - 1.0))
    return found


def blocks_of(blocks: int, ranks: Ranks, rank: int) -> list[int]:
    """As `ronna.parallel.pipeline` gives them to a rank."""
    count = ranks.pipeline * ranks.chunks
    parts = [range(blocks * i // count, blocks * (i + 1) // count) for i in range(count)]
    return [i for part in parts[rank :: ranks.pipeline] for i in part]


def with_blocks(model: c.Model, here: list[int]) -> c.Model:
    stack = replace(model.last, blocks=tuple(model.last.blocks[i] for i in here))
    return replace(model, decoder=stack) if model.decoder is not None else replace(model, encoder=stack)


def on_their_way(ranks: Ranks, rank: int, micros: int) -> float:
    """Micro-batches that have gone forward on a rank and not back, at the most: its turns before the first one back."""
    ahead, chunks = ranks.pipeline - rank - 1, ranks.chunks
    if chunks > 1 and micros % ranks.pipeline:
        return float(micros)
    warm = ahead if chunks == 1 else 2 * ahead + (chunks - 1) * ranks.pipeline
    return min(micros, (warm + 1) / chunks)


def waits(ranks: Ranks, micros: int) -> float:
    """Micro-batches in whose time a rank has nothing to do in a step (Narayanan et al. 2021)."""
    even = ranks.chunks if micros % ranks.pipeline == 0 else 1
    return (ranks.pipeline - 1) / even
