"""From a run to what the planner is asked: its model, its step, and the heaviest micro-batch that it will meet."""

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter

from ronna.asked import Asked, PlanRun, adapter_for, shapes, trained
from ronna.base.config import Tree, build, read_toml
from ronna.base.errors import RonnaError
from ronna.base.hub import local_folder
from ronna.data.loader import sample_rng
from ronna.model import config as c
from ronna.model.families import PRESETS, Family, preset, read_config, with_dropout
from ronna.model.recompute import Count
from ronna.objectives.base import Objective
from ronna.objectives.denoise import DenoiseConfig
from ronna.objectives.mlm import MLMConfig
from ronna.peft.adalora import AdaLoraConfig
from ronna.peft.houlsby import HoulsbyConfig
from ronna.peft.lora import LoraConfig
from ronna.peft.methods import PeftConfig
from ronna.peft.prefix import PrefixConfig
from ronna.peft.prompt import PromptConfig
from ronna.plan.ranks import ALONE, Ranks
from ronna.plan.search import Plan, Shape, Work
from ronna.plan.shapes import Adapter, Dtype, Lengths
from ronna.plan.stretches import Step
from ronna.plan.weights import Optimizer
from ronna.runfile import FinetuneRun, PretrainRun
from ronna.text.tokenizer import load_tokenizer
from ronna.train.lean import Apollo
from ronna.train.optim import SGD, OptimizerConfig

AnyRun = PretrainRun | FinetuneRun
LOOKED_AT = 8  # batches of rows
SHARED = {"lr", "rates", "betas", "eps", "weight_decay"}  # fields of every optimizer that a plan puts in AdamW's place


