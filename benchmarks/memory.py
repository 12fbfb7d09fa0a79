"""What each way to save memory saves, what time it takes, and what it does to the loss.

    python benchmarks/memory.py [--data SHARDS] [--model llama-tiny] [--hidden 512] [--layers 8] [--steps 60]
                                [--rows 8] [--length 256] [--seeds 1] [--ways NAME ...] [--plot FILE.svg]
    python benchmarks/memory.py --read LINES.jsonl [--plot FILE.svg]

A decoder is pre-trained in each way from the same seeds on the same rows, each run in a process of its own. Prints a
JSON line a run: growth of the process's memory over what it was before, median seconds of a step, held-out loss. Then
a table beside plain AdamW in fp32, and a drawing of the memory. Without --data: the text that every Python
installation carries. With --read: of lines that were printed before.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

EIGHT_BIT, APOLLO = {"kind": "adamw8bit"}, {"kind": "apollo"}
MINI = APOLLO | {"rank": 1, "scope": "tensor"}
UNCLIPPED = {"fused_backward": True, "clip": 0}
ALL_BLOCKS = {"recompute": {"blocks": "all"}}
WAYS: dict[str, dict[str, Any]] = {
    "AdamW, fp32": {},
    "feed-forwards computed again": {"train": {"recompute": {"feeds": "all"}}},
    "blocks computed again": {"train": ALL_BLOCKS},
    "activations on disk": {"train": {"offload": ["activations"]}},
    "fused backward, clipped": {"train": {"fused_backward": True}},
    "fused backward, unclipped": {"train": UNCLIPPED},
    "AdamW in 8 bits": {"optim": EIGHT_BIT},
    "APOLLO": {"optim": APOLLO},
    "APOLLO of rank 1": {"optim": MINI},
    "Adafactor": {"optim": {"kind": "adafactor", "lr": 1e-2}},
    "optimizer on disk": {"train": {"offload": ["optimizer"]}},
    "weights in bf16": {"train": {"weights": "bf16"}},
    "8 bits, fused, bf16, blocks again": {
        "optim": EIGHT_BIT,
        "train": {"weights": "bf16"} | UNCLIPPED | ALL_BLOCKS,
    },
    "APOLLO of rank 1, fused, bf16, blocks again": {
        "optim": MINI,
        "train": {"weights": "bf16"} | UNCLIPPED | ALL_BLOCKS,
    },
}


def shards(folder: Path) -> str:
    from ronna import api
    from ronna.demo.corpus import build_corpus

    build_corpus(folder / "corpus")
    text = [str(folder / "corpus" / "text")]
    api.train_tokenizer(out=str(folder / "tokenizer"), input=text, tokenizer={"kind": "bpe", "vocab": 8192})
    api.prepare(out=str(folder / "shards"), input=text, tokenizer=str(folder / "tokenizer"))
    return str(folder / "shards" / "train")


def run(a: argparse.Namespace, way: str, seed: int, out: str) -> dict[str, Any]:
    import torch  # noqa: F401 - what libraries hold is there before the run

    import ronna
    from ronna.base.device import peak_resident_bytes, resident_bytes

    before, asked = resident_bytes(), WAYS[way]
    heads = max(1, a.hidden // 64)
    settings = {"hidden_size": a.hidden, "num_hidden_layers": a.layers, "intermediate_size": a.hidden * 8 // 3}
    settings |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    report = ronna.pretrain(
        out=out,
        seed=seed,
        model={"name": a.model, "settings": settings},
        data={"train": a.data, "validation_rows": 64},
        objective={"kind": "clm"},
        optim={"kind": "adamw", "lr": a.lr} | ({"lr": a.lr} | asked.get("optim", {})),
        schedule={"kind": "linear", "warmup": 0.1},
        train={
            "steps": a.steps, "batch": a.rows, "length": a.length, "log_every": 1, "evaluate_every": a.steps,
            "save_every": 10**9, **asked.get("train", {}),
        },
    )  # fmt: skip
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line][2:]
    return {
        "way": way,
        "seed": seed,
        "parameters": report["parameters"],
        "grown_mib": (peak_resident_bytes() - before) / 2**20,
        "step_seconds": a.rows * a.length / statistics.median(rates),
        "loss": report["validation"]["loss"]["value"],
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--model", default="llama-tiny")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--read", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "SEED"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    a = arguments()
    if a.read:
        lines = [json.loads(line) for line in a.read.read_text().splitlines() if line.startswith("{")]
        draw_and_show({way: [one for one in lines if one["way"] == way] for way in WAYS}, a.plot)
        return
    with tempfile.TemporaryDirectory() as folder:
        if a.one:
            print(json.dumps(run(a, a.one[0], int(a.one[1]), f"{folder}/run")))
            return
        data = a.data or shards(Path(folder))
        found: dict[str, list[dict[str, Any]]] = {}
        for seed in range(a.seeds):
            for way in a.ways:
                command = [sys.executable, __file__, *sys.argv[1:], "--data", data, "--one", way, str(seed)]
                line = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
                print(line, flush=True)
                found.setdefault(way, []).append(json.loads(line))
    draw_and_show(found, a.plot)


def draw_and_show(found: dict[str, list[dict[str, Any]]], plot: Path | None) -> None:
    found = {way: some for way, some in found.items() if some}
    show(found)
    if plot is not None:
        plot.write_text(drawing(found), encoding="utf-8")


def drawing(found: dict[str, list[dict[str, Any]]]) -> str:
    """A bar a way, as SVG; the same figures give the same text."""
    from io import StringIO

    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.8, 0.34 * len(found) + 0.6))
    axes, buffer = figure.add_axes((0, 0, 1, 1)), StringIO()
    sizes = [statistics.mean(one["grown_mib"] for one in some) for some in found.values()]
    bars = axes.barh(list(found), sizes, color="#2563eb", height=0.6)
    axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"MiB, {next(iter(found.values()))[0]['parameters'] / 1e6:,.1f} M parameters")
    axes.spines[["top", "right"]].set_visible(False)
    with rc_context({"svg.hashsalt": "ronna", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    def mean(way: str, key: str) -> float:
        return statistics.mean(one[key] for one in found[way])

    first = next(iter(found))
    print(f"| way | memory, MiB | of {first} | time a step | loss |\n| --- | --- | --- | --- | --- |")
    for way in found:
        memory, seconds = mean(way, "grown_mib"), mean(way, "step_seconds")
        share, slower = memory / mean(first, "grown_mib"), seconds / mean(first, "step_seconds")
        print(f"| {way} | {memory:,.0f} | {share:.0%} | {seconds:.2f} s, {slower:.2f}x | {mean(way, 'loss'):.3f} |")


if __name__ == "__main__":
    main()
