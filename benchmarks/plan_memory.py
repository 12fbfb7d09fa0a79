"""What the planner says a run will need beside what it took: real steps, each run in a process of its own.

    python benchmarks/plan_memory.py [unseen | fitted | both | card] [--only NAME ...] [--json FILE] [--steps 3]
    python benchmarks/plan_memory.py card --device cuda [--eager]

Measured is how far resident memory grows from just before the model is built to its highest point in three steps
(`VmHWM`, set back before). Every run first trains another, tiny model for a step, so that what torch and oneDNN load
once is there before. Prints one line a run and the mean and worst error; needs Linux. On a GPU it is the most that
torch had reserved, of blocks that are compiled as a run has them, or not (`--eager`); several runs share the card.

The formulas and the two shares of holes in the heap (`ronna.plan.heap`) were found while looking at FITTED; the error
to state is that of UNSEEN, which were run when they were done.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

MIB = 2**20
RESULTS = Path(__file__).parent / "results" / "plan_memory.jsonl"


@dataclass(frozen=True)
class Case:
    """`settings` are those of the preset; tokens of a sequence go from `least` to `length`."""

    name: str
    preset: str
    task: str  # mlm, clm, denoise, classify
    batch: int
    length: int
    precision: str
    optimizer: str = "adamw"
    dropout: float | None = None  # None: the preset's own
    least: int | None = None  # None: all are of full length
    documents: int = 1  # sequences that share a row
    micro_batches: int = 1
    rank: int | None = None  # of LoRA; None: everything learns
    targets: tuple[str, ...] = ("all",)
    used: float | None = None  # share of the vocabulary that the data has; None: not counted
    vocab: int | None = None
    layers: int | None = None
    dim: int | None = None
    hidden: int | None = None
    heads: int | None = None
    recompute: int = 0  # blocks


FITTED = [
    Case("bert-small mlm", "bert-small", "mlm", 16, 128, "fp32", dropout=0.0, vocab=8000),
    Case("bert-mini mlm dropout", "bert-mini", "mlm", 64, 128, "bf16", vocab=16000),
    Case("gpt2 8 layers clm", "gpt2-tiny", "clm", 8, 256, "bf16", dropout=0.0, vocab=16000, layers=8, dim=384, heads=6),
    Case("llama clm fp32", "llama-tiny", "clm", 4, 512, "fp32", vocab=8000, layers=6, dim=384, hidden=1024, heads=6),
    Case("llama long rows", "llama-tiny", "clm", 2, 1024, "bf16", vocab=8000, layers=6, dim=384, hidden=1024, heads=6),
    Case("t5 denoise", "t5-tiny", "denoise", 16, 128, "bf16", vocab=16000, layers=4, dim=384, hidden=1024, heads=6),
    Case("bert-small classify", "bert-small", "classify", 32, 64, "fp32", least=32, vocab=30522, used=0.3),
    Case("bert-base lora", "bert-base", "classify", 16, 128, "bf16", least=64, rank=8),
    Case("modernbert mlm muon", "modernbert-mini", "mlm", 16, 256, "fp32", "muon", documents=3, vocab=8000),
    Case("gpt2 adafactor", "gpt2-tiny", "clm", 8, 128, "fp32", "adafactor", vocab=50257, dim=512, layers=4, heads=8),
    Case("gpt2-tiny clm", "gpt2-tiny", "clm", 16, 256, "bf16"),
    Case("gpt2 6 layers dropout", "gpt2-tiny", "clm", 6, 256, "fp32", dropout=0.1, layers=6, dim=512, heads=8),
]
UNSEEN: list[Case] = [
    Case("bert-tiny mlm", "bert-tiny", "mlm", 32, 128, "fp32"),
    Case("bert-mini mlm", "bert-mini", "mlm", 32, 128, "bf16", dropout=0.0),
    Case("bert-medium mlm", "bert-medium", "mlm", 16, 256, "bf16", vocab=21128),
    Case("bert-small mlm sgd", "bert-small", "mlm", 8, 512, "fp32", "sgd", dropout=0.0),
    Case("bert-small mlm documents", "bert-small", "mlm", 8, 512, "bf16", documents=4),
    Case("bert-medium mlm micro-batches", "bert-medium", "mlm", 8, 128, "fp32", "adam", micro_batches=3),
    Case("modernbert-mini mlm", "modernbert-mini", "mlm", 32, 256, "bf16"),
    Case("modernbert 8 layers", "modernbert-mini", "mlm", 16, 128, "fp32", layers=8, dim=384, hidden=768, heads=6),
    Case("gpt2-tiny many words", "gpt2-tiny", "clm", 12, 256, "fp32", dropout=0.0),
    Case("modernbert many words", "modernbert-tiny", "mlm", 128, 128, "bf16"),
    Case("gpt2 long rows", "gpt2", "clm", 1, 1024, "bf16", dropout=0.0, layers=6),
    Case("gpt2 adafactor bf16", "gpt2", "clm", 4, 256, "bf16", "adafactor", dropout=0.0, layers=8),
    Case("llama-60m clm", "llama-60m", "clm", 8, 256, "bf16"),
    Case("llama-60m clm muon", "llama-60m", "clm", 4, 256, "fp32", "muon", layers=6),
    Case("llama-130m clm sgd", "llama-130m", "clm", 2, 512, "bf16", "sgd-plain"),
    Case("llama long documents", "llama-60m", "clm", 2, 1024, "bf16", documents=5, layers=4),
    Case("qwen3 4 layers", "qwen3-0.6b", "clm", 2, 256, "bf16", layers=4, vocab=32000),
    Case("t5-tiny denoise", "t5-tiny", "denoise", 32, 256, "fp32", dropout=0.0),
    Case("t5-small denoise", "t5-small", "denoise", 8, 256, "bf16"),
    Case("transformer-base denoise", "transformer-base", "denoise", 16, 128, "fp32", vocab=16000, layers=4),
    Case("bert-base classify", "bert-base", "classify", 16, 128, "bf16", layers=6, least=40),
    Case("bert-mini classify used", "bert-mini", "classify", 64, 64, "fp32", least=10, used=0.4),
    Case("modernbert classify", "modernbert-base", "classify", 8, 256, "bf16", layers=6, least=100),
    Case("gpt2 classify", "gpt2", "classify", 8, 128, "fp32", layers=6, least=60),
    Case("bert-base lora q v", "bert-base", "classify", 12, 128, "fp32", rank=16, targets=("q", "v"), least=50),
    Case("llama-130m lora", "llama-130m", "clm", 4, 256, "bf16", rank=8),
    Case("qwen2.5 lora", "qwen2.5-0.5b", "clm", 1, 512, "bf16", rank=16, layers=8),
    Case("gpt2 lora classify", "gpt2", "classify", 16, 128, "bf16", rank=4, dropout=0.0, least=30),
]
CARD = [
    Case("bert-base mlm", "bert-base", "mlm", 32, 512, "bf16", dropout=0.0),
    Case("bert-base mlm dropout", "bert-base", "mlm", 48, 256, "bf16"),
    Case("bert-large mlm fp32", "bert-large", "mlm", 8, 256, "fp32", dropout=0.0),
    Case("modernbert-base mlm", "modernbert-base", "mlm", 16, 1024, "bf16"),
    Case("modernbert-base documents", "modernbert-base", "mlm", 24, 512, "bf16", documents=3),
    Case("gpt2 clm", "gpt2", "clm", 16, 1024, "bf16", dropout=0.0),
    Case("gpt2 clm dropout", "gpt2", "clm", 8, 1024, "bf16"),
    Case("gpt2 micro-batches", "gpt2", "clm", 8, 512, "bf16", dropout=0.0, micro_batches=3),
    Case("llama-350m clm", "llama-350m", "clm", 16, 1024, "bf16"),
    Case("llama-350m documents", "llama-350m", "clm", 8, 1024, "bf16", documents=4),
    Case("llama-350m recomputed", "llama-350m", "clm", 32, 1024, "bf16", recompute=24),
    Case("llama-350m half recomputed", "llama-350m", "clm", 16, 1024, "bf16", recompute=12),
    Case("llama-1b clm", "llama-1b", "clm", 8, 1024, "bf16"),
    Case("llama-350m muon", "llama-350m", "clm", 8, 512, "bf16", "muon"),
    Case("llama-130m adafactor", "llama-130m", "clm", 32, 512, "bf16", "adafactor"),
    Case("qwen3-0.6b clm", "qwen3-0.6b", "clm", 8, 1024, "bf16"),
    Case("t5-small denoise", "t5-small", "denoise", 64, 256, "bf16"),
    Case("transformer-base denoise", "transformer-base", "denoise", 64, 256, "bf16", dropout=0.0),
    Case("bert-base classify", "bert-base", "classify", 64, 256, "bf16", least=40, dropout=0.0),
    Case("bert-base lora", "bert-base", "classify", 64, 256, "bf16", rank=8, least=40, dropout=0.0),
    Case("qwen2.5-0.5b lora", "qwen2.5-0.5b", "clm", 8, 1024, "bf16", rank=16),
    Case("llama-3.2-1b lora", "llama-3.2-1b", "clm", 4, 2048, "bf16", rank=8),
    Case("qwen3-0.6b lora q v", "qwen3-0.6b", "clm", 8, 1024, "bf16", rank=8, targets=("q", "v")),
    Case("gpt2 lora classify", "gpt2", "classify", 64, 256, "bf16", rank=4, least=30, dropout=0.0),
]
WARM_UP = {"mlm": "bert-tiny", "classify": "bert-tiny", "clm": "llama-tiny", "denoise": "t5-tiny"}
TINY = {"batch": 2, "length": 32, "least": None, "documents": 1, "rank": None, "micro_batches": 1, "used": None,
        "vocab": 512, "layers": 1, "dim": 64, "hidden": 64, "heads": 1}  # fmt: skip


def describe(case: Case) -> Any:
    """The model, without torch."""
    from ronna.model.families import classifier_for, preset, with_dropout

    asked = {
        "vocab_size": case.vocab,
        "num_hidden_layers": case.layers,
        "hidden_size": case.dim,
        "intermediate_size": case.hidden,
        "num_attention_heads": case.heads,
    }
    settings: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    if case.dim and case.preset.startswith("llama"):
        settings["num_key_value_heads"] = case.heads
    if case.dim and case.preset.startswith("t5"):
        settings["d_kv"] = case.dim // (case.heads or 1)
    family, model = preset(case.preset, **settings)
    if case.dropout is not None:
        model = with_dropout(family, model, case.dropout)
    return replace(model, head=None, classifier=classifier_for(family, model, 2)) if case.task == "classify" else model


def lengths_of(case: Case, step: int, micro: int) -> list[int]:
    import numpy as np

    rng = np.random.default_rng([7, step, micro])
    if case.documents > 1:
        cuts = np.sort(rng.integers(1, case.length, (case.batch, case.documents - 1)), axis=1)
        parts = np.diff(np.pad(cuts, ((0, 0), (1, 1)), constant_values=((0, 0), (0, case.length))), axis=1)
        return [case.length, *(int(n) for n in parts[1:].flatten() if n)]  # one document fills its row
    if case.least is None:
        return [case.length] * case.batch
    drawn = rng.integers(case.least, case.length + 1, case.batch)
    drawn[0] = case.length
    return sorted(drawn.tolist(), reverse=True)


def samples_of(case: Case, vocab: int, step: int, micro: int) -> list[Any]:
    """Random tokens; of a vocabulary of which only a share is used, that share."""
    import numpy as np

    from ronna.objectives.base import Sample

    rng = np.random.default_rng([11, step, micro])
    limit = int(vocab * (case.used or 1))
    made = []
    for n in lengths_of(case, step, micro):
        tokens = rng.integers(0, limit, n)
        if case.task == "mlm":
            at = np.sort(rng.permutation(n)[: max(1, round(0.15 * n))])
            made.append(Sample(tokens, at, tokens[at], np.zeros_like(tokens)))
        elif case.task == "clm":
            made.append(Sample(tokens, np.arange(n), rng.integers(0, limit, n)))
        elif case.task == "denoise":
            target = rng.integers(0, limit, target_length(n))
            made.append(Sample(target, np.arange(len(target)), target, source=tokens))
        else:
            made.append(Sample(tokens, segments=np.zeros_like(tokens), target=int(rng.integers(2))))
    return made


def target_length(source: int) -> int:
    return max(2, source // 4)


def planned(case: Case, device: str) -> Any:
    """The planner's answer."""
    from ronna.plan.memory import Step, estimate
    from ronna.plan.shapes import Adapter, Lengths
    from ronna.plan.weights import Optimizer

    found = [lengths_of(case, step, micro) for step in range(3) for micro in range(case.micro_batches)]
    most = max(found, key=sum)
    lengths = source = Lengths.of(most)
    predicted = None
    if case.task == "mlm":
        predicted = sum(max(1, round(0.15 * n)) for n in most)
    if case.task == "denoise":
        lengths = Lengths.of([target_length(n) for n in most])
    model = describe(case)
    kind, momentum = ("sgd", False) if case.optimizer == "sgd-plain" else (case.optimizer, True)
    step = Step(
        lengths,
        source=source if case.task == "denoise" else None,
        predicted=predicted,
        compute=case.precision,  # type: ignore[arg-type]
        optimizer=Optimizer(kind, momentum),  # type: ignore[arg-type]
        adapter=None if case.rank is None else Adapter(case.rank, case.targets),
        token_rows=None if case.used is None else int(model.embedding.vocab * case.used),
        micro_batches=case.micro_batches,
        blocks=case.recompute,
        device=device,  # type: ignore[arg-type]
    )
    return estimate(model, step)


