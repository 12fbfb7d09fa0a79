"""What a run may not ask for together."""

from ronna.base.errors import RonnaError
from ronna.peft.lora import LoraConfig
from ronna.plan.ranks import STEP_IN_PARTS
from ronna.runfile import FinetuneRun, PretrainRun


def refuse_apart(run: PretrainRun | FinetuneRun) -> None:
    """RonnaError for ways to save memory that do not go together."""
    config = run.train
    lean = [("weights", config.weights == "bf16"), ("fused_backward", config.fused_backward)]
    lean.append(("offload", "optimizer" in config.offload))
    asked = [name for name, wanted in lean if wanted]
    if asked and isinstance(run, FinetuneRun) and run.peft is not None:
        what = "what an adapter trains is small already"
        raise RonnaError(what, where=f"train.{asked[0]}", fix="leave it out, or leave out peft")
    if config.fused_backward and (config.micro_batch or config.batch) < config.batch:
        what = "a gradient that is used at once cannot be added up over micro-batches"
        raise RonnaError(what, where="train.fused_backward", fix="leave out train.micro_batch, or fused_backward")


def obstacles(run: PretrainRun | FinetuneRun) -> list[tuple[str, str]]:
    """What of a run does not work on several ranks yet: the key, and what it asks for."""
    config = run.train
    found = [
        ("device", "a card by its number", ":" in run.device),
        ("train.memory", "planning by memory", config.memory is not None),
        ("train.offload", "offloading", bool(config.offload)),
        ("train.weights", "weights held in bf16", config.weights == "bf16"),
        ("train.fused_backward", "the optimizer inside the backward pass", config.fused_backward),
        ("optim.kind", f"the optimizer {run.optim.kind}", run.optim.kind not in STEP_IN_PARTS),
    ]
    if isinstance(run, FinetuneRun):
        plain = isinstance(run.peft, LoraConfig) and not run.peft.dora
        divided = run.peft is not None and not plain and run.parallel.tensor > 1
        found += [
            ("model.quantize", "a base in 4 bits", run.model.quantize is not None),
            ("task.kind", f"the task {run.task.kind}", run.task.kind in ("embed", "dpo")),
            ("search", "a search", run.search is not None),
            ("peft.kind", "adalora", run.peft is not None and run.peft.kind == "adalora"),
            ("parallel.pipeline", "an adapter on a pipeline", run.peft is not None and run.parallel.pipeline > 1),
            ("parallel.tensor", "an adapter of this kind on divided matrices", divided),
        ]
    return [(where, what) for where, what, asked in found if asked]


def refuse_shared(run: PretrainRun | FinetuneRun) -> None:
    """RonnaError for what a run cannot do on several ranks."""
    for where, what in obstacles(run):
        raise RonnaError(f"{what} does not work on several ranks yet", where=where, fix="leave it out, or --nproc")
