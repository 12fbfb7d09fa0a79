"""A LoRA as the `peft` library has it on disk.

Where transformers has one map for several of ours (GPT-2's c_attn), ours stand in it as blocks, its rank their sum.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ronna.base.errors import RonnaError
from ronna.model.families import Family, Weight, locate
from ronna.model.layers import Linear, block_linears
from ronna.model.transformer import Transformer
from ronna.peft.adalora import AdaLoraConfig
from ronna.peft.changes import attach_change
from ronna.peft.files import FITS, AdapterFolder, copy_beside, kept_whole, stored_name
from ronna.peft.lora import LoraConfig, LowRank
from ronna.peft.methods import NAME

PREFIX = "base_model.model."  # of transformers' names
LOW_RANK = re.compile(r"(.+)\.lora_(A|B|magnitude_vector)(?:\.weight)?")


@dataclass(frozen=True)
class Place:
    """Where one of our linear maps lies in transformers' model."""

    path: str
    linear: Linear
    weight: Weight


def places(model: Transformer, family: Family) -> dict[str, list[Place]]:
    """Our linear maps of the blocks by the module of transformers that holds them, in its order."""
    names = family.names(model.cfg)
    found: dict[str, list[Place]] = {}
    for path, linear in block_linears(model):
        weight = locate(names, f"{path}.weight")
        stored = stored_name(model, family, weight.name)
        found.setdefault(stored.removesuffix(".weight"), []).append(Place(path, linear, weight))
    return {module: sorted(some, key=lambda p: p.weight.part) for module, some in found.items()}


def as_lora(
    model: Transformer, family: Family, config: LoraConfig | AdaLoraConfig, state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and tensors of a LoRA, in the names of the `peft` library.

    AdaLoRA's triplets are a LoRA too once their numbers are multiplied in: of the ranks that are left.
    """
    stored: dict[str, Tensor] = {}
    rank = config.rank if isinstance(config, LoraConfig) else config.target_rank
    scale = config.scale
    rslora, dora = (config.rslora, config.dora) if isinstance(config, LoraConfig) else (False, False)
    targets, ranks, alphas = [], {}, {}
    known = places(model, family)
    for module, some in known.items():
        parts = [(p.weight.part, *factors) for p in some if (factors := low_rank(state, p.path))]
        if not parts:
            continue
        rows, at = some[0].linear.out_features, 0
        whole = torch.zeros(rows * some[0].weight.parts, sum(len(a) for _, a, _ in parts))
        for part, a, b in parts:
            whole[part * rows : (part + 1) * rows, at : at + len(a)] = b
            at += len(a)
        stored[f"{PREFIX}{module}.lora_A.weight"] = torch.cat([a for _, a, _ in parts])
        stored[f"{PREFIX}{module}.lora_B.weight"] = whole
        if dora:
            stored[f"{PREFIX}{module}.lora_magnitude_vector"] = torch.cat([magnitude(p, state) for p in some])
        targets.append(module)
        if at != rank:
            ranks[module], alphas[module] = at, scale * (at**0.5 if rslora else at)
    more, modules = kept_whole(model, family, state, PREFIX)
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * (rank**0.5 if rslora else rank),
        "lora_dropout": config.dropout,
        "use_rslora": rslora,
        "use_dora": dora,
        "bias": "none",
        "fan_in_fan_out": any(p.weight.transpose for some in known.values() for p in some),
        "target_modules": targets,
        "modules_to_save": modules,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    return settings, stored | more


def low_rank(state: Mapping[str, Tensor], path: str) -> tuple[Tensor, Tensor] | None:
    """The factors a (r, I) and b (O, r) of a map's adapter; None where it has none, or no rank is left of it."""
    name = f"{path}.changes.{NAME}"
    if f"{name}.a" not in state:
        return None
    a, b, e = state[f"{name}.a"], state[f"{name}.b"], state.get(f"{name}.e")
    if e is not None:
        kept = e != 0
        a, b = (a * e[:, None])[kept], b[:, kept]
    return (a, b) if len(a) else None


def magnitude(place: Place, state: Mapping[str, Tensor]) -> Tensor:
    """A map's learnt lengths, or those it has, which change nothing."""
    learnt = state.get(f"{place.path}.changes.{NAME}.magnitude")
    return torch.linalg.vector_norm(place.linear.weight.detach().float(), dim=1).cpu() if learnt is None else learnt


def attach_lora(model: Transformer, family: Family, adapter: AdapterFolder, name: str, missing: set[str]) -> set[str]:
    """Attach what the file holds; returns the keys that were used."""
    used: set[str] = set()
    low: dict[str, dict[str, str]] = {}
    for key in adapter.tensors:
        if found := LOW_RANK.fullmatch(key.removeprefix(PREFIX)):
            low.setdefault(found[1], {})[found[2]] = key
    known = places(model, family)
    for module, keys in low.items():
        if module not in known or not {"A", "B"} <= keys.keys():
            continue  # told as unknown
        a, b = (adapter.tensors[keys[x]] for x in "AB")
        scale = lora_scale(adapter.settings, module, len(a))
        rows = known[module][0].linear.out_features
        if a.shape[1] != known[module][0].linear.in_features or len(b) != rows * known[module][0].weight.parts:
            shapes = f"{list(a.shape)}, {list(b.shape)}"
            raise RonnaError(f"{module}: a LoRA of shapes {shapes}", where=str(adapter.folder), fix=FITS)
        for place in known[module]:
            part = slice(place.weight.part * rows, (place.weight.part + 1) * rows)
            in_use = b[part].abs().sum(0) > 0
            if place.weight.parts > 1 and not in_use.any():
                continue  # this part of a joint map was not adapted
            mine = in_use if place.weight.parts > 1 else slice(None)
            change = LowRank(place.linear, len(a[mine]), scale, adapter.settings.get("lora_dropout", 0.0))
            change.a.data, change.b.data = a[mine].clone(), b[part][:, mine].clone()
            if "magnitude_vector" in keys:
                change.magnitude = torch.nn.Parameter(adapter.tensors[keys["magnitude_vector"]][part].clone())
            attach_change(place.linear, name, change)
        used |= set(keys.values())
    return used | copy_beside(model, family, adapter, name, PREFIX, missing)


def lora_scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = settings.get("lora_alpha", 8)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?{pattern}", module):
            alpha = value
            break
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)
