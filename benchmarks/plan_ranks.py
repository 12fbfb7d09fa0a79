"""What the planner says of many GPUs beside what others have measured with their own code.

    python benchmarks/plan_ranks.py

torchtitan: its benchmark page of December 2024. Hosts of eight H100 with 96 GB of HBM2e (2.4 TB/s) at 500 W, 400 Gbit/s
of network a card, sequences of 8,192 tokens. Selective recomputation there means every second matrix product; here the
feed-forward half of every block is computed again. Pipelines are not planned, so its runs of 405B are not here.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from ronna.model.families import preset
from ronna.plan.hardware import COPIED, GB, GIB, STREAMED, device
from ronna.plan.memory import estimate
from ronna.plan.ranks import Ranks
from ronna.plan.shapes import Lengths
from ronna.plan.stretches import Step
from ronna.plan.time import step_time

LENGTH = 8192
CARD = replace(
    device("h100-80gb")[1],
    memory=95 * GIB,
    bandwidth=2400 * GB * STREAMED,
    network=50 * GB * COPIED,
)


class Row(NamedTuple):
    model: str
    what: str
    ranks: Ranks
    sequences: int  # of a rank's micro-batch
    blocks: int
    feeds: int
    rate: int  # tokens/s of a GPU, measured
    gib: float  # measured


def rows() -> Iterator[Row]:
    yield Row("llama-3-8b", "8 GPUs, FSDP", Ranks(shard=8), 2, 0, 32, 5762, 82.4)
    yield Row("llama-3-8b", "8 GPUs, FSDP, compiled", Ranks(shard=8), 2, 0, 32, 6667, 77.0)
    yield Row("llama-3-8b", "128 GPUs, FSDP", Ranks(shard=128), 2, 0, 32, 5605, 67.0)
    yield Row("llama-3-8b", "128 GPUs, FSDP, compiled", Ranks(shard=128), 2, 0, 32, 6514, 62.0)
    yield Row("llama-3-70b", "256 GPUs, FSDP 32 x TP 8, float8", Ranks(shard=32, tensor=8), 16, 80, 0, 829, 71.9)


def main() -> None:
    print("| model | run | measured | Ronna, planned | difference | measured | planned | difference | waiting |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows():
        model = preset(row.model)[1]
        lengths = Lengths(row.sequences, LENGTH)
        step = Step(lengths, compute="bf16", blocks=row.blocks, feeds=row.feeds, device="cuda", ranks=row.ranks)
        time = step_time(model, step, CARD)
        rate = lengths.total * row.ranks.parts / time.total / row.ranks.size
        memory = (estimate(model, step).peak + CARD.taken) / GIB
        speed = f"{row.rate:,} tokens/s | {rate:,.0f} | {rate / row.rate - 1:+.0%}"
        held = f"{row.gib:.1f} GiB | {memory:.1f} | {memory / row.gib - 1:+.0%}"
        print(f"| {row.model} | {row.what} | {speed} | {held} | {time.communication / time.total:.0%} |")


if __name__ == "__main__":
    main()
