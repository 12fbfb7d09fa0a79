"""Adapters on disk: adapter_config.json and adapter_model.safetensors.

A LoRA, a prompt and a prefix are written as the `peft` library has them, under the names of transformers, so that
`PeftModel.from_pretrained` gives the same logits. Where transformers has one map for several of ours (GPT-2's
c_attn), ours stand in it as blocks, its rank their sum. Other methods have no layout that everybody reads: theirs is
`"peft_type": "RONNA"`, the method's settings under "method", and tensors under our own parameter names.

config.json beside them is the adapted model's, with label names; "base_fingerprint" in it tells another base apart.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ronna.base.errors import RonnaError
from ronna.model.families import OWN, Family, Weight, locate
from ronna.model.layers import Linear
from ronna.model.transformer import Transformer
from ronna.peft.adalora import AdaLoraConfig
from ronna.peft.changes import ChangedLinear, adapter_parameters, attach, changed_modules
from ronna.peft.lora import LoraConfig, LowRank
from ronna.peft.methods import NAME, PeftConfig, adapt
from ronna.peft.prefix import PrefixConfig, add_prefix, layout
from ronna.peft.prompt import PromptConfig, add_prompt

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, VIRTUAL_PREFIX = "base_model.model.", "base_model."  # of transformers' names: of a prompt without "model."
KINDS = ("LORA", "PROMPT_TUNING", "PREFIX_TUNING", "RONNA")
LOW_RANK = re.compile(r"(.+)\.lora_(A|B|magnitude_vector)(?:\.weight)?")
AGAIN = "copy or download the folder again"
TASKS = {"sequence": "SEQ_CLS", "tokens": "TOKEN_CLS", "spans": "QUESTION_ANS", "pair": "FEATURE_EXTRACTION"}


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
    for path, module in model.named_modules():
        if isinstance(module, Linear) and ".blocks." in path:
            weight = locate(names, f"{path}.weight")
            stored = family.stored_name(model.cfg, weight.name)
            found.setdefault(stored.removesuffix(".weight"), []).append(Place(path, module, weight))
    return {module: sorted(some, key=lambda p: p.weight.part) for module, some in found.items()}


# Out


def write_adapter(
    model: Transformer,
    family: Family,
    folder: Path,
    config: PeftConfig,
    base: str,
    *,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter that `adapt` attached, and what was trained beside it.

    tensors: the trained state to write instead of the model's own, by full name. Raises OSError or SafetensorError
    where the disk refuses.
    """
    state = dict(tensors) if tensors is not None else {n: p for n, p in model.named_parameters() if p.requires_grad}
    state = {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in state.items()}
    common = {"base_model_name_or_path": base, "task_type": task_type(model), "inference_mode": True}
    if isinstance(config, LoraConfig | AdaLoraConfig):
        settings, stored = as_peft(model, family, config, state)
    elif isinstance(config, PromptConfig) or (isinstance(config, PrefixConfig) and not two_stacks(model)):
        settings, stored = as_virtual(model, family, config, state)
    else:
        settings, stored = {"peft_type": "RONNA", "method": config.model_dump(mode="json")}, state
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(common | settings, indent=2) + "\n", encoding="utf-8")


def task_type(model: Transformer) -> str:
    if model.classifier is not None:
        return TASKS[model.classifier.cfg.of]
    if model.cfg.decoder is None:
        return "FEATURE_EXTRACTION"
    return "CAUSAL_LM" if model.cfg.encoder is None else "SEQ_2_SEQ_LM"


