"""Fine-tuning a classifier with ours beside Hugging Face's Trainer: same folder, rows, epochs, batch and rate.

    python benchmarks/finetune.py --model FOLDER --data FOLDER_OF_SPLITS [--limit 4000] [--epochs 1] [--rounds 1]

The Trainer runs at its best: bf16 where the machine is fast at it, dynamic padding, rows grouped by length, fused
AdamW. Each side has its own process; the rate counts training alone. Prints one JSON line a side and round, then the
ratio. Needs transformers, datasets and accelerate (the extra `bench`).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ronna.base.device import choose_precision
from ronna.data.badrows import BadRows
from ronna.data.sources import find_splits, read_records

LENGTH, BATCH, RATE = 128, 32, 5e-5


def rows(data: str, split: str, limit: int | None) -> list[dict[str, Any]]:
    found = [r.fields for r in read_records(find_splits(data)[split], bad=BadRows())]
    return found[:limit]


def ours(a: argparse.Namespace, out: str) -> dict[str, float]:
    import ronna

    report = ronna.finetune(
        out=f"{out}/ours",
        model={"name": a.model},
        data={"train": a.data, "allow_overlap": True} | ({"limit": a.limit} if a.limit else {}),
        optim={"kind": "adamw", "lr": RATE},
        schedule={"kind": "linear", "warmup": 50},
        train={"epochs": a.epochs, "batch": BATCH, "length": LENGTH, "evaluate_every": 10**9},
    )
    count = len(rows(a.data, "train", a.limit)) * a.epochs
    return {"rows_per_second": count / report["train"]["seconds"], "accuracy": report["test"]["accuracy"]["value"]}


def theirs(a: argparse.Namespace, out: str) -> dict[str, float]:
    from datasets import Dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    train, test = rows(a.data, "train", a.limit), rows(a.data, "test", None)
    names = sorted({str(r["label"]) for r in train})
    tokenizer = AutoTokenizer.from_pretrained(a.model)

    def encode(some: list[dict[str, Any]]) -> Dataset:
        inputs = tokenizer([r["text"] for r in some], truncation=True, max_length=LENGTH)
        return Dataset.from_dict({**inputs, "labels": [names.index(str(r["label"])) for r in some]})

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = TrainingArguments(
        output_dir=out,
        num_train_epochs=a.epochs,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=64,
        learning_rate=RATE,
        warmup_steps=50,
        bf16=choose_precision("auto", device)[0] is torch.bfloat16,
        optim="adamw_torch_fused",
        use_cpu=device.type == "cpu",
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(a.model, num_labels=len(names)),
        args=settings,
        train_dataset=encode(train),
        eval_dataset=encode(test),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    return {"rows_per_second": len(train) * a.epochs / seconds, "accuracy": trainer.evaluate()["eval_accuracy"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--side", choices=["ours", "hf"])
    a = parser.parse_args()
    if not (a.model and a.data and Path(a.model).is_dir() and Path(a.data).is_dir()):
        print("skipped: name a model folder and a folder of splits with --model and --data")
        return
    if a.side:
        with tempfile.TemporaryDirectory() as out:
            found = ours(a, out) if a.side == "ours" else theirs(a, out)
        print(json.dumps({"side": a.side, **{k: round(v, 4) for k, v in found.items()}}))
        return
    speeds: dict[str, list[float]] = {}
    for _ in range(a.rounds):
        for side in ("ours", "hf"):
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            print(line, flush=True)
            speeds.setdefault(side, []).append(json.loads(line)["rows_per_second"])
    ours_median, theirs_median = (statistics.median(speeds[s]) for s in ("ours", "hf"))
    print(json.dumps({"ours / hf": round(ours_median / theirs_median, 2)}))


if __name__ == "__main__":
    main()
