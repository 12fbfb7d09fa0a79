"""A few real steps of what was planned, on made-up data, in a process of their own: what they take beside the plan.

python -m ronna.trial '{...}'     # prints what it took as a line of JSON; `trial` does this
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ronna.asked import WRITES, trained
from ronna.base.config import Tree
from ronna.base.errors import RonnaError
from ronna.base.process import stop_with_starter
from ronna.model import config as c
from ronna.model.families import Family, preset, read_config
from ronna.plan.shapes import Adapter, Lengths
from ronna.plan.stretches import Step
from ronna.plan.weights import Optimizer

STEPS = 3  # the first makes the optimizer's states, the last is timed
CLEAR = Path("/proc/self/clear_refs")  # "5" sets the highest resident size back
TINY: Tree = {
    "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 64, "vocab_size": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model by preset and settings, or by folder, as a task trains it: what another process can build again."""

    model: str
    settings: Tree
    task: str
    pretraining: bool

    @property
    def tried(self) -> str:
        """The task that stands for it: those that score differ in what they score, which weighs next to nothing."""
        return self.task if self.pretraining or self.task in (*WRITES, "clm") else "classify"

    def shape(self) -> tuple[Family, c.Model]:
        folder = Path(self.model)
        family, cfg = read_config(folder) if folder.is_dir() else preset(self.model, **self.settings)
        return family, trained(self.tried, family, cfg, pretraining=self.pretraining)


@dataclass(frozen=True)
class Taken:
    """grown: bytes that the process grew by from just before the model was built. seconds: of the last step."""

    grown: int
    seconds: float


def trial(subject: Subject, step: Step, steps: int = STEPS) -> Taken | None:
    """None where the system ended it, or there was no memory left. RonnaError where it cannot be tried here."""
    if not CLEAR.exists() or step.device != "cpu":
        raise RonnaError("steps can be tried on a CPU under Linux alone", where="probe", fix="leave it out")
    if step.quantize is not None:
        raise RonnaError("weights in 4 bits are not tried", where="probe", fix="leave it out")
    asked = json.dumps({"subject": asdict(subject), "step": asdict(step), "steps": steps})
    done = subprocess.run([sys.executable, "-m", "ronna.trial", asked], capture_output=True, text=True, check=False)
    if done.returncode < 0 or "can't allocate memory" in done.stderr or "MemoryError" in done.stderr:
        return None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RonnaError(f"the trial of this plan failed: {last}", where="probe", fix="leave it out")
    return Taken(**json.loads(done.stdout.splitlines()[-1]))


def step_of(tree: Tree) -> Step:
    """Of what `asdict` made of one."""
    lengths, source = Lengths(**tree["lengths"]), None if tree["source"] is None else Lengths(**tree["source"])
    adapter = tree["adapter"] and Adapter(**tree["adapter"] | {"targets": tuple(tree["adapter"]["targets"])})
    own = {"optimizer": Optimizer(**tree["optimizer"]), "adapter": adapter or None, "offload": tuple(tree["offload"])}
    return Step(**tree | own | {"lengths": lengths, "source": source})


# In the process of its own


def main(tree: Tree) -> None:
    from ronna.base.device import peak_resident_bytes, resident_bytes
    from ronna.base.heap import Heap, keep_few_kernels

    stop_with_starter()
    keep_few_kernels()
    subject, step = Subject(**tree["subject"]), step_of(tree["step"])
    heap = Heap(step.tight or step.lean)
    family, _ = subject.shape()
    warm_up(family, subject.task, subject.pretraining, step)
    before = resident_bytes()
    CLEAR.write_text("5")
    seconds = run(subject, step, heap, tree["steps"])
    print(json.dumps({"grown": peak_resident_bytes() - before, "seconds": seconds}))


def warm_up(family: Family, task: str, pretraining: bool, step: Step) -> None:
    """A step of a tiny model, once in a process: all that torch and its libraries load at first is there then."""
    few = Lengths(2, 16)
    tiny = Step(few, source=few if step.source else None, compute=step.compute)
    warmed(next(iter(family.presets)), task, pretraining, tiny)


@lru_cache
def warmed(preset: str, task: str, pretraining: bool, tiny: Step) -> None:
    import torch

    with torch.random.fork_rng(devices=()):
        run(Subject(preset, TINY, task, pretraining), tiny, lambda _: None, 1)
    gc.collect()


