"""What each verb brings to a training run: model, tokenizer, data, objective, and how to evaluate it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ronna.base.device import choose_device, choose_precision
from ronna.base.errors import RonnaError
from ronna.base.hub import PREFIX as HUB
from ronna.base.hub import local_folder
from ronna.base.track import say, say_marked
from ronna.data.files import hash_files
from ronna.data.loader import sample_rng
from ronna.data.shards import Shards
from ronna.labelled import read_splits, resolve_splits
from ronna.model.config import Model
from ronna.model.families import PRESETS, Family, preset, read_config, read_config_json, with_dropout
from ronna.model.folder import load_folder
from ronna.model.fourbit import held_in, import_bitsandbytes
from ronna.model.init import Allot, build, hold, hold_maps, on_cpu
from ronna.model.tensorfiles import fingerprint
from ronna.model.transformer import Transformer
from ronna.objectives.base import Batch, Objective, Totals, collate
from ronna.objectives.documents import PackedDocuments
from ronna.objectives.penalty import Penalised
from ronna.packed import Packed, read_packed, refuse_settings
from ronna.parallel.world import ALONE, World
from ronna.peft.adalora import AdaLoraConfig, orthogonality, triplets_of
from ronna.peft.methods import NAME, PeftConfig, adapt, longest_text, reads_base, trained
from ronna.runfile import FinetuneRun, PretrainRun, StartConfig
from ronna.tasks.base import Task
from ronna.tasks.metrics import Scores
from ronna.tasks.table import TASKS
from ronna.text.tokenizer import Tokenizer, load_tokenizer
from ronna.train.loop import Evaluation

Stop = Callable[[], bool]


@dataclass
class Parts:
    """Everything a run needs that depends on its verb. `lengths` are the items' tokens where batches are to be
    made of items of like length, None where items are full rows."""

    model: Transformer
    family: Family
    tokenizer: Tokenizer
    objective: Objective
    data: Sequence[Any]
    lengths: np.ndarray | None
    hashes: dict[str, str]
    account: dict[str, Any]
    evaluate: Callable[[Stop], Evaluation | None] | None = None
    test: Callable[[Transformer], dict[str, Scores]] = field(default=lambda model: {})
    labels: list[str] | None = None
    problem_type: str | None = None
    peft: PeftConfig | None = None  # the method, where only an adapter is trained
    base: str = ""  # the folder that the model came from
    folder_keys: dict[str, Any] = field(default_factory=dict)  # for config.json
    folder_files: dict[str, str] = field(default_factory=dict)  # for the folder, by name
    prepare: Callable[[], None] | None = None  # to be called on the model as it is before training, without adapters
    used: Tensor | None = None  # the token ids in `data`, in order; None: not counted


# Pre-training


def assemble_pretrain(
    run: PretrainRun, packed: Packed | None = None, world: World = ALONE, allot: Allot = on_cpu
) -> Parts:
    """A model on `packed` rows, which are read where they are not given."""
    packed = read_packed(run) if packed is None else packed
    shards, tokenizer, objective = packed.shards, packed.tokenizer, packed.objective
    model = pretrain_model(run, packed, allot)
    hashes = {"data": hash_files([Path(run.data.train) / "manifest.json"]), "tokenizer": tokenizer.hash}
    account = {"documents": len(shards), "tokens": int(shards.lengths.sum()), "packing": packed.rows.packing.fill}
    parts = Parts(model, packed.family, tokenizer, objective, packed.rows, None, hashes, account)
    folder = validation_folder(run)
    if folder is not None:
        validation = Shards(folder, expect_tokenizer=tokenizer.hash)
        held = PackedDocuments(validation, run.train.length, objective.overhead)
        parts.evaluate = loss_on(parts, held, run, world)
    return parts


def validation_folder(run: PretrainRun) -> Path | None:
    if run.data.validation is not None:
        return Path(run.data.validation)
    train = Path(run.data.train)
    beside = train.parent / "validation"
    return beside if train.name == "train" and beside.is_dir() else None


def pretrain_model(run: PretrainRun, packed: Packed, allot: Allot) -> Transformer:
    if not packed.loads:
        return new_model(packed.family, packed.cfg, run, allot)
    loaded = load_folder(
        packed.folder, head=True, classifier=packed.cfg.classifier, seed=run.seed, dropout=run.model.dropout,
        precision=precision_of(run), allot=allot,
    )  # fmt: skip
    for note in loaded.notes:
        say(note)
    return loaded.model


def loss_on(parts: Parts, held: PackedDocuments, run: PretrainRun, world: World) -> Callable[[Stop], Evaluation | None]:
    """Mean of each loss term over the first rows of held-out data, which the ranks share, under the same masks every
    time."""
    rows = min(len(held), run.data.validation_rows)
    objective, size = parts.objective, run.train.micro_batch or run.train.batch

    def batch_of(items: Sequence[int]) -> Batch:
        samples = [s for i in items for s in objective.samples(held[i], sample_rng(run.seed, i))]
        return collate(objective, samples, parts.model.device)

    @torch.inference_mode()
    def evaluate(stop: Stop) -> Evaluation | None:
        parts.model.eval()
        totals = Totals()
        for first in range(0, rows, size):
            if stop():
                return None
            items = range(first, min(rows, first + size))
            mine = world.share(items)
            batch = batch_of(mine) if mine else batch_of(items[:1]).standing_in()
            loss = objective.loss(parts.model, batch)
            totals.add(loss.nothing() if batch.stands_in else loss.sums | loss.stats, batch.counts)
        totals = Totals(world.total_sums(totals.sums), world.total_counts(totals.counts))
        return Evaluation(totals.means(), "loss", higher_is_better=False)

    return evaluate


# Models


def new_model(family: Family, cfg: Model, run: PretrainRun | FinetuneRun, allot: Allot) -> Transformer:
    """New weights, with the dropout that the user asked for, in no other precision than they are to have."""
    rate = run.model.dropout
    return build(cfg if rate is None else with_dropout(family, cfg, rate), run.seed, matrices(run), allot)


def matrices(run: PretrainRun | FinetuneRun) -> torch.dtype:
    return torch.bfloat16 if run.train.weights == "bf16" else torch.float32


def precision_of(run: PretrainRun | FinetuneRun) -> Callable[[Transformer], None]:
    """What gives the parameters of a model that is read the precision they are to have, so that none is ever wide.

    Beneath an adapter linear maps will be frozen in the precision of the computation (`freeze_to`), and nobody looks at
    their other bits before; the rest of the base has to wait for that.
    """
    if isinstance(run, FinetuneRun) and run.peft is not None:
        computed, _ = choose_precision(run.train.precision, choose_device(run.device))
        return partial(hold_maps, matrices=torch.float32 if reads_base(run.peft) else computed)
    return partial(hold, matrices=matrices(run))


# Fine-tuning


@dataclass(frozen=True)
class Labelled:
    """What fine-tuning has before there is a model to train: the trials of a search have it in common.

    lengths: (N,) tokens of each training example. used: the token ids in them, in order.
    """

    folder: Path
    family: Family
    cfg: Model
    tokenizer: Tokenizer
    task: Task
    examples: dict[str, list[Any]]  # by split
    lengths: np.ndarray
    used: Tensor
    hashes: dict[str, str]
    account: dict[str, Any]

    def without_test(self) -> "Labelled":
        return replace(self, examples={name: some for name, some in self.examples.items() if name != "test"})


def read_labelled(run: FinetuneRun) -> Labelled:
    """The records of every split as the task has them. Raises RonnaError."""
    folder = local_folder(run.model.name)
    family, cfg, tokenizer = starting_point(run.model, folder)  # a mistyped folder should not wait for the data
    check_quantize(run, folder)
    kind, splits = TASKS[run.task.kind], resolve_splits(run.data)
    rows, account = read_splits(kind, splits, run.data, Path(run.out))
    limit = longest_text(cfg, run.peft)
    length = run.train.length if limit is None else min(run.train.length, limit)
    task = kind.learn(run.task, rows["train"], tokenizer, length)
    task = task.on(cfg, read_config_json(folder) if folder.is_dir() else {})
    say(f"task: {task.title}")
    examples: dict[str, list[Any]] = {}
    for name, some in rows.items():
        task.check_labels(some, where=str(splits[name][0]) if splits.get(name) else name)
        done: dict[str, int] = {}
        examples[name] = task.encode(some, done, training=name == "train")
        account["splits"].setdefault(name, {}).update(done)
    account |= account["splits"]["train"]
    hashes = {
        "data": hash_files([p for paths in splits.values() for p in paths]),
        "tokenizer": tokenizer.hash,
    }
    items = [item for example in examples["train"] for item in task.items(example)]
    samples = [task.samples(item, sample_rng(0, 0)) for item in items]
    examples["train"] = list(compress(items, samples))
    samples = list(filter(None, samples))
    tokens = [[t for s in some for t in (s.tokens, s.source) if t is not None] for some in samples]
    if not any(tokens):
        fix = "look at the rows with `ronna data inspect`, or raise train.length"
        raise RonnaError("no training row gives anything to learn", where=run.data.train, fix=fix)
    lengths = np.array([sum(map(len, some)) for some in tokens])
    used = torch.from_numpy(np.unique(np.concatenate([t for some in tokens for t in some])).astype(np.int64))
    if pieces := task.preview(examples["train"]):
        say_marked("one example, with what is to be learnt marked", pieces)
    # The folder will tell whoever loads it to cut texts where training cut them.
    saved = task.tokenizer.with_max_length(length)
    return Labelled(folder, family, cfg, saved, task, examples, lengths, used, hashes, account)


def assemble_finetune(
    run: FinetuneRun, data: Labelled | None = None, world: World = ALONE, allot: Allot = on_cpu
) -> Parts:
    """A model with the task's head on `data`, which is read where it is not given."""
    data = read_labelled(run) if data is None else data
    task, examples = data.task.shared(world), data.examples
    model = finetune_model(run, data, allot)
    parts = Parts(
        model, data.family, data.tokenizer, task, examples["train"], data.lengths, dict(data.hashes), data.account
    )
    parts.labels, parts.problem_type, parts.folder_keys = task.score_names, task.problem_type, task.folder_keys
    parts.folder_files, parts.used = task.folder_files(data.cfg), data.used
    if run.peft is not None:
        train_adapter(run.peft, run, parts, data.folder)
    held = {name: examples[name] for name in ("validation", "test") if examples.get(name)}
    parts.prepare = partial(prepare, task, model, list(examples.values()))
    parts.evaluate = lambda stop: judge(task, parts.model, held["validation"])
    parts.test = lambda best: {n: task.measure(e, task.infer(best, e)) for n, e in held.items()}
    return parts


