"""What each phase of a run holds at most: reading the model, checks, steps, evaluation, saving, testing, resuming.

    python benchmarks/phases.py [--case NAME ...] [--base FOLDER --train FILE] [--hidden 512] [--layers 8] [--rows 2]

Each run is cut after three steps and resumed, in another process, for three more. The heap is not kept there
(`ronna.base.heap`) and large blocks go back to the system at once, so that resident memory is what is alive; its
highest point is set back between phases (`VmHWM`, Linux). Every process first trains a tiny model for a step, so that
what libraries load once is there before. Prints a line a run: MiB over that.
Cases that fine-tune need --base, a folder with an encoder, and --train, a file of labelled texts.
"""

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from memory import shards

LEAN = {"weights": "bf16", "fused_backward": True, "clip": 0, "recompute": {"blocks": "all"}}
CASES: dict[str, dict[str, Any]] = {
    "pretrain": {"verb": "pretrain"},
    "pretrain lean": {"verb": "pretrain", "train": LEAN, "optim": {"kind": "adamw8bit"}},
    "pretrain offloaded": {"verb": "pretrain", "train": {"offload": ["optimizer"]}},
    "finetune": {"verb": "finetune"},
    "finetune lean": {"verb": "finetune", "train": LEAN, "optim": {"kind": "adamw8bit"}},
    "finetune offloaded": {"verb": "finetune", "train": {"offload": ["optimizer"]}},
    "finetune LoRA": {"verb": "finetune", "peft": {"kind": "lora"}},
}
# Blocks from 64 KiB on are mapped by themselves, and what is free at the end of the heap goes back.
HONEST = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000", "MALLOC_TRIM_THRESHOLD_": "65536"}
STEPS = 3  # before the cut, and after it


class Watch:
    """The highest point of resident memory by phase; phases within another one are not part of it."""

    def __init__(self) -> None:
        self.most: dict[str, int] = {}
        self.now = "between"
        Path("/proc/self/clear_refs").write_text("5")

    def switch(self, name: str) -> str:
        from ronna.base.device import peak_resident_bytes

        before, self.now = self.now, name
        self.most[before] = max(self.most.get(before, 0), peak_resident_bytes())
        Path("/proc/self/clear_refs").write_text("5")
        return before

    def over(self, owner: Any, name: str, phase: str) -> None:
        """Count every call of a function as a phase."""
        function: Callable[..., Any] = getattr(owner, name)

        def watched(*inputs: Any, **named: Any) -> Any:
            outside = self.switch(phase)
            try:
                return function(*inputs, **named)
            finally:
                self.switch(outside)

        setattr(owner, name, watched)


def settings(a: argparse.Namespace, case: dict[str, Any], out: str, tiny: bool = False) -> dict[str, Any]:
    steps = 1 if tiny else 2 * STEPS
    train = {"steps": steps, "length": a.length, "batch": a.rows, "evaluate_every": STEPS, "precision": "bf16"}
    tree: dict[str, Any] = {"out": out, "device": "cpu", "train": train | case.get("train", {})}
    tree |= {key: case[key] for key in ("optim", "peft") if key in case}
    if case["verb"] == "finetune":
        return tree | {"model": {"name": a.tiny if tiny else a.base}, "data": {"train": a.train}}
    hidden = 64 if tiny else a.hidden
    heads = max(1, hidden // 64)
    sizes = {"hidden_size": hidden, "num_hidden_layers": 1 if tiny else a.layers, "intermediate_size": hidden * 8 // 3}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    data = {"train": a.data, "validation_rows": 2 * a.rows}
    return tree | {"model": {"name": "llama-tiny", "settings": sizes}, "data": data, "objective": {"kind": "clm"}}


def run(a: argparse.Namespace, name: str) -> dict[str, float]:
    import ronna.run as runs
    from ronna.base.config import build
    from ronna.base.device import resident_bytes
    from ronna.runfile import FinetuneRun, PretrainRun
    from ronna.train.loop import Run

    case, resume = CASES[name], Path(a.out, "metrics.jsonl").exists()
    kind: Any = PretrainRun if case["verb"] == "pretrain" else FinetuneRun
    runs.Heap = lambda: None  # type: ignore[misc, assignment]
    with tempfile.TemporaryDirectory() as folder:
        runs.prepare_run(build(kind, settings(a, case, folder, tiny=True), where=name)).execute()
    gc.collect()
    before, watch = resident_bytes(), Watch()
    for owner, method, phase in (
        (runs, "prepare_run", "model"), (runs.Training, "check", "checks"), (runs.Training, "restore", "weights"),
        (runs.Training, "optimization", "optimizer"), (Run, "step", "steps"), (Run, "judge", "evaluation"),
        (Run, "keep", "saving"), (runs.Training, "keep_best", "the best"), (runs.Training, "finish", "test"),
    ):  # fmt: skip
        watch.over(owner, method, phase)
    step = Run.step

    def cut(self: Any, window: Any) -> None:
        step(self, window)
        if self.progress.step == STEPS and not resume:
            os.kill(os.getpid(), signal.SIGTERM)

    Run.step = cut  # type: ignore[method-assign]
    with suppress(runs.Interrupted):
        runs.prepare_run(build(kind, settings(a, case, a.out), where=name), resume=resume).execute()
    watch.switch("end")
    return {phase: round((most - before) / 2**20, 1) for phase, most in watch.most.items()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--base")
    parser.add_argument("--train")
    parser.add_argument("--data")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", help=argparse.SUPPRESS)
    return parser.parse_args()


def shrunk(base: str, folder: Path) -> str:
    """An encoder of the same family and tokenizer, but tiny."""
    from ronna.model.families import read_config
    from ronna.model.folder import save_folder
    from ronna.model.init import build
    from ronna.text.tokenizer import load_tokenizer

    family, cfg = read_config(Path(base))
    assert cfg.encoder is not None
    cfg = replace(cfg, encoder=replace(cfg.encoder, blocks=cfg.encoder.blocks[:1]), head=None)
    save_folder(build(cfg, 0), family, folder)
    load_tokenizer(Path(base)).save(folder)
    return str(folder)


def main() -> None:
    a = arguments()
    if a.one:
        print(json.dumps({"case": a.one, **run(a, a.one)}))
        return
    with tempfile.TemporaryDirectory() as folder:
        more = ["--data", a.data or shards(Path(folder))]
        if a.base and a.train:
            more += ["--tiny", shrunk(a.base, Path(folder, "tiny"))]
        for name in a.case:
            if CASES[name]["verb"] == "finetune" and not (a.base and a.train):
                continue
            command = [sys.executable, __file__, *sys.argv[1:], *more, "--one", name, "--out", f"{folder}/{name}"]
            for _ in ("begun", "resumed"):
                done = subprocess.run(command, env=os.environ | HONEST, stdout=subprocess.PIPE, text=True, check=True)
                print(done.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
