"""Families of published models: from a Hugging Face config.json to `config.Model` and back. No torch here."""

import json
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ronna.base.errors import RonnaError
from ronna.model.config import Classifier, Model, Unit
from ronna.model.families.base import OWN, Family, Weight, label_maps, label_names, locate
from ronna.model.families.bert import BERT
from ronna.model.families.gpt2 import GPT2
from ronna.model.families.llama import LLAMA
from ronna.model.families.modernbert import MODERNBERT
from ronna.model.families.roberta import ROBERTA
from ronna.model.families.t5 import T5
from ronna.model.families.transformer2017 import TRANSFORMER2017

__all__ = [
    "FAMILIES",
    "OWN",
    "PRESETS",
    "Family",
    "Weight",
    "classifier_for",
    "family_of",
    "label_maps",
    "label_names",
    "locate",
    "preset",
    "read_config",
    "read_config_json",
    "with_dropout",
]

FAMILIES = (BERT, ROBERTA, MODERNBERT, GPT2, LLAMA, T5, TRANSFORMER2017)
PRESETS = [name for family in FAMILIES for name in family.presets]


def nearest(name: str, known: list[str], what: str) -> str:
    near = get_close_matches(name, known, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"{what}: {', '.join(known)}"


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a parsed config.json, by its model_type. Raises RonnaError for one not known."""
    kind = str(config.get("model_type"))
    for family in FAMILIES:
        if kind in family.settings:
            return family
    known = [kind for family in FAMILIES for kind in family.settings]
    found = f"model type {kind} is not supported" if "model_type" in config else "no model_type"
    raise RonnaError(found, where="config.json", fix=nearest(kind, known, "model types"))


def read_config_json(folder: str | Path) -> dict[str, Any]:
    """The config.json of a Hugging Face folder. Raises RonnaError where there is none or it is not JSON."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RonnaError(
            "no such folder" if not Path(folder).is_dir() else f"config.json cannot be read: {error.strerror}",
            where=str(folder),
            fix="give a folder with config.json and model.safetensors, ours or Hugging Face's",
        ) from None
    except (ValueError, RecursionError) as error:
        raise RonnaError(f"not valid JSON: {error}", where=str(path), fix="download the file again") from None
    if not isinstance(config, dict):
        raise RonnaError("not a JSON object", where=str(path), fix="download the file again")
    if "quantization_config" in config:
        raise RonnaError("the weights are quantized", where=str(path), fix="use the original weights")
    return config


def read_config(folder: str | Path) -> tuple[Family, Model]:
    """Family and shape of a Hugging Face folder, the vocabulary head included. Raises RonnaError."""
    config = read_config_json(folder)
    try:
        family = family_of(config)
        return family, family.from_hf(config)
    except RonnaError as error:
        raise RonnaError(error.what, where=f"{folder}/{error.where}", fix=error.fix) from None


def preset(name: str, **overrides: Any) -> tuple[Family, Model]:
    """A published size by name; `overrides` are keys of the family's config.json, such as vocab_size.

    vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size and
    max_position_embeddings are understood also where a family has another word for them. Raises RonnaError
    with the nearest name for an unknown preset or key.
    """
    family = next((f for f in FAMILIES if name in f.presets), None)
    if family is None:
        raise RonnaError(f"no preset {name}", fix=nearest(name, PRESETS, "presets"))
    base = family.presets[name]
    kind = base.get("model_type", family.model_types[0])
    known = family.settings[kind].model_fields
    renamed = {own: value for key, value in overrides.items() for own in family.aliases.get(key, (key,))}
    for key in renamed.keys() - known.keys():
        raise RonnaError(f"{name} has no setting {key}", fix=nearest(key, list(known), "settings"))
    return family, family.from_hf({"model_type": kind, **base, **renamed})


def with_dropout(family: Family, model: Model, rate: float) -> Model:
    """The model with `rate` wherever its family usually has dropout, even if this one was saved without any.

    A family that usually has none gets it at every place that its config.json knows; a rate of 0 clears all.
    """
    config = family.to_hf(model)
    fields = family.settings[config["model_type"]].model_fields
    places = {key: fields[key].default for key in fields if "drop" in key}
    usual = [key for key, default in places.items() if default] if rate else []
    following = [key for key, default in places.items() if default is None]  # ... the rate of another place
    changed = family.from_hf(config | dict.fromkeys(usual or places, rate) | dict.fromkeys(following))
    parts = ("embedding", "encoder", "decoder", "classifier")
    return replace(model, **{part: getattr(changed, part) for part in parts})


def classifier_for(family: Family, model: Model, labels: int, of: Unit = "sequence") -> Classifier:
    """The classifier that the family's class for sequence or token classification or for question answering has in
    transformers, or ours of pairs.

    RonnaError for encoder-decoders.
    """
    if family.classifier is None:
        raise RonnaError(
            f"{family.name} models have no classifier",
            fix="choose an encoder (bert, roberta, modernbert) or a decoder (gpt2, llama, qwen)",
        )
    return family.classifier(model, labels, of)