def prepare(task: Task, model: Transformer, splits: list[list[Any]]) -> None:
    for examples in splits:
        task.prepare(model, examples)


def train_adapter(method: PeftConfig, run: FinetuneRun, parts: Parts, folder: Path) -> None:
    """Freeze the model but for a fresh adapter, and remember which base it belongs to."""
    if run.model.scratch or not folder.is_dir():
        fix = "leave out one of the two"
        raise RonnaError("an adapter of new weights has no base to stand on", where="model.scratch", fix=fix)
    adapt(parts.model, method, seed=run.seed)
    if isinstance(method, AdaLoraConfig):
        changes, weight = triplets_of(parts.model, NAME), method.orthogonality
        parts.objective = Penalised(parts.objective, "orthogonality", lambda: weight * orthogonality(changes))
    learning = sum(p.numel() for p in trained(parts.model).values())
    say(f"{method.kind}: {learning:,} weights learn, {learning / parts.model.cfg.params():.2%} of the model's")
    hub = run.model.name.startswith(HUB)
    parts.peft, parts.base = method, run.model.name.removeprefix(HUB) if hub else str(folder.resolve())
    parts.hashes["base"] = fingerprint(folder)
    parts.folder_keys = {**parts.folder_keys, "base_fingerprint": parts.hashes["base"]}