def work_of(
    run: AnyRun,
    model: c.Model,
    shape: Callable[[int], Shape],
    *,
    kind: Literal["cpu", "cuda"],
    compute: Dtype,
    token_rows: int | None = None,
    exact: bool = False,
    ranks: Ranks = ALONE,
) -> Work:
    """Of one of the ranks. model: with the head and the classifier that it is trained with. shape: of a micro-batch of
    so many items."""
    train, peft = run.train, run.peft if isinstance(run, FinetuneRun) else None
    blocks = sum(len(stack.blocks) for stack in (model.encoder, model.decoder) if stack)
    whole, batch, micro = counted(train.recompute.blocks, blocks), train.batch, -(-micro_of(run) // ranks.parts)
    shape = lru_cache(shape)
    step = Step(
        Lengths(1, 1),
        compute=compute,
        weights=train.weights,
        optimizer=optimizer_of(run.optim),
        adapter=None if peft is None else adapter_of(peft),
        token_rows=token_rows,
        micro_batches=-(-batch // micro_of(run)),
        blocks=whole,
        feeds=counted(train.recompute.feeds, blocks - whole),
        fused_backward=train.fused_backward,
        clip=train.clip > 0,
        offload=tuple(sorted(set(train.offload), reverse=True)),
        quantize=run.model.quantize if isinstance(run, FinetuneRun) else None,
        device=kind,
        ranks=ranks,
        compiled=train.compile != "never",
    )
    eight_bit = importlib.util.find_spec("bitsandbytes") is not None
    by_tokens = train.batch_tokens is not None
    return Work(model, shape(micro).of(step), -(-batch // ranks.parts), shape, exact, eight_bit, by_tokens, micro)


def micro_of(run: AnyRun) -> int:
    return min(run.train.micro_batch or run.train.batch, run.train.batch)


def counted(count: Count, there: int) -> int:
    return there if count == "all" else min(count, there)


def optimizer_of(config: OptimizerConfig) -> Optimizer:
    momentum = not isinstance(config, SGD) or config.momentum > 0
    return Optimizer(config.kind, momentum, config.rank if isinstance(config, Apollo) else None)


def optim_of(asked: Optimizer) -> OptimizerConfig:
    """The other way round, all else as it is by default."""
    tree: Tree = {"kind": asked.kind}
    if asked.kind == "sgd" and not asked.momentum:
        tree["momentum"] = 0.0
    if asked.rank is not None:
        tree |= {"rank": asked.rank, "scope": "tensor"}
    return TypeAdapter(OptimizerConfig).validate_python(tree)


def adapter_of(config: PeftConfig) -> Adapter:
    match config:
        case LoraConfig() | AdaLoraConfig():
            return adapter_for(config.kind, config.rank, config.targets)
        case HoulsbyConfig():
            return replace(adapter_for(config.kind, config.size), act=config.act)
        case PromptConfig():
            return adapter_for(config.kind, config.tokens)
        case PrefixConfig():
            return replace(adapter_for(config.kind, config.tokens), hidden=config.hidden)
    return adapter_for(config.kind, None)


def peft_of(asked: Adapter) -> PeftConfig:
    """The other way round."""
    tree: Tree = {"kind": asked.kind}
    match asked.kind:
        case "lora":
            tree |= {"rank": asked.rank, "targets": list(asked.targets)}
        case "houlsby":
            tree |= {"size": asked.rank, "act": asked.act}
        case "prompt":
            tree |= {"tokens": asked.rank}
        case "prefix":
            tree |= {"tokens": asked.rank, "hidden": asked.hidden}
    return TypeAdapter[PeftConfig](PeftConfig).validate_python(tree)


# Micro-batches of data that are there


def heaviest(
    data: Sequence[Any], objective: Objective, lengths: np.ndarray | None, batch_tokens: int | None
) -> Callable[[int], Shape]:
    """Of the longest items or, where all are rows of one length, of those that need a mask. lengths: (N,) tokens of
    each item."""
    if lengths is None:
        return lambda items: max(of_rows(data, objective, items), key=masked)
    order = np.argsort(-lengths, kind="stable")
    if batch_tokens is not None:
        order = order[: int(np.searchsorted(np.cumsum(lengths[order]), batch_tokens)) + 1]

    def shape(items: int) -> Shape:
        return shape_of(data, objective, order if batch_tokens is not None else order[:items])

    return shape


def of_rows(data: Sequence[Any], objective: Objective, items: int) -> Iterator[Shape]:
    """Of batches from the first to the last: packing leaves documents that fill a row in front."""
    last = max(0, len(data) - items)
    for start in sorted({last * i // (LOOKED_AT - 1) for i in range(LOOKED_AT)}):
        yield shape_of(data, objective, range(start, min(start + items, len(data))))


def masked(shape: Shape) -> tuple[bool, int]:
    """What makes one batch of rows heavier than another: tokens that may not all see each other, then their number."""
    view = shape.lengths.packed(cuda=False)
    return not (view.single and view.full), view.cells


def shape_of(data: Sequence[Any], objective: Objective, items: Iterable[Any]) -> Shape:
    samples = [s for i in items for s in objective.samples(data[int(i)], sample_rng(0, int(i)))]
    sources = [len(s.source) for s in samples if s.source is not None]
    predicted = [len(s.labels) for s in samples if s.labels is not None]
    return Shape(
        Lengths.of([len(s.tokens) for s in samples]),
        Lengths.of(sources) if sources else None,
        sum(predicted) if predicted else None,
    )


# A run without its data


def expected(run: AnyRun, family: Family, cfg: c.Model) -> tuple[c.Model, Callable[[int], Shape]]:
    """The shape as the run will train it, and its micro-batches if all items are as long as it allows."""
    if run.model.dropout is not None:
        cfg = with_dropout(family, cfg, run.model.dropout)
    length = run.train.length if cfg.max_length is None else min(run.train.length, cfg.max_length)
    if isinstance(run, FinetuneRun):
        model = trained(run.task.kind, family, cfg, pretraining=False)
        return model, shapes(run.task.kind, model, length)
    objective = run.objective
    nsp = isinstance(objective, MLMConfig) and objective.nsp
    model = trained(objective.kind, family, cfg, pretraining=True, nsp=nsp)
    rate = objective.rate if isinstance(objective, MLMConfig | DenoiseConfig) else 0.0
    span = objective.span if isinstance(objective, DenoiseConfig) else 1.0
    return model, shapes(objective.kind, model, length, rate, span)


def read_run(path: str) -> tuple[AnyRun, Family, c.Model]:
    """A run file, and the model that it names, with the vocabulary of the tokenizer that it names."""
    tree = read_toml(path)
    kinds: dict[str, type[PretrainRun] | type[FinetuneRun]] = {"pretrain": PretrainRun, "finetune": FinetuneRun}
    verb = tree.get("verb", "pretrain" if "objective" in tree else "finetune")
    if verb not in kinds:
        raise RonnaError(f"{verb!r} trains nothing", where=path, fix=f"use a run file of {' or '.join(kinds)}")
    run = build(kinds[verb], tree, where=path)
    folder = local_folder(run.model.name)
    if folder.is_dir():
        return run, *read_config(folder)
    words = run.model.tokenizer if isinstance(run, FinetuneRun) else f"{run.data.train}/tokenizer"
    vocab = {}
    if words is not None and Path(words).is_dir():
        vocab = {"vocab_size": load_tokenizer(Path(words)).vocab_size}
    return run, *preset(run.model.name, **(run.model.settings | vocab))


def named_run(question: PlanRun, found: Asked, settings: Tree) -> AnyRun:
    """The run that a question by name stands for."""
    what = "shards of `ronna prepare`" if found.task in ("mlm", "clm", "denoise") else "the records"
    if question.data is None:
        raise RonnaError("what is it to train on?", where="write", fix=f"name {what}: --data PATH")
    length = found.work.step.lengths.length
    train: Tree = {"batch": found.work.batch, "length": length, "precision": question.precision}
    if question.tokens is not None:
        train["tokens"] = int(question.tokens)
    tree: Tree = {"out": question.out or "run", "train": train, "data": {"train": question.data}}
    if found.task in ("mlm", "clm", "denoise") and question.peft is None:
        model = {"name": question.model, "settings": settings}
        tree |= {"model": model, "objective": {"kind": found.task}, "optim": {"kind": question.optim}}
        return build(PretrainRun, tree, where="write")
    model = {"name": question.model}
    if settings or question.model in PRESETS:
        if question.tokenizer is None or question.peft is not None:
            more = ", or a tokenizer for new ones (--tokenizer)" if question.peft is None else ""
            fix = f"name a model folder{more}"
            raise RonnaError("a preset has no weights to fine-tune", where=f"model {question.model}", fix=fix)
        model |= {"settings": settings, "tokenizer": question.tokenizer}
    tree |= {"model": model, "task": {"kind": "dialogue" if found.task == "clm" else found.task}}
    tree["optim"] = {"kind": question.optim}
    if question.quantize is not None:
        tree["model"]["quantize"] = question.quantize
    if question.peft is not None:
        tree["peft"] = {"kind": question.peft} | sized(question)
    return build(FinetuneRun, tree, where="write")


def sized(question: PlanRun) -> Tree:
    if question.rank is None or question.peft not in ("lora", "adalora", "houlsby"):
        return {}
    return {"size" if question.peft == "houlsby" else "rank": question.rank}


# From a plan to a run


def with_plan(run: AnyRun, plan: Plan, work: Work) -> AnyRun:
    """The run as the plan has it."""
    step, asked = plan.step, work.step
    tree: Tree = run.model_dump(mode="json", exclude_none=True)
    train: Tree = tree["train"]
    ranks = step.ranks
    micro = min(plan.micro * ranks.parts, run.train.batch)
    if micro != micro_of(run):
        train["micro_batch"] = micro
    if micro == run.train.batch:
        train.pop("micro_batch", None)
    if (step.blocks, step.feeds) != (asked.blocks, asked.feeds):
        train["recompute"] = {"blocks": step.blocks, "feeds": step.feeds}
    train |= {"weights": step.weights, "fused_backward": step.fused_backward, "offload": list(step.offload)}
    if ranks.size > 1:
        names = ("replicate", "pipeline", "chunks", "context", "tensor")
        degrees = {name: getattr(ranks, name) for name in names}
        tree["parallel"] = {**tree.get("parallel", {}), **degrees}
    if not step.clip:
        train["clip"] = 0.0
    if step.optimizer != asked.optimizer:
        kept = {key: value for key, value in tree["optim"].items() if key in SHARED}
        # Adam has no decay, where the others have one unless they are told.
        tree["optim"] = {"weight_decay": 0.0, **kept, "kind": step.optimizer.kind}
        if step.optimizer.rank is not None:
            tree["optim"] |= {"rank": step.optimizer.rank, "scope": "tensor"}
    return type(run).model_validate(tree)
