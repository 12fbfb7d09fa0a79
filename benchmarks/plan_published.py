"""The planner's memory beside what others have measured with their own code, on GPUs.

    python benchmarks/plan_published.py

What are compared are two programs, not a forecast and its fulfilment: a difference says how much more or less Ronna is
to hold.

litgpt: its resource tables (20 October 2023, commit 8641822; PyTorch 2.1, one A100 of 40 GB, bf16-true, LoRA of rank 8
on q and v, no recomputation), at the longest training example of Alpaca, 1,304 tokens.
LLaMA-Factory: its wiki's comparison (15 April 2024; one A100 of 40 GB, 4 bits, LoRA of rank 8 on every map, one
sequence at a time with FlashAttention 2; blocks are computed again there unless told otherwise).
unsloth: the least that its documentation asks for (November 2026), settings not said; here one sequence of 512 tokens,
rank 16 on every map, blocks computed again.
PEFT: its README's table for T0_3B (one A100 of 80 GB), by its script: fp32, 8 tweets padded to the longest, here 64
tokens, answers of 4; LoRA of rank 8 on q and v.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from ronna.model.families import preset
from ronna.plan.memory import Step, estimate
from ronna.plan.shapes import Adapter, Lengths

GB = 10**9
Q_V, ALL = ("q", "v"), ("all",)


class Row(NamedTuple):
    source: str
    model: str
    what: str
    measured: float  # GB
    step: dict[str, Any]


def rows() -> Iterator[Row]:
    for model, quantize, micro, measured in (
        ("llama-2-7b", None, 1, 21.30),
        ("llama-2-7b", "nf4", 1, 14.14),
        ("llama-2-7b", "nf4_double", 1, 13.84),
        ("llama-2-7b", None, 2, 29.07),
        ("llama-2-13b", None, 1, 38.12),
        ("llama-2-13b", "nf4", 1, 23.14),
        ("llama-2-13b", "nf4_double", 1, 22.55),
    ):
        ways = {"lengths": Lengths(micro, 1304), "adapter": Adapter(8, Q_V), "quantize": quantize}
        yield Row("litgpt", model, f"LoRA, {quantize or 'bf16'}, {micro} x 1304", measured, ways)
    for length, measured in ((1024, 6), (2048, 7), (4096, 9), (8192, 12), (16384, 19), (32768, 32)):
        ways = {"lengths": Lengths(1, length), "adapter": Adapter(8, ALL), "quantize": "nf4", "blocks": 32}
        yield Row("LLaMA-Factory", "llama-2-7b", f"LoRA, nf4, 1 x {length}, blocks again", measured, ways)
    for model, quantize, measured in (
        ("llama-2-7b", "nf4", 5),
        ("llama-2-7b", None, 19),
        ("llama-3-8b", "nf4", 6),
        ("llama-3-8b", None, 22),
        ("llama-3-70b", "nf4", 41),
        ("llama-3-70b", None, 164),
    ):
        blocks = len(preset(model)[1].last.blocks)
        ways = {"lengths": Lengths(1, 512), "adapter": Adapter(16, ALL), "quantize": quantize, "blocks": blocks}
        yield Row("unsloth, the least", model, f"LoRA, {quantize or 'bf16'}, 1 x 512, blocks again", measured, ways)
    for title, adapter, measured in (("full", None, 47.14), ("LoRA", Adapter(8, Q_V), 14.40)):
        ways = {"lengths": Lengths(8, 4), "source": Lengths(8, 64), "adapter": adapter, "compute": "fp32"}
        yield Row("PEFT", "t5-v1.1-xl", f"{title}, fp32, 8 x 64", measured, ways)


def main() -> None:
    print("| source | model | run | measured | Ronna, planned | difference | activations |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows():
        plan = estimate(preset(row.model)[1], Step(**{"compute": "bf16", "device": "cuda"} | row.step))
        planned = plan.peak / GB
        figures = f"{row.measured:.2f} GB | {planned:.2f} GB | {planned / row.measured - 1:+.0%}"
        print(f"| {row.source} | {row.model} | {row.what} | {figures} | {sum(plan.activations) / GB:.2f} GB |")


if __name__ == "__main__":
    main()
