"""The largest model under an enforced limit: what the planner says, whether it trains, and what a larger one does.

    python benchmarks/largest.py --memory 2GiB [--model llama-130m] [--batch 4] [--length 128] [--steps 10] [--bisect]
    python benchmarks/largest.py --memory 4GiB --model bert-base --task classify --length 512

The planner is asked with `--largest --probe`, its run file is trained for some steps in a control group that may hold
no more, and so are models of the same family, larger by 5%, with the same settings. With --task classify encoders are
fine-tuned, new weights on texts that are all as long as may be. With --bisect the largest of the
family that trains there is found by real runs of three steps, between the largest that is known to train and the
smallest that is known not to. Needs Linux and the right to make a control group.
Prints a JSON line a run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memory import shards

from ronna.asked import PlanRun, published
from ronna.base.config import build, dump_toml, read_toml
from ronna.model.recompute import Recompute
from ronna.plan.hardware import parse_bytes
from ronna.plan.scaling import largest
from ronna.runfile import FinetuneRun, PretrainRun
from ronna.verbs.plan import ladder, plan

ROOT = Path("/sys/fs/cgroup")
AnyRun = PretrainRun | FinetuneRun
VOCAB = 8192


def libraries() -> int:
    """Bytes of libraries that a process which trains holds: they lie in pages of files."""
    code = "import ronna.run; print(open('/proc/self/status').read())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return next(int(line.split()[1]) * 1024 for line in said.splitlines() if line.startswith("RssFile:"))


@contextmanager
def limited(size: int) -> Iterator[Path]:
    """A control group of memory, of either version, whose processes may hold so many bytes and no swap.

    Libraries are counted where they were read first, which is here and not in the group, so that it would be given
    their bytes for nothing.
    """
    v1 = (ROOT / "memory").is_dir()
    group = (ROOT / "memory" if v1 else ROOT) / f"ronna-{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(size - libraries()))
    try:
        yield group
    finally:
        group.rmdir()


def inside(group: Path) -> list[str]:
    """What is put before a command for it to run in the group."""
    return ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh"]


def texts(folder: Path, rows: int) -> dict[str, str]:
    """A tokenizer and labelled texts of some 700 words: what a question about fine-tuning names."""
    from ronna import api
    from ronna.demo.corpus import build_corpus

    build_corpus(folder / "corpus")
    words = {"kind": "wordpiece", "vocab": VOCAB}
    api.train_tokenizer(out=str(folder / "tokenizer"), input=[str(folder / "corpus" / "text")], tokenizer=words)
    known = [line for path in sorted((folder / "corpus" / "text").rglob("*")) if path.is_file()
             for line in path.read_text().split()]  # fmt: skip
    for split, count in (("train", rows), ("validation", 4)):
        some = [{"text": " ".join(known[700 * i : 700 * (i + 1)]), "label": "ab"[i % 2]} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return {"tokenizer": str(folder / "tokenizer"), "data": str(folder / "train.jsonl")}


def in_short(run: AnyRun, folder: Path, out: Path, steps: int) -> AnyRun:
    """Judged and saved once, at the end: a checkpoint of such a model is gigabytes."""
    train = run.train.model_copy(update={"steps": steps, "evaluate_every": steps, "save_every": steps})
    if isinstance(run, PretrainRun):
        held: dict[str, Any] = {"validation_rows": 4}
    else:
        held = {"validation": str(folder / "validation.jsonl"), "allow_overlap": True}
    data = run.data.model_copy(update=held)
    return run.model_copy(update={"out": str(out), "train": train, "data": data})


def trained(run: AnyRun, folder: Path, group: Path, steps: int) -> dict[str, Any]:
    """What becomes of a run within the group."""
    out = folder / f"run-{time.time_ns()}"
    path = folder / "limited.toml"
    path.write_text(dump_toml(in_short(run, folder, out, steps)))
    command = [*inside(group), sys.executable, "-m", "ronna"]
    began = time.perf_counter()
    done = subprocess.run([*command, run.verb, str(path)], capture_output=True, text=True, check=False)
    found: dict[str, Any] = {"code": done.returncode, "seconds": round(time.perf_counter() - began, 1)}
    if done.returncode == 0:
        report = json.loads((out / "report.json").read_text())
        found |= {"peak": report["memory"]["peak_bytes"], "planned": report["memory"]["planned_bytes"]}
        found["step_seconds"] = round(report["train"]["seconds"] / steps, 2)
        found["tokens_per_second"] = report["train"]["tokens_per_second"]
    else:
        found["said"] = done.stderr.strip().splitlines()[-2:]
    subprocess.run(["rm", "-rf", str(out)], check=True)
    return found


def as_many_kept(run: AnyRun, settings: dict[str, Any]) -> Recompute:
    """The blocks that a plan computes again, of a model of another depth: as many are kept as in the plan's."""
    planned, layers = run.train.recompute, "num_hidden_layers"
    if planned.blocks == "all":
        return planned
    kept = int(run.model.settings[layers]) - planned.blocks
    return Recompute(blocks=max(0, settings[layers] - kept), feeds=planned.feeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--model", default="llama-130m")
    parser.add_argument("--task", choices=["clm", "classify"], default="clm")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--bisect", action="store_true")
    a = parser.parse_args()
    if not os.access(ROOT, os.W_OK):
        print("skipped: needs the right to make a control group of memory")
        return
    with tempfile.TemporaryDirectory() as name, limited(parse_bytes(a.memory)) as group:
        folder = Path(name)
        question: dict[str, Any] = {"model": a.model, "memory": a.memory, "hardware": "cpu", "batch": a.batch}
        question |= {"length": a.length, "largest": True, "probe": True, "task": a.task}
        question |= {"write": f"{folder}/plan.toml", "out": f"{folder}/out"}
        tuning = a.task == "classify"
        question |= texts(folder, a.batch * a.steps) if tuning else {"vocab": VOCAB, "data": shards(folder)}
        asked = build(PlanRun, question, where="largest")
        answer = plan(asked)
        best = answer["plans"][0]
        print(json.dumps({"planned": answer["parameters"], "way": best["name"], "peak": best["peak_bytes"],
                          "tried": answer["tried"]}), flush=True)  # fmt: skip
        kind: type[AnyRun] = FinetuneRun if tuning else PretrainRun
        run: AnyRun = build(kind, read_toml(f"{folder}/plan.toml"), where="plan.toml")
        sizes = ladder(asked, published(asked, a.model)[1])
        planned = next(i for i, (settings, _) in enumerate(sizes) if settings == run.model.settings)
        known: dict[int, bool] = {}  # whether a size trains

        def at(i: int, steps: int) -> None:
            model = run.model.model_copy(update={"settings": sizes[i][0]})
            train = run.train.model_copy(update={"recompute": as_many_kept(run, sizes[i][0])})
            found = trained(run.model_copy(update={"model": model, "train": train}), folder, group, steps)
            print(json.dumps({"run": sizes[i][1].params(), "settings": sizes[i][0]} | found), flush=True)
            known[i] = found["code"] == 0

        def trains(i: int) -> bool:
            if i not in known:
                at(i, 3)
            return known[i]

        def larger(share: float) -> int:
            return next(i for i, (_, cfg) in enumerate(sizes) if cfg.params() >= share * sizes[planned][1].params())

        at(planned, a.steps)
        at(larger(1.05), a.steps)
        if a.bisect:
            low = planned if known[planned] else larger(0.9)
            high = larger(1.2) if known[larger(1.05)] else larger(1.05)
            most = largest(high + 1 - low, lambda i: trains(low + i))
            print(json.dumps({"bisection": None if most is None else sizes[low + most][1].params()}))


if __name__ == "__main__":
    main()
