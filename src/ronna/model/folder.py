"""Hugging Face model folders: config.json and safetensors, in the names and layout of transformers."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ronna.base.errors import RonnaError
from ronna.model import config as c
from ronna.model.boxes import Box, box_of, local
from ronna.model.families import (
    Family,
    Weight,
    locate,
    read_config,
    read_config_json,
    with_dropout,
)
from ronna.model.folder_config import folder_config, write_config
from ronna.model.fourbit import Quantize, narrowed
from ronna.model.init import Allot, initialise, on_cpu
from ronna.model.layers import block_linears
from ronna.model.tensorfiles import TensorFiles, dtype_name, write_tensors
from ronna.model.transformer import Transformer

# Architectures whose folders hold a vocabulary head even where it has no weights of its own.
LANGUAGE_MODEL = re.compile(r"LM|Generation|PreTraining|MTModel")
PIECE = 2**22  # numbers that are read at a time
GET_ALL = "get the whole folder"
BY_LABEL = ("classifier.out.", "classifier.transitions")  # parameters whose shape is the number of labels


@dataclass(frozen=True)
class Loaded:
    """A model read from a folder, its config.json as it stands, and what was left out or is new."""

    model: Transformer
    family: Family
    config: dict[str, Any]
    notes: list[str]


def load_folder(
    path: str | Path,
    *,
    head: bool | Literal["auto"] = "auto",
    classifier: c.Classifier | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    dropout: float | None = None,
    quantize: Quantize | None = None,
    precision: Callable[[Transformer], object] | None = None,
    allot: Allot = on_cpu,
) -> Loaded:
    """The model in a Hugging Face folder, with parameters in `dtype`, wherever `allot` puts them.

    head: with or without the vocabulary head; "auto" takes the heads that the folder has, its classifier
    included. classifier: have this one (whatever `head` says). dropout: the rate, or None for the folder's own.
    quantize: hold the linear maps of the blocks in 4 bits. precision: gives parameters, which have no memory yet,
    another one than `dtype`. What is wanted and not in the folder is drawn
    from `seed`, what is there and not wanted is left out; `notes` tell. Weights are read one at a time, and never
    held wide together where they are quantized.
    Raises RonnaError for families and settings we do not support, for missing, unknown or misshapen weights,
    and for folders with pickled weights only.
    """
    folder = Path(path)
    config = read_config_json(folder)
    family, cfg = read_config(folder)
    with TensorFiles(folder) as files:
        stored = Stored(files, family, str(folder))
        if head == "auto":
            head, classifier = stored.has_head(cfg, config), classifier or cfg.classifier
        cfg = replace(cfg, head=cfg.head if head else None, classifier=classifier)
        cfg = stored.settle_duplicates(cfg)
        cfg = cfg if dropout is None else with_dropout(family, cfg, dropout)
        with torch.device("meta"):
            model = Transformer(cfg).to(dtype)
        if precision is not None:
            precision(model)
        places, fresh, notes = stored.match(model)
        narrow = {path: narrowed(linear, quantize) for path, linear in block_linears(model)} if quantize else {}
        allot(model)
        with torch.no_grad():
            for path, linear in narrow.items():
                linear.hold(stored.read(places[f"{path}.weight"], 2))
            for name, parameter in model.named_parameters():
                if name in places:
                    stored.fill(parameter, places[name])
    if fresh:
        initialise(model, seed, only=fresh)
        notes.append(f"not in {folder}, drawn anew: {listed(sorted(fresh))}")
    return Loaded(model, family, config, notes)


@torch.no_grad()
def load_weights(model: Transformer, family: Family, folder: Path) -> None:
    """Put the weights that `save_folder` wrote of this very model back into it, one at a time. Raises RonnaError."""
    with TensorFiles(folder) as files:
        stored = Stored(files, family, str(folder))
        with torch.device("meta"):  # of several ranks this one may have some of the blocks alone
            places, fresh, _ = stored.match(Transformer(model.cfg))
        if fresh:
            raise RonnaError(f"weights are missing: {listed(sorted(fresh))}", where=str(folder), fix=GET_ALL)
        for name, parameter in model.named_parameters():
            stored.fill(parameter, places[name])


def is_language_model(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model with a vocabulary head, or does not say."""
    classes = config.get("architectures") or []
    return not classes or any(LANGUAGE_MODEL.search(name) for name in classes)