class Silent:
    def log(self, step: int, values: dict[str, float], kind: str = "train") -> None:
        pass


def train(case: Case, heap: Any, steps: int, device: str = "cpu", eager: bool = False) -> None:
    """Build the model and train it as a run does."""
    import torch

    from ronna.model.compiled import compile_blocks, wants_compile
    from ronna.model.init import build
    from ronna.model.recompute import Recompute, recompute_blocks
    from ronna.objectives.base import collate
    from ronna.peft.lora import LoraConfig
    from ronna.peft.methods import adapt, freeze_to
    from ronna.train.loop import Run, TrainConfig
    from ronna.train.optim import SGD, Adafactor, Adam, AdamW, Muon
    from ronna.train.schedule import Constant
    from ronna.train.stepping import stepping

    kinds = {"adamw": AdamW(), "adam": Adam(), "sgd": SGD(), "sgd-plain": SGD(momentum=0.0),
             "adafactor": Adafactor(), "muon": Muon()}  # fmt: skip
    narrow = case.rank is not None and case.precision == "bf16"  # as a folder is read under an adapter
    model = build(describe(case), 0, torch.bfloat16 if narrow else torch.float32)
    model.compute = torch.bfloat16 if case.precision == "bf16" else torch.float32
    if case.rank is not None:
        adapt(model, LoraConfig(rank=case.rank, targets=case.targets))
        freeze_to(model, model.compute)
    model.to(device)
    if wants_compile("never" if eager else "auto", model.device):
        compile_blocks(model)
    recompute_blocks(model, Recompute(blocks=case.recompute))
    vocab = model.cfg.embedding.vocab
    used = None if case.used is None else torch.arange(int(vocab * case.used))
    objective = objective_of(case)

    def feed(step: int) -> list[Any]:
        drawn = [samples_of(case, vocab, step, i) for i in range(case.micro_batches)]
        return [collate(objective, samples, model.device) for samples in drawn]

    config = TrainConfig(batch=case.batch, evaluate_every=steps, save_every=steps)
    hooks, ways = [heap], stepping(model, kinds[case.optimizer], config, used, None)
    Run(
        model, objective, feed, ways.optimizers, Constant(), config, steps, 0, Silent(), hooks=hooks, update=ways.update
    ).train()  # fmt: skip


