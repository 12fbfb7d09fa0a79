"""Every way to train a part of a model: what is attached, what may learn, and what is frozen."""

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from ronna.base.config import Config
from ronna.base.errors import RonnaError
from ronna.model.config import Model
from ronna.model.layers import LayerNorm, RMSNorm
from ronna.model.transformer import Transformer
from ronna.peft.adalora import AdaLoraConfig, add_adalora
from ronna.peft.changes import adapter_parameters
from ronna.peft.houlsby import HoulsbyConfig, add_houlsby
from ronna.peft.lora import LoraConfig, add_lora
from ronna.peft.prefix import PrefixConfig, add_prefix
from ronna.peft.prompt import PromptConfig, add_prompt, room

NAME = "default"  # of the adapter that a run trains


class BitFitConfig(Config):
    """Train the biases alone (Ben Zaken et al. 2021)."""

    kind: Literal["bitfit"] = "bitfit"


PeftConfig = Annotated[
    LoraConfig | AdaLoraConfig | HoulsbyConfig | BitFitConfig | PromptConfig | PrefixConfig,
    Field(discriminator="kind"),
]


def longest_text(cfg: Model, config: PeftConfig | None) -> int | None:
    """The most tokens that a text may have beside the virtual ones of a method, or None where nothing says."""
    return room(cfg.max_length, config.tokens if isinstance(config, PromptConfig | PrefixConfig) else 0)


def adapt(model: Transformer, config: PeftConfig, *, seed: int = 0, name: str = NAME) -> None:
    """Attach a fresh adapter and freeze all but it and the classifier; Houlsby's trains the norms too.

    Raises RonnaError where the model has nothing that the method could train.
    """
    match config:
        case LoraConfig():
            add_lora(model, config, name, seed)
        case AdaLoraConfig():
            add_adalora(model, config, name, seed)
        case HoulsbyConfig():
            add_houlsby(model, config, name, seed)
        case PromptConfig():
            add_prompt(model, config, name, seed)
        case PrefixConfig():
            add_prefix(model, config, name, seed)
    learning = {id(p) for _, p in adapter_parameters(model, name)}
    learning |= {id(p) for p in alongside(model, config)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in learning)


def alongside(model: Transformer, config: PeftConfig) -> Iterator[nn.Parameter]:
    """The base's own weights that are trained with an adapter."""
    if model.classifier is not None:
        yield from model.classifier.parameters()
    if isinstance(config, HoulsbyConfig):
        for module in model.modules():
            if isinstance(module, LayerNorm | RMSNorm):
                yield from module.parameters()
    if isinstance(config, BitFitConfig):
        biases = [p for name, p in model.named_parameters() if name.endswith(".bias") and ".blocks." in name]
        if not biases:
            raise RonnaError("this model has no bias to train", where="peft.kind", fix="use lora or houlsby")
        yield from biases


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What learns, by its full name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def freeze_to(model: Transformer, dtype: torch.dtype) -> None:
    """Keep frozen weights in the precision of the computation: nobody needs their other bits, or casts them again.

    Where the embedding's norm learns, it reads what the tables give, and those stay as they are.
    """
    whole = {id(p) for p in model.embedding.parameters()} if learns(model.embedding.norm) else set()
    for parameter in model.parameters():
        if not parameter.requires_grad and id(parameter) not in whole:
            parameter.data = parameter.data.to(dtype)
