"""Every way to train a part of a model: what is attached, what may learn, and what is frozen."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from ronna.base.config import Config
from ronna.base.errors import RonnaError
from ronna.model.config import Model, room_beside
from ronna.model.heads import Classifier
from ronna.model.layers import LayerNorm, RMSNorm
from ronna.model.transformer import Transformer
from ronna.peft.adalora import AdaLoraConfig, add_adalora
from ronna.peft.changes import adapter_parameters
from ronna.peft.houlsby import HoulsbyConfig, add_houlsby
from ronna.peft.lora import LoraConfig, add_lora
from ronna.peft.own import add_own, bare_classifier, copy_own, every_parameter, own_parameters, refuse_taken
from ronna.peft.prefix import PrefixConfig, add_prefix
from ronna.peft.prompt import PromptConfig, add_prompt

NAME = "default"  # of the adapter that a run trains


class BitFitConfig(Config):
    """Train the biases alone (Ben Zaken et al. 2021)."""

    kind: Literal["bitfit"] = "bitfit"


PeftConfig = Annotated[
    LoraConfig | AdaLoraConfig | HoulsbyConfig | BitFitConfig | PromptConfig | PrefixConfig,
    Field(discriminator="kind"),
]


def reads_base(config: PeftConfig) -> bool:
    """Whether a fresh adapter begins with what the matrices of the blocks are, or do, to the last bit."""
    return isinstance(config, PrefixConfig) or (isinstance(config, LoraConfig) and config.dora)


def longest_text(cfg: Model, config: PeftConfig | None) -> int | None:
    """The most tokens that a text may have beside the virtual ones of a method, or None where nothing says."""
    return room_beside(config.tokens if isinstance(config, PromptConfig | PrefixConfig) else 0, cfg.max_length)


def adapt(
    model: Transformer,
    config: PeftConfig,
    *,
    seed: int = 0,
    name: str = NAME,
    classifier: Classifier | None = None,
) -> None:
    """Attach a fresh adapter, at work at once, and freeze all but it and the weights of the base it has its own of.

    Those are a classifier (None: a copy of the base's), and for Houlsby's the norms, for BitFit the biases. Raises
    RonnaError where the model has nothing that the method could train.
    """
    refuse_taken(model, name)
    paths = list(alongside(model, config))
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
    add_own(model, name, deepcopy(bare_classifier(model)) if classifier is None else classifier)
    copy_own(model, name, paths)
    for parameter in every_parameter(model):
        parameter.requires_grad_(False)
    for parameter in (*(p for _, p in adapter_parameters(model, name)), *own_parameters(model, name)):
        parameter.requires_grad_(True)


def alongside(model: Transformer, config: PeftConfig) -> Iterator[str]:
    """Names of the base's weights beside the classifier that an adapter has its own of."""
    if isinstance(config, HoulsbyConfig):
        for path, module in model.named_modules():
            if isinstance(module, LayerNorm | RMSNorm) and not path.startswith("classifier."):
                yield from (f"{path}.{leaf}" for leaf, _ in module.named_parameters())
    if isinstance(config, BitFitConfig):
        names = [name for name, _ in model.named_parameters() if ".blocks." in name and ".changes." not in name]
        biases = [name for name in names if name.endswith(".bias")]
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
