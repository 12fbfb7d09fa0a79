"""What the planner says of runs that save memory beside what they took: real steps, each run in a process of its own.

    python benchmarks/plan_lean.py [unseen | fitted | both] [--json FILE]

As `plan_memory.py`, for blocks computed again, 8 bits, APOLLO, weights in bf16, the fused backward pass, offloading and
a heap that gives back what is freed, whose two constants were found on FITTED like that of a rehearsal
(`ronna.plan.heap`).
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from ronna.plan.memory import estimate
from ronna.plan.shapes import Adapter, Lengths
from ronna.plan.stretches import Step
from ronna.plan.weights import Optimizer
from ronna.trial import Subject, trial

MIB = 2**20
RESULTS = Path(__file__).parent / "results" / "plan_lean.jsonl"
EIGHT, APOLLO, MINI = Optimizer("adamw8bit"), Optimizer("apollo"), Optimizer("apollo", rank=1)
BARE: dict[str, Any] = {"fused_backward": True, "clip": False}


class Case(NamedTuple):
    model: str
    task: str
    sequences: int
    length: int
    ways: dict[str, Any]
    settings: dict[str, Any] | None = None
    compute: str = "bf16"


FITTED = [
    Case("llama-60m", "clm", 4, 128, {"optimizer": EIGHT, "weights": "bf16", "blocks": 8, **BARE}),
    Case("llama-60m", "clm", 4, 128, {"weights": "bf16", "offload": ("optimizer",), "blocks": 8, **BARE}),
    Case("llama-60m", "clm", 8, 256, {"tight": True}),
    Case("llama-60m", "clm", 8, 256, {"tight": True, "blocks": 4, "feeds": 4}),
    Case("gpt2", "clm", 2, 256, {"optimizer": MINI, "weights": "bf16", "blocks": 4, **BARE}, {"n_layer": 4}),
    Case("bert-small", "mlm", 16, 128, {"optimizer": EIGHT}),
    Case("bert-medium", "mlm", 16, 128, {"blocks": 8}),
    Case("bert-medium", "mlm", 8, 256, {"feeds": 8}, compute="fp32"),
    Case("llama-60m", "clm", 4, 256, {"blocks": 8}),
    Case("t5-small", "denoise", 4, 128, {"offload": ("optimizer", "activations"), "tight": True}, {"num_layers": 3}),
]
UNSEEN = [
    Case("bert-base", "mlm", 8, 128, {"blocks": 6}, {"num_hidden_layers": 6}),
    Case("roberta-base", "mlm", 4, 256, {"blocks": 3}, {"num_hidden_layers": 4, "vocab_size": 30000}, compute="fp32"),
    Case("modernbert-mini", "mlm", 32, 256, {"blocks": 2, "feeds": 2}),
    Case("gpt2", "clm", 2, 512, {"feeds": 6}, {"n_layer": 6}),
    Case("llama-130m", "clm", 4, 128, {"blocks": 6, "micro_batches": 2}, {"num_hidden_layers": 8}),
    Case("t5-small", "denoise", 16, 128, {"blocks": 12}),
    Case("llama-130m", "clm", 4, 128, {"optimizer": EIGHT, "weights": "bf16", "blocks": 12, **BARE}),
    Case("llama-130m", "clm", 2, 256, {"weights": "bf16", "tight": True, "blocks": 6}),
    Case("gpt2", "clm", 4, 128, {"fused_backward": True, "feeds": 6}, {"n_layer": 6}),
    Case("gpt2", "clm", 2, 256, {"offload": ("optimizer",), "tight": True}, {"n_layer": 8}),
    Case("bert-base", "classify", 8, 128, {"optimizer": APOLLO}, {"num_hidden_layers": 6}),
    Case("bert-base", "classify", 16, 128, {"adapter": Adapter(8), "tight": True}),
    Case("modernbert-base", "mlm", 4, 256, {"optimizer": EIGHT, "blocks": 6}, {"num_hidden_layers": 8}),
    Case("t5-small", "denoise", 8, 128, {"weights": "bf16", "optimizer": Optimizer("adafactor")}),
    Case("llama-60m", "clm", 16, 128, {"offload": ("activations",), "tight": True}, compute="fp32"),
    Case("qwen3-0.6b", "clm", 1, 256, {"optimizer": MINI, "weights": "bf16", "blocks": 4, **BARE},
         {"num_hidden_layers": 4, "vocab_size": 32000}),
]  # fmt: skip


def planned(case: Case) -> Step:
    whole = Lengths(case.sequences, case.length)
    lengths = Lengths(case.sequences, case.length // 4) if case.task == "denoise" else whole
    return Step(
        lengths,
        source=whole if case.task == "denoise" else None,
        predicted=case.sequences * round(0.15 * case.length) if case.task == "mlm" else None,
        compute=case.compute,  # type: ignore[arg-type]
        **case.ways,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="?", choices=["unseen", "fitted", "both"], default="unseen")
    parser.add_argument("--json", type=Path, default=RESULTS, help="lines for plan_plot.py")
    a = parser.parse_args()
    errors, lines = [], []
    for case in {"unseen": UNSEEN, "fitted": FITTED, "both": FITTED + UNSEEN}[a.which]:
        step = planned(case)
        subject = Subject(case.model, case.settings or {}, case.task, case.task in ("mlm", "clm", "denoise"))
        taken, peak = trial(subject, step), estimate(subject.shape()[1], step).peak
        if taken is None:
            raise SystemExit(f"{case.model}: no memory left")
        errors.append(peak / taken.grown - 1)
        said = ", ".join(f"{key}={value}" for key, value in case.ways.items())
        figures = f"planned {peak / MIB:7.0f}  measured {taken.grown / MIB:7.0f} MiB  {errors[-1]:+7.1%}"
        print(f"{case.model:16} {figures}  {case.sequences} x {case.length} {said}", flush=True)
        name = f"{case.model} {case.sequences} x {case.length} {said}"
        lines.append({"name": name, "planned": peak, "measured": taken.grown, "fitted": case in FITTED})
    a.json.parent.mkdir(parents=True, exist_ok=True)
    a.json.write_text("".join(json.dumps(line) + "\n" for line in lines))
    worst = max(map(abs, errors))
    print(f"{len(errors)} runs: mean error {statistics.mean(map(abs, errors)):.1%}, worst {worst:.1%}")


if __name__ == "__main__":
    main()
