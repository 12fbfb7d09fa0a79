"""What the planner says of many GPUs beside what others have measured with their own code.

    python benchmarks/plan_ranks.py

torchtitan: its benchmark page of December 2024. Hosts of eight H100 with 96 GB of HBM2e (2.4 TB/s) at 500 W, 400 Gbit/s
of network a card, sequences of 8,192 tokens unless said otherwise. Selective recomputation there means every second
matrix product; here the feed-forward half of every block is computed again. Its page does not say how many
micro-batches a pipeline had; here as many as ranks, as its settings of that time are where nothing is said.
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
    length: int
    rate: int  # tokens/s of a GPU, measured
    gib: float  # measured
    micros: int = 1
    settings: dict[str, int] = {}  # noqa: RUF012


LARGEST = {
    "hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128, "intermediate_size": 53248
}  # fmt: skip


def rows() -> Iterator[Row]:
    yield Row("llama-3-8b", "8 GPUs, FSDP", Ranks(shard=8), 2, 0, 32, LENGTH, 5762, 82.4)
    yield Row("llama-3-8b", "8 GPUs, FSDP, compiled", Ranks(shard=8), 2, 0, 32, LENGTH, 6667, 77.0)
    yield Row("llama-3-8b", "128 GPUs, FSDP", Ranks(shard=128), 2, 0, 32, LENGTH, 5605, 67.0)
    yield Row("llama-3-8b", "128 GPUs, FSDP, compiled", Ranks(shard=128), 2, 0, 32, LENGTH, 6514, 62.0)
    for texts, rate, gib in ((1, 3890, 83.9), (2, 2540, 84.2), (4, 1071, 84.0), (8, 548, 84.5)):
        ranks, length = Ranks(shard=8 // texts, context=texts), 32768 * texts
        what = f"8 GPUs, FSDP {ranks.shard} x CP {texts}, {length:,} tokens, float8"
        yield Row("llama-3-8b", what, ranks, 1, 32, 0, length, rate, gib)
    ranks = Ranks(shard=32, tensor=8)
    yield Row("llama-3-70b", "256 GPUs, FSDP 32 x TP 8, float8", ranks, 16, 80, 0, LENGTH, 829, 71.9)
    deep = Ranks(shard=8, tensor=8, pipeline=8)
    for chunks, name, rate, gib in ((1, "1F1B", 100, 82.5), (2, "interleaved", 128, 72.7)):
        what = f"405B, 512 GPUs, FSDP 8 x TP 8 x PP 8, {name}, float8"
        yield Row("llama-3-70b", what, replace(deep, chunks=chunks), 4, 126, 0, LENGTH, rate, gib, 8, LARGEST)
    for texts, rate, gib in ((1, 76, 75.3), (2, 47, 75.9), (4, 31, 77.1), (8, 16, 84.9)):
        ranks, length = replace(deep, shard=8 // texts, context=texts), 32768 * texts
        what = f"405B, 512 GPUs, FSDP {ranks.shard} x CP {texts} x TP 8 x PP 8, {length:,} tokens, float8"
        yield Row("llama-3-70b", what, ranks, 1, 126, 0, length, rate, gib, 8, LARGEST)


def main() -> None:
    print("| model | run | measured | Ronna, planned | difference | measured | planned | difference | waiting |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows():
        model = preset(row.model, **row.settings)[1]
        lengths = Lengths(row.sequences, row.length)
        ways = {"blocks": row.blocks, "feeds": row.feeds, "micro_batches": row.micros}
        step = Step(lengths, compute="bf16", device="cuda", ranks=row.ranks, **ways)
        time = step_time(model, step, CARD)
        rate = row.micros * lengths.total * row.ranks.parts / time.total / row.ranks.size
        memory = (estimate(model, step).peak + CARD.taken) / GIB
        speed = f"{row.rate:,} tokens/s | {rate:,.0f} | {rate / row.rate - 1:+.0%}"
        held = f"{row.gib:.1f} GiB | {memory:.1f} | {memory / row.gib - 1:+.0%}"
        print(f"| {row.model} | {row.what} | {speed} | {held} | {time.communication / time.total:.0%} |")


if __name__ == "__main__":
    main()
