"""Fine-tuning with ours beside Hugging Face's Trainer: same folder, rows, epochs, batch and rate.

    python benchmarks/finetune.py --model FOLDER --data FOLDER_OF_SPLITS [--task tag] [--limit 4000] [--epochs 1]
                                  [--peft lora [--quantize nf4]] [--lr 5e-5] [--length 128] [--rounds 1]
                                  [--side ours]

The Trainer runs at its best (`peers/trainer.py`); where the peft library lacks a method, ours runs alone. Each side
has its own process; the rate counts training alone, the peak of memory is the process's. Prints one JSON line a side
and round, then the ratio. Needs transformers, accelerate and, for adapters, peft (the extra `bench`).
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ronna.data.badrows import BadRows
from ronna.data.sources import find_splits, read_records
from ronna.tasks.base import unfolded
from ronna.tasks.table import TASKS

# What of ours the peft library has for a task. Its prompts do not move the labels of tokens behind virtual ones.
PEERS = {"lora", "adalora", "prompt", "prefix"}
UNMOVED = {"tag", "span_qa"}
METRICS = {"classify": "accuracy", "tag": "f1", "relation": "macro_f1", "span_qa": "f1"}


def rows(a: argparse.Namespace, split: str, limit: int | None) -> list[dict[str, Any]]:
    bad = BadRows()
    records = unfolded(TASKS[a.task], read_records(find_splits(a.data)[split], bad=bad), bad)
    return [r.fields for r in records][:limit]


def ours(a: argparse.Namespace, out: str) -> dict[str, float]:
    import ronna

    more: dict[str, Any] = {"peft": {"kind": a.peft}} if a.peft else {}
    report = ronna.finetune(
        out=f"{out}/ours",
        seed=a.seed,
        model={"name": a.model, "quantize": a.quantize},
        data={"train": a.data, "allow_overlap": True, "max_bad_rows": 1000} | ({"limit": a.limit} if a.limit else {}),
        task={"kind": a.task},
        optim={"kind": "adamw", "lr": a.lr},
        schedule={"kind": "linear", "warmup": 50},
        train={"epochs": a.epochs, "batch": a.batch, "length": a.length, "evaluate_every": 10**9},
        **more,
    )
    seconds, metric = report["train"]["seconds"], METRICS[a.task]
    count = min(a.limit or 10**9, report["data"]["kept"]) * a.epochs
    return {"seconds": seconds, "rows_per_second": count / seconds, metric: report["test"][metric]["value"]}


def lacking(a: argparse.Namespace) -> str | None:
    """Why there is no peer for this adapter."""
    if a.peft and a.peft not in PEERS:
        return f"peft has no {a.peft}"
    return f"peft's prompt tuning cannot learn {a.task}" if a.peft == "prompt" and a.task in UNMOVED else None


def theirs(a: argparse.Namespace, out: str) -> dict[str, float]:
    from peers import trainer

    return trainer.run(a, out, rows(a, "train", a.limit), rows(a, "test", None))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--task", choices=sorted(METRICS), default="classify")
    parser.add_argument("--peft", choices=["lora", "adalora", "houlsby", "bitfit", "prompt", "prefix"])
    parser.add_argument("--quantize", choices=["nf4", "nf4_double"], help="of ours; the Trainer's weights stay wide")
    parser.add_argument("--limit", type=int, help="training rows")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--side", choices=["ours", "hf"])
    return parser.parse_args()


def main() -> None:
    a = arguments()
    if not (a.model and a.data and Path(a.model).is_dir() and Path(a.data).is_dir()):
        print("skipped: name a model folder and a folder of splits with --model and --data")
        return
    alone = lacking(a)
    if alone and a.side != "ours":
        print(f"hf: skipped: {alone}", flush=True)
        if a.side:
            return
    if a.side:
        with tempfile.TemporaryDirectory() as out:
            found = ours(a, out) if a.side == "ours" else theirs(a, out)
        found["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"side": a.side, **{k: round(v, 4) for k, v in found.items()}}))
        return
    speeds: dict[str, list[float]] = {}
    for _ in range(a.rounds):
        for side in ("ours",) if alone else ("ours", "hf"):
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            print(line, flush=True)
            speeds.setdefault(side, []).append(json.loads(line)["rows_per_second"])
    if alone:
        return
    ours_median, theirs_median = (statistics.median(speeds[s]) for s in ("ours", "hf"))
    print(json.dumps({"ours / hf": round(ours_median / theirs_median, 2)}))


if __name__ == "__main__":
    main()
