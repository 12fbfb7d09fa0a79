"""The planner's memory beside what others have measured with their own code, on GPUs.

    python benchmarks/plan_published.py

litgpt: its resource tables (20 October 2023, commit 8641822; PyTorch 2.1, one A100 of 40 GB, bf16-true, LoRA of rank 8
on q and v, no recomputation), at the longest training example of Alpaca, 1,304 tokens. What is compared are two
programs, not a forecast and its fulfilment: the difference says how much more or less Ronna is to hold.
"""

from typing import NamedTuple

from ronna.model.families import preset
from ronna.plan.memory import Step, estimate
from ronna.plan.shapes import Adapter, Lengths

GB = 10**9
LENGTH = 1304


class Row(NamedTuple):
    model: str
    quantize: str | None
    micro_batch: int
    measured: float  # GB


LITGPT = [
    Row("llama-2-7b", None, 1, 21.30),
    Row("llama-2-7b", "nf4", 1, 14.14),
    Row("llama-2-7b", "nf4_double", 1, 13.84),
    Row("llama-2-7b", None, 2, 29.07),
    Row("llama-2-13b", None, 1, 38.12),
    Row("llama-2-13b", "nf4", 1, 23.14),
    Row("llama-2-13b", "nf4_double", 1, 22.55),
]


def main() -> None:
    print("| model | weights | micro-batch | litgpt, measured | Ronna, planned | difference | activations |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in LITGPT:
        step = Step(
            Lengths(row.micro_batch, LENGTH),
            compute="bf16",
            adapter=Adapter(8, ("q", "v")),
            quantize=row.quantize,  # type: ignore[arg-type]
            micro_batches=128 // row.micro_batch,
            device="cuda",
        )
        plan = estimate(preset(row.model)[1], step)
        planned = plan.peak / GB
        what = f"{row.model} | {row.quantize or 'bf16'} | {row.micro_batch} | {row.measured:.2f} GB"
        difference = f"{planned / row.measured - 1:+.0%} | {sum(plan.activations) / GB:.2f} GB"
        print(f"| {what} | {planned:.2f} GB | {difference} |")


if __name__ == "__main__":
    main()
