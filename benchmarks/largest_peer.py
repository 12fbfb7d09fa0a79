"""The largest model that Hugging Face's Trainer trains under an enforced limit: the peer of `largest.py`.

    python benchmarks/largest_peer.py --memory 4GiB [--flags default | best | single | narrow]
                                      [--model llama-130m] [--task clm | classify]
                                      [--batch 4] [--length 128] [--steps 5]

Sizes are those of `largest.py`. Found by bisection, each try a process of its own in a control group. default: the
Trainer as it comes; best: gradient checkpointing, Adafactor, bf16; single: the same without bf16, which takes ten times
as long on a processor that has no instructions for it; narrow: best with weights held in bf16 too, whose
steps are rounded away where they are small. Where it helps, rows go through one at a time, with accumulation. Prints a
JSON line a run. Needs transformers and accelerate (the extra `bench`), Linux, and the right to make a control group.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from largest import ROOT, VOCAB, inside, limited

from ronna.asked import PlanRun, published
from ronna.plan.hardware import parse_bytes
from ronna.plan.scaling import largest
from ronna.verbs.plan import ladder

FLAGS: dict[str, dict[str, Any]] = {
    "default": {},
    "best": {"gradient_checkpointing": True, "optim": "adafactor", "bf16": True},
    "single": {"gradient_checkpointing": True, "optim": "adafactor"},
    "narrow": {"gradient_checkpointing": True, "optim": "adafactor", "bf16": True},
}
TRIED = 3  # steps of a try; the first makes the optimizer's states


def train(settings: dict[str, Any], a: argparse.Namespace) -> dict[str, float]:
    import torch
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    narrow = a.flags == "narrow"
    torch.set_default_dtype(torch.bfloat16 if narrow else torch.float32)
    tuning = a.task == "classify"
    model = (
        BertForSequenceClassification(BertConfig(**settings))
        if tuning
        else LlamaForCausalLM(LlamaConfig(**settings, use_cache=False))
    )
    torch.set_default_dtype(torch.float32)
    ids = torch.randint(settings["vocab_size"], (a.batch * a.tries, a.length)).tolist()
    micro = a.batch if a.flags == "default" else 1
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, use_cpu=True, max_steps=a.tries, per_device_train_batch_size=micro, report_to=[], save_strategy="no",
            gradient_accumulation_steps=a.batch // micro, disable_tqdm=True, **FLAGS[a.flags],
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": i % 2 if tuning else row} for i, row in enumerate(ids)]
        Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"step_seconds": (ends[-1] - ends[0]) / (len(ends) - 1), "peak": int(peak.split()[1]) * 1024}


def tried(a: argparse.Namespace, settings: dict[str, Any], group: Path, steps: int) -> dict[str, Any]:
    command = [*inside(group), sys.executable, __file__]
    own = [
        "--flags",
        a.flags,
        "--task",
        a.task,
        "--batch",
        str(a.batch),
        "--length",
        str(a.length),
        "--tries",
        str(steps),
    ]
    done = subprocess.run([*command, *own, "--one", json.dumps(settings)], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]
    return {"code": done.returncode, "said": done.stderr.strip().splitlines()[-1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--flags", choices=list(FLAGS), default="default")
    parser.add_argument("--model", default="llama-130m")
    parser.add_argument("--task", choices=["clm", "classify"], default="clm")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tries", type=int, default=TRIED, help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        return print(json.dumps(train(json.loads(a.one), a)))
    if not os.access(ROOT, os.W_OK):
        return print("skipped: needs the right to make a control group of memory")
    question = PlanRun(model=a.model, vocab=VOCAB)
    sizes = ladder(question, published(question, a.model)[1])
    with limited(parse_bytes(a.memory)) as group:

        def fits(i: int) -> bool:
            found = tried(a, sizes[i][0] | {"vocab_size": VOCAB}, group, TRIED)
            print(json.dumps({"flags": a.flags, "tried": sizes[i][1].params()} | found), flush=True)
            return "step_seconds" in found

        # What fits holds 2 bytes a weight at the least, and what would hold 20 bytes of each does.
        low = next(i for i, (_, cfg) in enumerate(sizes) if cfg.params() >= parse_bytes(a.memory) / 40)
        high = next(i for i, (_, cfg) in enumerate(sizes) if cfg.params() >= parse_bytes(a.memory) / 2)
        most = largest(high - low, lambda i: fits(low + i))
        if most is None:
            return print(json.dumps({"flags": a.flags, "largest": None}))
        settings, cfg = sizes[low + most]
        found = tried(a, settings | {"vocab_size": VOCAB}, group, a.steps)
        tokens = a.batch * a.length / found["step_seconds"] if "step_seconds" in found else None
        print(json.dumps({"flags": a.flags, "largest": cfg.params(), "tokens_per_second": tokens} | found))


if __name__ == "__main__":
    main()
