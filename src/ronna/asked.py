"""What the planner is asked by name, and the work that it means. No torch here: an answer should not wait for it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat

from ronna.base.config import Config
from ronna.base.device import describe, host
from ronna.base.errors import RonnaError
from ronna.base.hub import local_folder
from ronna.base.rates import known, rates
from ronna.model import config as c
from ronna.model.families import PRESETS, Family, classifier_for, preset, read_config
from ronna.plan.hardware import Device, cpu, measured
from ronna.plan.search import Shape, Work
from ronna.plan.shapes import Adapter, Dtype, Lengths
from ronna.plan.stretches import Step
from ronna.plan.weights import Kind as OptimizerKind
from ronna.plan.weights import Optimizer, adapted

Pretraining = Literal["mlm", "clm", "denoise"]
Task = Literal["classify", "tag", "relation", "span_qa", "embed", "seq2seq", "dialogue", "dpo"]
Method = Literal["lora", "adalora", "houlsby", "bitfit", "prompt", "prefix"]
WRITES = ("seq2seq", "dialogue", "dpo")
UNITS: dict[str, c.Unit] = {"tag": "tokens", "span_qa": "spans", "relation": "pair"}
# Of what the methods do where a run says nothing, and where Houlsby's stand, as in `ronna.peft`.
RANKS = {"lora": 8, "adalora": 12, "houlsby": 64, "prompt": 20, "prefix": 20}
PLACES = ("attention.out", "ffn.down")
BATCH, LENGTH = 32, 512  # the same, of the planner's own
WRITTEN = 0.5  # tokens to write for each that is read, where there are no data to tell


class PlanRun(Config):
    """A question. What a run file says is as it says, unless it is asked for otherwise here."""

    verb: Literal["plan"] = "plan"
    model: str  # a preset, a model folder, hub:ORG/NAME, or a run file
    hardware: str = "auto"  # auto: this machine; or cpu, h200, 8xh100-80gb
    memory: str | None = None  # the most to use of a device: "24GiB"
    machine: int = Field(8, ge=1)  # devices in one machine, where there are several
    network: PositiveFloat | None = None  # GB/s of each of them to other machines; None: what is usual
    task: Pretraining | Task | None = None  # None: what the model is pre-trained by
    peft: Method | None = None
    rank: int | None = Field(None, ge=1)  # of an adapter
    quantize: Literal["nf4", "nf4_double"] | None = None
    batch: int | None = Field(None, ge=1)  # sequences or rows a step; None: 32
    length: int | None = Field(None, ge=8)  # tokens of them; None: 512, or what the model has
    vocab: int | None = Field(None, ge=1)  # of a preset
    tokenizer: str | None = None  # folder of a preset's, which says its vocabulary too
    optim: OptimizerKind = "adamw"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    tokens: PositiveFloat | None = None  # to train on
    hours: PositiveFloat | None = None  # to train for
    price: PositiveFloat | None = None  # of an hour of a device
    largest: bool = False  # what is the largest model of the preset's family?
    exact: bool = False  # only ways that change nothing but rounding
    probe: bool = False  # measure this machine
    write: str | None = None  # a run file to write
    data: str | None = None  # what that is to train on
    out: str | None = None  # and the folder it is to write


@dataclass(frozen=True)
class Asked:
    """family and cfg: of the model as it is published; `work` has its heads as they are trained."""

    family: Family
    cfg: c.Model
    task: str
    work: Work


def has_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


def this_machine(kind: Literal["cpu", "cuda"], probe: bool = False) -> Device:
    """By what has been measured of it, if anything has or is to be with `probe`; else a CPU as its flags tell."""
    there = host()
    if kind == "cuda" or probe:  # torch finds out about the one and does the other
        return measured_here(kind)
    before = known("cpu", there.name)
    if before is not None:
        return measured(before, there.available)
    return cpu(there.cores, there.flags, there.available, there.name)


def measured_here(kind: Literal["cpu", "cuda"]) -> Device:
    """Some seconds the first time."""
    return measured(rates(kind), describe(kind).memory_available)


def task_of(cfg: c.Model) -> Pretraining:
    """What a model is pre-trained by."""
    return "mlm" if cfg.decoder is None else "clm" if cfg.encoder is None else "denoise"


def published(question: PlanRun, name: str) -> tuple[Family, c.Model]:
    """Family and shape of a preset or a folder. Raises RonnaError."""
    folder = local_folder(name)
    if folder.is_dir():
        if question.vocab is not None:
            raise RonnaError("a folder's vocabulary is its own", where="vocab", fix="leave it out, or name a preset")
        if question.tokenizer is not None:
            fix = "leave it out, or name a preset"
            raise RonnaError("a model folder has a tokenizer of its own", where="tokenizer", fix=fix)
        return read_config(folder)
    if name not in PRESETS and ("/" in name or name.startswith(".")):
        return read_config(folder)  # which says that there is no such folder
    return preset(name, **vocabulary(question))


def vocabulary(question: PlanRun) -> dict[str, int]:
    """Settings of a preset. Raises RonnaError."""
    if question.tokenizer is None:
        return {} if question.vocab is None else {"vocab_size": question.vocab}
    if question.vocab is not None:
        raise RonnaError("a tokenizer says how many tokens it has", where="vocab", fix="leave one of the two out")
    from ronna.text.tokenizer import load_tokenizer  # a tenth of a second, which few questions need

    return {"vocab_size": load_tokenizer(question.tokenizer).vocab_size}


def asked(
    question: PlanRun, family: Family, cfg: c.Model, kind: Literal["cpu", "cuda"], compute: Dtype, devices: int = 1
) -> Asked:
    """Raises RonnaError where the question makes no sense."""
    task = question.task or task_of(cfg)
    if task in ("mlm", "clm", "denoise") and task != task_of(cfg):
        fix = f"leave it out: {family.name} models are pre-trained by {task_of(cfg)}"
        raise RonnaError(f"this model cannot be trained by {task}", where="task", fix=fix)
    if question.quantize is not None and question.peft is None:
        raise RonnaError("weights in 4 bits cannot learn", where="quantize", fix="add an adapter (--peft lora)")
    if question.peft is not None and task in ("mlm", "denoise"):
        task = "classify" if task == "mlm" else "seq2seq"  # adapters are for fine-tuning
    model = trained(task, family, cfg, pretraining=question.peft is None and task == task_of(cfg))
    if cfg.max_length is not None and question.length is not None and question.length > cfg.max_length:
        what = f"sequences of {question.length} tokens are longer than the {cfg.max_length} positions of the model"
        raise RonnaError(what, where="length", fix=f"at most {cfg.max_length}")
    adapter = None if question.peft is None else adapter_for(question.peft, question.rank)
    if adapter is not None:
        check_adapter(cfg, adapter)
    longest = c.room_beside(0 if adapter is None else adapter.virtual, cfg.max_length, where="rank")
    length = question.length or LENGTH  # a run cuts texts to what virtual tokens leave, and so does its plan
    length = length if longest is None else min(length, longest)
    shape, batch = shapes(task, model, length), question.batch or max(BATCH, devices)
    step = Step(
        Lengths(1, 1),
        compute=compute,
        optimizer=Optimizer(question.optim),
        adapter=adapter,
        quantize=question.quantize,
        device=kind,
    )
    return Asked(family, cfg, task, Work(model, shape(batch).of(step), batch, shape, question.exact))


def adapter_for(method: Method, size: int | None, targets: tuple[str, ...] = ("all",)) -> Adapter:
    """size: its rank, width or virtual tokens; None: what the method has where a run says nothing."""
    size = RANKS.get(method, 0) if size is None else size
    if method == "lora" or method == "adalora":
        return Adapter(size, targets)
    if method == "houlsby":
        return Adapter(size, PLACES, method)
    return Adapter(size, kind=method)


def check_adapter(cfg: c.Model, adapter: Adapter) -> None:
    """What a run would refuse as well."""
    if adapter.kind == "bitfit" and not any(adapted(replace(cfg, classifier=None), adapter)):
        raise RonnaError("this model has no bias to train", where="peft", fix="use lora or houlsby")
    if adapter.kind == "prefix" and any(block.attention.window is not None for block in cfg.last.blocks):
        what = "prefix tuning of attention that sees a window alone"
        raise RonnaError(what, where="peft", fix="use prompt, lora or houlsby")


def trained(task: str, family: Family, cfg: c.Model, *, pretraining: bool, nsp: bool = False) -> c.Model:
    """The shape with the head and the classifier that a task trains, two labels where data would tell more."""
    if pretraining or task in WRITES or task == "clm":
        return replace(cfg, classifier=c.Classifier(2, "first", "tanh") if nsp else None)
    if task == "embed":
        return replace(cfg, head=None, classifier=None)
    return replace(cfg, head=None, classifier=classifier_for(family, cfg, 2, UNITS.get(task, "sequence")))


def shapes(task: str, model: c.Model, length: int, rate: float = 0.15, span: float = 3.0) -> Callable[[int], Shape]:
    """Of micro-batches whose items are all as long as is allowed. rate and span: of what is masked or cut out."""

    def shape(items: int) -> Shape:
        whole = Lengths(items * (2 if task in ("dpo", "embed") else 1), length)
        if task == "mlm":
            return Shape(whole, predicted=max(1, round(rate * items * length)))
        if task == "denoise":
            cut = max(1, round(length * rate))
            spans = max(1, round(cut / span))
            return Shape(Lengths(items, cut + spans + 1), Lengths(items, length - cut + spans))
        if model.encoder is not None and model.decoder is not None:
            return Shape(Lengths(items, max(1, int(length * WRITTEN))), whole)
        return Shape(whole)

    return shape
