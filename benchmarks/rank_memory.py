"""What a rank of several holds, planned and measured: real runs of ranks on this machine, a thread each.

    python benchmarks/rank_memory.py [--data SHARDS] [--only NAME ...] [--steps 4]

Llamas are pre-trained, without --data on the text that every Python installation carries. Planned and measured is by
how much rank 0 grows over what it held when the run was planned, as each run notes it for plans to come. Needs Linux.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from memory import shards

from ronna.base.device import describe


class Case(NamedTuple):
    ranks: int
    parallel: dict[str, int | bool]
    batch: int  # rows of a rank that divides none with others
    length: int
    precision: str = "fp32"
    layers: int = 12
    micro_batch: int | None = None


CASES = {
    "alone": Case(1, {}, 16, 128),
    "two shards": Case(2, {}, 16, 128),
    "two shards, bf16": Case(2, {}, 16, 128, "bf16"),
    "four shards": Case(4, {}, 16, 128),
    "four shards, fewer tokens": Case(4, {}, 4, 64),
    "two to a block": Case(2, {"tensor": 2}, 16, 128),
    "two to a block, whole rows": Case(2, {"tensor": 2, "sequence": False}, 16, 128),
    "two shards x two to a block": Case(4, {"tensor": 2}, 8, 128),
    "two stages": Case(2, {"pipeline": 2}, 16, 128, layers=8, micro_batch=4),
    "long, alone": Case(1, {}, 2, 1024, layers=4),
    "two to a text": Case(2, {"context": 2}, 2, 1024, layers=4),
    "four to a text": Case(4, {"context": 4}, 2, 1024, layers=4),
    "two to a text x two to a block": Case(4, {"context": 2, "tensor": 2}, 2, 1024, layers=4),
    "two shards x two to a text": Case(4, {"context": 2}, 2, 1024, layers=4),
}


def measured(case: Case, steps: int, data: str, folder: Path) -> tuple[int, int]:
    settings = {"hidden_size": 768, "num_hidden_layers": case.layers, "intermediate_size": 2048}
    settings |= {"num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 1024}
    together = case.parallel.get("tensor", 1) * case.parallel.get("context", 1) * case.parallel.get("pipeline", 1)
    asked = {
        "data": {"train": data, "validation_rows": 8},
        "model": {"name": "llama-tiny", "settings": settings},
        "objective": {"kind": "clm"},
        "parallel": case.parallel,
        "train": {
            "steps": steps, "batch": case.batch * case.ranks // together, "micro_batch": case.micro_batch or case.batch,
            "length": case.length, "precision": case.precision, "evaluate_every": 10**6, "save_every": 10**6,
        },
    }  # fmt: skip
    options = [
        option
        for room, values in asked.items()
        for key, value in values.items()
        for option in ("--set", f"{room}.{key}={json.dumps(value) if not isinstance(value, dict) else inline(value)}")
    ]
    command = [sys.executable, "-m", "ronna", "pretrain", "--out", str(folder / "run"), *options]
    command += ["--nproc", str(case.ranks)] if case.ranks > 1 else []
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    line = json.loads((folder / "cache" / "ronna" / "plans.jsonl").read_text().splitlines()[-1])
    return line["planned"], line["measured"]


def inline(values: dict[str, int | bool]) -> str:
    return "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in values.items()) + "}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--data")
    parser.add_argument("--steps", type=int, default=4)
    a = parser.parse_args()
    misses = []
    with tempfile.TemporaryDirectory() as home:
        data = a.data or shards(Path(home))
        for name in a.only:
            if CASES[name].precision == "bf16" and not describe("cpu").bf16_fast:
                print(f"{name}: left out, this CPU has no bf16 instructions", file=sys.stderr)
                continue
            with tempfile.TemporaryDirectory() as folder:
                planned, grown = measured(CASES[name], a.steps, data, Path(folder))
            misses.append(grown / planned - 1)
            print(json.dumps({"name": name, "planned_mib": planned >> 20, "grown_mib": grown >> 20}), flush=True)
            print(f"{name}: planned {planned >> 20:,} MiB, took {grown >> 20:,} ({misses[-1]:+.1%})", file=sys.stderr)
    if not misses:
        return
    mean, worst = statistics.mean(map(abs, misses)), max(misses, key=abs)
    print(f"{len(misses)} runs: {mean:.1%} off on average, {worst:+.1%} at the most", file=sys.stderr)


if __name__ == "__main__":
    main()