class Stored:
    """The weights of a folder under the full names of their family.

    Folders of a base model leave out the family's prefix, and very old ones call LayerNorm's weights
    gamma and beta. `keys` maps the full names to those in the files.
    """

    def __init__(self, files: TensorFiles, family: Family, where: str):
        self.files, self.family, self.where = files, family, where
        prefix = family.prefix
        bare = not any(key.startswith((prefix, family.spans_prefix or prefix)) for key in files.names)
        self.keys: dict[str, str] = {}
        for key in files.names:
            full = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", key)
            full = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", full)
            if family.spans_prefix and full.startswith(family.spans_prefix):
                full = prefix + full.removeprefix(family.spans_prefix)
            elif bare and not family.in_head(full):
                full = prefix + full
            if not re.match(family.ignored, full):
                self.keys[full] = key

    def has_head(self, cfg: c.Model, config: Mapping[str, Any]) -> bool:
        """Whether the folder holds a vocabulary head: its own logits, or an architecture that ties them."""
        names = self.family.names(cfg)
        own = [locate(names, n).name for n in parameter_names(cfg) if n.startswith("head.logits.")]
        if own:
            return any(name in self.keys for name in own)
        return is_language_model(config)

    def settle_duplicates(self, cfg: c.Model) -> c.Model:
        """Set aside copies of tied weights. RonnaError for one that differs, unless it means two matrices."""
        for copy, original in self.family.duplicates(cfg).items():
            if copy not in self.keys:
                continue
            if original not in self.keys:
                self.keys[original] = self.keys.pop(copy)
            elif self.same(copy, original):
                del self.keys[copy]
            elif self.family.unties(cfg) and cfg.head and copy == self.output(cfg):
                cfg = replace(cfg, head=replace(cfg.head, tied=False))
            else:
                raise RonnaError(
                    f"{copy} and {original} are one matrix by config.json, but differ",
                    where=self.where,
                    fix='set "tie_word_embeddings": false in config.json if two are meant',
                )
        return cfg

    def output(self, cfg: c.Model) -> str | None:
        names = self.family.names(cfg)
        return locate(names, "head.logits.weight").name if "head.logits" in names else None

    def same(self, a: str, b: str) -> bool:
        shape = self.files.shape(self.keys[a])
        if shape != self.files.shape(self.keys[b]):
            return False
        first, second = (self.files.read(self.keys[k], 0, shape[0], 0) for k in (a, b))
        return torch.equal(first.float(), second.float())

    def match(self, model: Transformer) -> tuple[dict[str, Weight], set[str], list[str]]:
        """Where each parameter lies, which are to be drawn, and notes on what is left out."""
        names = self.family.names(model.cfg)
        places, fresh, absent, replaced = {}, set(), [], []
        for name, parameter in model.named_parameters():
            weight = locate(names, name)
            in_head = name.startswith(("head.", "classifier."))
            if weight.name not in self.keys:
                fresh.add(name) if in_head else absent.append(weight.name)
            elif name.startswith(BY_LABEL) and self.files.shape(self.keys[weight.name]) != parameter.shape:
                fresh.add(name)
                replaced.append(weight.name)
            else:
                self.check_shape(weight, tuple(parameter.shape))
                places[name] = weight
        if absent:
            raise RonnaError(f"weights are missing: {listed(absent)}", where=self.where, fix=GET_ALL)
        extra = sorted(self.keys.keys() - {w.name for w in places.values()} - set(replaced))
        unknown = [key for key in extra if not self.family.in_head(key)]
        if unknown:
            raise RonnaError(
                f"weights that no part of this {self.family.name} model has: {listed(unknown)}",
                where=self.where,
                fix="check that config.json belongs to these weights",
            )
        notes = [f"{listed(replaced)}: made for another number of labels"] if replaced else []
        return places, fresh, notes + ([f"left out of {self.where}: {listed(extra)}"] if extra else [])

    def check_shape(self, weight: Weight, ours: tuple[int, ...]) -> None:
        wanted = stored_shape(weight, ours)
        found = self.files.shape(self.keys[weight.name])
        if found != wanted:
            raise RonnaError(
                f"{weight.name} has shape {list(found)}, by config.json it is {list(wanted)}",
                where=self.where,
                fix="check that config.json belongs to these weights",
            )

    def fill(self, parameter: Tensor, weight: Weight) -> None:
        """Read one of our tensors, or what of it lies here, into its place, a large one by some rows at a time."""
        here, box = local(parameter), box_of(parameter)
        step = max(1, PIECE // max(1, parameter.shape[1:].numel()))
        _, *columns = box.within(Box.all_of(parameter.shape))
        for start in range(0, len(here), step):
            stop = min(len(here), start + step)
            first, last = box.start[0] + start, box.start[0] + stop
            here[start:stop].copy_(self.read(weight, here.ndim, first, last)[(slice(None), *columns)])

    def read(self, weight: Weight, ndim: int, start: int = 0, stop: int | None = None) -> Tensor:
        """One of our tensors, or its rows from `start` to `stop`, cut out of the stored one where it is fused there."""
        key = self.keys[weight.name]
        flipped = weight.row or (weight.transpose and ndim == 2)
        rows = self.files.shape(key)[1 if flipped else 0] // weight.parts
        first, last = weight.part * rows + start, weight.part * rows + (rows if stop is None else stop)
        tensor = self.files.read(key, first, last, 1 if flipped else 0)
        return tensor[0] if weight.row else tensor.T if flipped else tensor


def stored_shape(weight: Weight, ours: tuple[int, ...]) -> tuple[int, ...]:
    whole = (ours[0] * weight.parts, *ours[1:])
    if weight.row:
        return (1, *whole)
    return whole[::-1] if weight.transpose else whole


def parameter_names(cfg: c.Model) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter of a model, tied ones once."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Transformer(cfg).named_parameters()}


def listed(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def save_folder(
    model: Transformer,
    family: Family,
    folder: str | Path,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    labels: list[str] | None = None,
    problem_type: str | None = None,
    max_shard_bytes: int = 5 * 2**30,
    dtype: torch.dtype | None = None,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json and model.safetensors as transformers would, so that it loads them as they are.

    tensors: the state to write instead of the model's own (a copy, an average). labels: names of the
    classifier's scores; problem_type as transformers calls it. Shards are written above max_shard_bytes.
    dtype: None keeps each tensor's. extra_config: further keys, say those of the folder a model came from;
    what the model itself says wins, except for token ids and, where they fit, label names.

    Raises RonnaError for a model that the family's folders cannot express, OSError where
    the disk refuses.
    """
    own = model.state_dict()
    types = {name: tensor.dtype for name, tensor in own.items()}
    more: dict[str, Any] = {"labels": labels, "problem_type": problem_type, "extra_config": extra_config}
    save_state(
        model.cfg, family, Path(folder), own if tensors is None else tensors, types,
        max_shard_bytes=max_shard_bytes, dtype=dtype, **more,
    )  # fmt: skip


def save_state(
    cfg: c.Model,
    family: Family,
    folder: Path,
    state: Mapping[str, Tensor],
    types: Mapping[str, torch.dtype],
    *,
    labels: list[str] | None = None,
    problem_type: str | None = None,
    max_shard_bytes: int = 5 * 2**30,
    dtype: torch.dtype | None = None,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """`save_folder` of a model that is not looked at: `types` are what it holds its tensors in."""
    config = folder_config(family, cfg, labels, problem_type, extra_config)
    bare = family.prefix if cfg.head is None and cfg.classifier is None else ""
    names, pieces, shapes = family.names(cfg), dict[str, list[tuple[Weight, str]]](), parameter_names(cfg)
    for name in shapes:
        weight = locate(names, name)
        pieces.setdefault(family.stored_name(cfg, weight.name).removeprefix(bare), []).append((weight, name))
    widest = types["embedding.tokens.weight"]
    held = {key: types.get(parts[0][1], widest) for key, parts in pieces.items()}
    kinds = {key: dtype or held[key] for key in sorted(pieces)}
    sizes = {key: sum(math.prod(shapes[name]) for _, name in pieces[key]) * kinds[key].itemsize for key in kinds}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, kinds, sizes, lambda key: fuse(pieces[key], state, dtype), max_shard_bytes)
    config["dtype"] = dtype_name(dtype or widest)
    write_config(folder, config)


def fuse(parts: list[tuple[Weight, str]], state: Mapping[str, Tensor], dtype: torch.dtype | None) -> Tensor:
    """The stored tensor that our tensors make up; the inverse of `Stored.read`."""
    found = [state[name].detach() for _, name in sorted(parts, key=lambda p: p[0].part)]
    whole = torch.cat(found) if len(found) > 1 else found[0]
    weight = parts[0][0]
    whole = whole[None] if weight.row else whole.T if weight.transpose and whole.ndim == 2 else whole
    return whole.to("cpu", dtype or whole.dtype)