def run(subject: Subject, step: Step, heap: Callable[[int], Any], steps: int) -> float:
    """Train as a run does; seconds of the last step."""
    import torch

    from ronna.model.init import build
    from ronna.model.recompute import Recompute, recompute_blocks
    from ronna.objectives.base import collate
    from ronna.peft.methods import adapt, freeze_to
    from ronna.planned import optim_of, peft_of
    from ronna.train.loop import Run, TrainConfig
    from ronna.train.schedule import Constant
    from ronna.train.shelf import Shelf
    from ronna.train.stepping import stepping

    _, cfg = subject.shape()
    narrow = step.weights == "bf16" or (step.adapter is not None and step.compute == "bf16")
    model = build(cfg, 0, torch.bfloat16 if narrow else torch.float32)
    model.compute = torch.bfloat16 if step.compute == "bf16" else torch.float32
    if step.adapter is not None:
        adapt(model, peft_of(step.adapter))
        freeze_to(model, model.compute)
    recompute_blocks(model, Recompute(blocks=step.blocks, feeds=step.feeds))
    config = TrainConfig(
        batch=step.lengths.sequences * step.micro_batches, micro_batch=step.lengths.sequences, weights=step.weights,
        fused_backward=step.fused_backward, clip=1.0 if step.clip else 0.0, offload=step.offload,
        evaluate_every=steps, save_every=steps,
    )  # fmt: skip
    # Where a run would have its folder: what is called temporary may lie in memory.
    here = Path.cwd() if os.access(Path.cwd(), os.W_OK) else Path(tempfile.gettempdir())
    shelf = Shelf(here) if step.offload else None
    ways = stepping(model, optim_of(step.optimizer), config, None, shelf)
    objective, began = objective_of(subject, step), [0.0]

    def feed(number: int) -> list[Any]:
        drawn = [samples_of(subject, step, cfg.embedding.vocab, number, i) for i in range(step.micro_batches)]
        began[0] = time.perf_counter()
        return [collate(objective, part) for part in drawn]

    took: list[float] = []
    hooks = [heap, lambda _: took.append(time.perf_counter() - began[0])]
    Run(
        model, objective, feed, ways.optimizers, Constant(), config, steps, 0, Silent(), hooks=hooks,
        away=ways.away, update=ways.update,
    ).train()  # fmt: skip
    return took[-1]


class Silent:
    def log(self, step: int, values: dict[str, float], kind: str = "train") -> None:
        pass


def objective_of(subject: Subject, step: Step) -> Any:
    from ronna.objectives.clm import CausalLM
    from ronna.objectives.denoise import Denoise, DenoiseConfig
    from ronna.objectives.mlm import MaskedLM, MLMConfig
    from ronna.tasks.classify import Classify, ClassifyConfig

    unread: Any = None  # neither tokenizer nor vocabulary has a part in a loss
    match subject.tried:
        case "mlm":
            return MaskedLM(MLMConfig(nsp=False), unread)
        case _ if step.source is not None:
            return Denoise(DenoiseConfig(), (), 0, 1)
        case "clm" | "seq2seq" | "dialogue" | "dpo":
            return CausalLM(0, 1)
    return Classify(ClassifyConfig(), unread, "single", ["a", "b"], 512)


def samples_of(subject: Subject, step: Step, vocab: int, number: int, micro: int) -> list[Any]:
    """Random tokens in sequences of the plan's length."""
    import numpy as np

    from ronna.objectives.base import Sample

    rng, made = np.random.default_rng([number, micro]), []
    step = step.led(-step.adapter.rank) if step.adapter and step.adapter.kind == "prompt" else step
    sequences, length = step.lengths.sequences, step.lengths.length
    words = length if step.predicted is None else max(1, step.predicted // sequences)
    for _ in range(sequences):
        tokens = rng.integers(0, vocab, length)
        if step.source is not None:
            source = rng.integers(0, vocab, step.source.length)
            made.append(Sample(tokens, np.arange(length), tokens, source=source))
        elif subject.tried == "mlm":
            at = np.sort(rng.permutation(length)[:words])
            made.append(Sample(tokens, at, tokens[at], np.zeros_like(tokens)))
        elif subject.tried in ("clm", *WRITES):
            made.append(Sample(tokens, np.arange(length), rng.integers(0, vocab, length)))
        else:
            made.append(Sample(tokens, segments=np.zeros_like(tokens), target=int(rng.integers(2))))
    return made


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