def objective_of(case: Case) -> Any:
    from ronna.objectives.clm import CausalLM
    from ronna.objectives.denoise import Denoise, DenoiseConfig
    from ronna.objectives.mlm import MaskedLM, MLMConfig
    from ronna.tasks.classify import Classify, ClassifyConfig

    unread: Any = None  # neither tokenizer nor vocabulary has a part in a loss
    match case.task:
        case "mlm":
            return MaskedLM(MLMConfig(nsp=False), unread)
        case "clm":
            return CausalLM(0, 1)
        case "denoise":
            return Denoise(DenoiseConfig(), (), 0, 1)
    return Classify(ClassifyConfig(), unread, "single", ["a", "b"], case.length)


def status(key: str) -> int:
    """Bytes of a line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def measured(case: Case, steps: int) -> dict[str, int]:
    """Growth of resident memory in bytes, its peak and what is left of it at the end."""
    import torch

    from ronna.base.heap import Heap, keep_few_kernels

    keep_few_kernels()  # as a run has it
    torch.set_num_threads(int(__import__("os").environ.get("OMP_NUM_THREADS", "1")))
    heap = Heap()
    train(replace(case, preset=WARM_UP[case.task], **TINY), heap, 1)
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    train(case, heap, steps)
    return {"measured": status("VmHWM") - before, "before": before, "after": status("VmRSS") - before}


def reserved(case: Case, steps: int, eager: bool) -> dict[str, int]:
    """Bytes of a GPU: the most that torch had reserved, and that tensors filled of it."""
    import torch

    train(case, lambda _: None, steps, "cuda", eager)
    return {"measured": torch.cuda.max_memory_reserved(), "allocated": torch.cuda.max_memory_allocated()}


def run(case: Case, steps: int, device: str, eager: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", json.dumps(asdict(case)), "--steps", str(steps), "--device", device]
    command += ["--eager"] * eager
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case.name}:\n{done.stderr}")
    plan = planned(case, device)
    line = json.loads(done.stdout.splitlines()[-1])
    error = plan.peak / line["measured"] - 1
    return {"name": case.name, "planned": plan.peak, **line, "error": round(error, 4), "where": plan.where,
            "fitted": case in FITTED}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="?", choices=["unseen", "fitted", "both", "card"], default="unseen")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--eager", action="store_true", help="blocks that are not compiled, on a GPU")
    parser.add_argument("--together", type=int, default=6, help="runs at a time, on a GPU")
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--json", type=Path, default=RESULTS, help="lines for plan_plot.py")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--one")
    a = parser.parse_args()
    if a.one:
        fields = json.loads(a.one)
        case = Case(**fields | {"targets": tuple(fields["targets"])})
        taken = measured(case, a.steps) if a.device == "cpu" else reserved(case, a.steps, a.eager)
        return print(json.dumps(taken))
    cases = {"unseen": UNSEEN, "fitted": FITTED, "both": FITTED + UNSEEN, "card": CARD}[a.which]
    cases = [case for case in cases if not a.only or case.name in a.only]
    lines = []
    pool = ThreadPoolExecutor(a.together if a.device == "cuda" else 1)
    for line in pool.map(lambda case: run(case, a.steps, a.device, a.eager), cases):
        lines.append(line)
        print(f"{line['name']:32} planned {line['planned'] / MIB:8.1f}  measured {line['measured'] / MIB:8.1f} MiB"
              f"  {line['error']:+7.1%}  {line['where']}", flush=True)  # fmt: skip
    if not a.only:
        names = ("name", "planned", "measured", "fitted", "allocated")
        kept = [{key: line[key] for key in names if key in line} for line in lines]
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text("".join(json.dumps(line) + "\n" for line in kept))
    errors = [abs(line["error"]) for line in lines]
    print(f"{len(errors)} runs: mean error {statistics.mean(errors):.1%}, worst {max(errors):.1%}")


if __name__ == "__main__":
    main()