def judge(task: Task, model: Transformer, examples: list[Any]) -> Evaluation:
    values = task.judge(model, examples)
    monitor = next(iter(values))
    return Evaluation(values, monitor, higher_is_better(monitor))


def higher_is_better(monitor: str) -> bool:
    return monitor != "loss"


def starting_point(config: StartConfig, folder: Path) -> tuple[Family, Model, Tokenizer]:
    """Family, shape and tokenizer of a folder, or of a preset with the user's tokenizer."""
    if folder.is_dir():
        refuse_settings(config)
        if config.tokenizer is not None:
            fix = "leave it out, or name a preset as the model"
            raise RonnaError("a model folder has a tokenizer of its own", where="model.tokenizer", fix=fix)
        return *read_config(folder), load_tokenizer(folder)
    if config.tokenizer is None:
        if config.name not in PRESETS:
            read_config(folder)  # which says that there is no such folder
        fix = "name a folder with one: --tokenizer FOLDER"
        raise RonnaError(f"the preset {config.name} has no tokenizer of its own", where="model.tokenizer", fix=fix)
    tokenizer = load_tokenizer(config.tokenizer)
    return *preset(config.name, vocab_size=tokenizer.vocab_size, **config.settings), tokenizer


def finetune_shape(data: Labelled) -> Model:
    """With the task's head."""
    head = data.cfg.head if data.task.writes else None
    return replace(data.cfg, head=head, classifier=data.task.classifier(data.family, data.cfg))


def finetune_model(run: FinetuneRun, data: Labelled, allot: Allot) -> Transformer:
    """The folder's model with the task's head, or the same architecture with new weights."""
    cfg, folder = finetune_shape(data), data.folder
    if run.model.scratch or not folder.is_dir():
        return new_model(data.family, cfg, run, allot)
    dropout, quantize = run.model.dropout, run.model.quantize
    loaded = load_folder(
        folder, head=data.task.writes, classifier=cfg.classifier, seed=run.seed, dropout=dropout, quantize=quantize,
        precision=precision_of(run), allot=allot,
    )  # fmt: skip
    for note in (*loaded.notes, held_in(loaded.model)):
        if note is not None:
            say(note)
    return loaded.model


def check_quantize(run: FinetuneRun, folder: Path) -> None:
    """Raises RonnaError where weights in 4 bits would have to learn, are none yet, or the library is not there."""
    if run.model.quantize is None:
        return
    where = "model.quantize"
    if run.peft is None:
        fix = "add an adapter (--peft lora), or leave it out"
        raise RonnaError("weights in 4 bits cannot learn", where=where, fix=fix)
    if run.model.scratch or not folder.is_dir():
        fix = "name a model folder, or leave it out"
        raise RonnaError("new weights in 4 bits would have nothing in them to adapt", where=where, fix=fix)
    import_bitsandbytes()
