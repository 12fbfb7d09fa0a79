"""What every adapter's folder has: its settings and tensors, and weights of the base that were trained with it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ronna.base.config import build
from ronna.base.errors import RonnaError
from ronna.model import config as c
from ronna.model.families import OWN, Family, locate, read_config
from ronna.model.families.base import Count
from ronna.model.transformer import Transformer
from ronna.peft.own import copy_own

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = ("LORA", "PROMPT_TUNING", "PREFIX_TUNING", "RONNA")
AGAIN = "copy or download the folder again"
FITS = "give the base that the adapter was trained on"


class Settings(BaseModel):
    """Types of what is read of an adapter's settings; `peft` writes many more."""

    model_config = ConfigDict(frozen=True, extra="allow")

    lora_alpha: FiniteFloat = 8
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: bool | None = None
    alpha_pattern: dict[str, FiniteFloat] | None = None
    num_virtual_tokens: Count | None = None

    @field_validator("alpha_pattern")
    @classmethod
    def _regexes(cls, patterns: dict[str, float] | None) -> dict[str, float] | None:
        for pattern in patterns or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return patterns


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter as it lies on the disk."""

    folder: Path
    settings: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def base(self) -> str:
        return str(self.settings["base_model_name_or_path"])

    @property
    def described(self) -> c.Model | None:
        """The adapted model, where a config.json tells; `peft` writes none."""
        return read_config(self.folder)[1] if (self.folder / "config.json").is_file() else None


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read_adapter(folder: Path) -> AdapterFolder:
    """Raises RonnaError for a folder that is not a whole adapter, or of a method that we do not have."""
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        base, kind = settings["base_model_name_or_path"], settings["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RonnaError(f"not the settings of an adapter: {error}", where=f"{folder}/{CONFIG}", fix=AGAIN) from None
    if not isinstance(kind, str) or kind not in KINDS or not isinstance(base, str):
        fix = "use a LoRA, a prompt, or a folder that `ronna finetune` wrote"
        raise RonnaError(f"adapters of type {kind!r} are not supported", where=f"{folder}/{CONFIG}", fix=fix)
    build(Settings, settings, where=f"{folder}/{CONFIG}")
    try:
        return AdapterFolder(folder, settings, load_file(folder / WEIGHTS))
    except (OSError, SafetensorError) as error:
        raise RonnaError(f"cannot be read: {error}", where=f"{folder}/{WEIGHTS}", fix=AGAIN) from None


def stored_name(model: Transformer, family: Family, name: str) -> str:
    """A family's name in transformers' class of this model, which without any head is the bare one."""
    bare = family.prefix if model.cfg.head is None and model.cfg.classifier is None else ""
    return family.stored_name(model.cfg, name).removeprefix(bare)


def kept_whole(
    model: Transformer, family: Family, state: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], list[str] | None]:
    """The base's own weights that were trained, by their names in `peft`, and the modules it is to load them into."""
    names = family.names(model.cfg)
    beside = {name: stored_name(model, family, locate(names, name).name) for name in state if ".changes." not in name}
    modules = sorted({saved_module(theirs) for ours, theirs in beside.items() if ours not in OWN}) or None
    return {prefix + theirs: state[ours] for ours, theirs in beside.items()}, modules


def saved_module(key: str) -> str:
    """The module that `peft` is to keep whole: it takes a classifier at its root, whatever is inside."""
    root = key.partition(".")[0]
    return root if root in ("classifier", "score", "qa_outputs") else key.rpartition(".")[0]


@torch.no_grad()
def copy_beside(
    model: Transformer, family: Family, adapter: AdapterFolder, name: str, prefix: str, missing: set[str]
) -> set[str]:
    """Weights of the base that were trained with the adapter, such as a classifier; returns their keys.

    missing: names of the classifier's weights that have no value without it.
    """
    names, keys = family.names(model.cfg), {}
    for ours, _ in model.named_parameters():
        if ".changes." not in ours:
            key = prefix + stored_name(model, family, locate(names, ours).name)
            if key in adapter.tensors:
                keys[ours] = key
            elif ours.removeprefix("classifier.") in missing:
                raise RonnaError(f"{key} is missing", where=f"{adapter.folder}/{WEIGHTS}", fix=AGAIN)
    copy_own(model, name, [ours for ours in keys if not ours.startswith("classifier.")])
    live = dict(model.named_parameters())
    for ours, key in keys.items():
        put(live[ours], adapter.tensors[key], ours, adapter)
    return set(keys.values())


def put(parameter: torch.nn.Parameter, value: Tensor, name: str, adapter: AdapterFolder) -> None:
    if parameter.shape != value.shape:
        shapes = f"{list(value.shape)}, the model has {list(parameter.shape)}"
        raise RonnaError(f"{name} has shape {shapes}", where=str(adapter.folder), fix=FITS)
    parameter.data.copy_(value)