def as_peft(
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


def as_virtual(
    model: Transformer, family: Family, config: PromptConfig | PrefixConfig, state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and tensors of virtual tokens, as the `peft` library has them.

    A network that made a prefix is not needed any more: its keys and values are written.
    """
    more, modules = kept_whole(model, family, state, VIRTUAL_PREFIX)
    settings: dict[str, Any] = {
        "num_virtual_tokens": config.tokens,
        "num_transformer_submodules": 1,
        "num_layers": len(model.last.blocks),
        "modules_to_save": modules,
    }
    [(path, made)] = [(path, module.changes[NAME]) for path, module in changed_modules(model) if NAME in module.changes]
    own = {leaf: state[f"{path}.changes.{NAME}.{leaf}"] for leaf, _ in made.named_parameters()}
    if isinstance(config, PromptConfig):
        heads = model.cfg.last.blocks[0].attention.heads
        settings |= {"peft_type": "PROMPT_TUNING", "token_dim": model.cfg.dim, "num_attention_heads": heads}
        return settings, {"prompt_embeddings": own["vectors"], **more}
    heads, size = layout(model.last)
    settings |= {"peft_type": "PREFIX_TUNING", "token_dim": heads * size, "num_attention_heads": heads}
    with torch.no_grad():
        table = torch.func.functional_call(made, own, ())
    return settings, {"prompt_embeddings": table, **more}


def kept_whole(
    model: Transformer, family: Family, state: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], list[str] | None]:
    """The base's own weights that were trained, by their names in `peft`, and the modules it is to load them into."""
    names = family.names(model.cfg)
    beside = {
        name: family.stored_name(model.cfg, locate(names, name).name) for name in state if ".changes." not in name
    }
    modules = sorted({saved_module(theirs) for ours, theirs in beside.items() if ours not in OWN}) or None
    return {prefix + theirs: state[ours] for ours, theirs in beside.items()}, modules


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


def saved_module(key: str) -> str:
    """The module that `peft` is to keep whole: it takes a classifier at its root, whatever is inside."""
    root = key.partition(".")[0]
    return root if root in ("classifier", "score", "qa_outputs") else key.rpartition(".")[0]


def magnitude(place: Place, state: Mapping[str, Tensor]) -> Tensor:
    """A map's learnt lengths, or those it has, which change nothing."""
    learnt = state.get(f"{place.path}.changes.{NAME}.magnitude")
    return torch.linalg.vector_norm(place.linear.weight.detach().float(), dim=1).cpu() if learnt is None else learnt


# In


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter as it lies on the disk."""

    folder: Path
    settings: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def base(self) -> str:
        return str(self.settings["base_model_name_or_path"])


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read_adapter(folder: Path) -> AdapterFolder:
    """Raises RonnaError for a folder that is not a whole adapter, or of a method that we do not have."""
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        base, kind = settings["base_model_name_or_path"], settings["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RonnaError(f"not the settings of an adapter: {error}", where=f"{folder}/{CONFIG}", fix=AGAIN) from None
    if kind not in KINDS or not isinstance(base, str):
        fix = "use a LoRA, a prompt, or a folder that `ronna finetune` wrote"
        raise RonnaError(f"adapters of type {kind!r} are not supported", where=f"{folder}/{CONFIG}", fix=fix)
    try:
        return AdapterFolder(folder, settings, load_file(folder / WEIGHTS))
    except (OSError, SafetensorError) as error:
        raise RonnaError(f"cannot be read: {error}", where=f"{folder}/{WEIGHTS}", fix=AGAIN) from None


def attach_adapter(model: Transformer, family: Family, adapter: AdapterFolder, name: str = NAME) -> None:
    """Put a read adapter on its base. Raises RonnaError for tensors that do not fit it."""
    match adapter.settings["peft_type"]:
        case "LORA":
            used = attach_lora(model, family, adapter, name)
        case "PROMPT_TUNING" | "PREFIX_TUNING" as kind:
            used = attach_virtual(model, family, adapter, name, prefix=kind == "PREFIX_TUNING")
        case _:
            used = attach_own(model, adapter, name)
    if unknown := sorted(adapter.tensors.keys() - used):
        raise RonnaError(f"no place in the model for {', '.join(unknown[:4])}", where=str(adapter.folder), fix=FITS)


FITS = "give the base that the adapter was trained on"


def attach_lora(model: Transformer, family: Family, adapter: AdapterFolder, name: str) -> set[str]:
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
            attach(place.linear, ChangedLinear, name, change)
        used |= set(keys.values())
    return used | copy_beside(model, family, adapter, PREFIX)


def attach_virtual(model: Transformer, family: Family, adapter: AdapterFolder, name: str, *, prefix: bool) -> set[str]:
    """A prompt or a prefix. For an encoder-decoder `peft` may keep twice the vectors, half of which nothing reads."""
    rows = adapter.tensors.get("prompt_embeddings")
    tokens = adapter.settings.get("num_virtual_tokens")
    if rows is None or not isinstance(tokens, int) or not 1 <= tokens <= len(rows):
        raise RonnaError("no vectors for its virtual tokens", where=f"{adapter.folder}/{WEIGHTS}", fix=AGAIN)
    if prefix:
        add_prefix(model, PrefixConfig(tokens=tokens), name, seed=0)
    else:
        add_prompt(model, PromptConfig(tokens=tokens), name, seed=0)
    [(path, parameter)] = adapter_parameters(model, name)
    put(parameter, rows[:tokens], path, adapter)
    if prefix and two_stacks(model):
        parameter.data = of_decoder(parameter.data, len(model.last.blocks))
    return {"prompt_embeddings"} | copy_beside(model, family, adapter, VIRTUAL_PREFIX)


def two_stacks(model: Transformer) -> bool:
    return model.encoder is not None and model.decoder is not None


def of_decoder(table: Tensor, blocks: int) -> Tensor:
    """What `peft` (0.21) gives the blocks of an encoder-decoder out of a prefix's table (n, N x 2 x K x D).

    It takes every second pair of keys and values for those of the attention to the encoder, which it drops, and
    begins again at the table's end: block i gets pair 2 i modulo N. So few prefixes can be said in its layout, and
    ours of encoder-decoders are written in our own.
    """
    pairs = table.unflatten(1, (blocks, -1))
    return pairs[:, [2 * i % blocks for i in range(blocks)]].flatten(1)


def lora_scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = settings.get("lora_alpha", 8)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?{pattern}", module):
            alpha = value
            break
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)


@torch.no_grad()
def copy_beside(model: Transformer, family: Family, adapter: AdapterFolder, prefix: str) -> set[str]:
    """Weights of the base that were trained with the adapter, such as a classifier; returns their keys."""
    names, used = family.names(model.cfg), set()
    for ours, parameter in model.named_parameters():
        if ".changes." in ours:
            continue
        key = prefix + family.stored_name(model.cfg, locate(names, ours).name)
        if key in adapter.tensors:
            put(parameter, adapter.tensors[key], ours, adapter)
            used.add(key)
    return used


def attach_own(model: Transformer, adapter: AdapterFolder, name: str) -> set[str]:
    try:
        config: PeftConfig = TypeAdapter(PeftConfig).validate_python(adapter.settings.get("method"))
    except ValidationError as error:
        raise RonnaError(
            f"settings of no method: {error.errors()[0]['msg']}", where=f"{adapter.folder}/{CONFIG}", fix=AGAIN
        ) from None
    adapt(model, config, name=name)
    used = set()
    for ours, parameter in model.named_parameters():
        key = ours.replace(f".changes.{name}.", f".changes.{NAME}.")
        if key in adapter.tensors:
            put(parameter, adapter.tensors[key], ours, adapter)
            used.add(key)
        elif parameter.requires_grad:
            raise RonnaError(f"{ours} is missing", where=f"{adapter.folder}/{WEIGHTS}", fix=AGAIN)
    return used


def put(parameter: torch.nn.Parameter, value: Tensor, name: str, adapter: AdapterFolder) -> None:
    if parameter.shape != value.shape:
        shapes = f"{list(value.shape)}, the model has {list(parameter.shape)}"
        raise RonnaError(f"{name} has shape {shapes}", where=str(adapter.folder), fix=FITS)
    parameter.data.copy_(value)
