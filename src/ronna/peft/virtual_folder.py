"""Virtual tokens, a prompt's or a prefix's, as the `peft` library has them on disk."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ronna.base.errors import RonnaError
from ronna.model.families import Family
from ronna.model.transformer import Transformer
from ronna.peft.changes import adapter_parameters, attach, changed_modules
from ronna.peft.files import AGAIN, WEIGHTS, AdapterFolder, copy_beside, kept_whole, put
from ronna.peft.methods import NAME
from ronna.peft.prefix import PrefixConfig, PrefixedStack, empty_prefix, layout
from ronna.peft.prompt import PromptConfig, PromptedEmbedding, empty_prompt

PREFIX = "base_model."  # of transformers' names


def two_stacks(model: Transformer) -> bool:
    return model.encoder is not None and model.decoder is not None


def as_virtual(
    model: Transformer, family: Family, config: PromptConfig | PrefixConfig, state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and tensors of virtual tokens, as the `peft` library has them.

    A network that made a prefix is not needed any more: its keys and values are written.
    """
    more, modules = kept_whole(model, family, state, PREFIX)
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


def attach_virtual(
    model: Transformer, family: Family, adapter: AdapterFolder, name: str, missing: set[str], *, prefix: bool
) -> set[str]:
    """A prompt or a prefix. For an encoder-decoder `peft` may keep twice the vectors, half of which nothing reads."""
    rows = adapter.tensors.get("prompt_embeddings")
    tokens = adapter.settings.get("num_virtual_tokens")
    if rows is None or not isinstance(tokens, int) or not 1 <= tokens <= len(rows):
        raise RonnaError("no vectors for its virtual tokens", where=f"{adapter.folder}/{WEIGHTS}", fix=AGAIN)
    if prefix:
        attach(model.last, PrefixedStack, name, empty_prefix(model, PrefixConfig(tokens=tokens)))
    else:
        attach(model.embedding, PromptedEmbedding, name, empty_prompt(model, tokens))
    [(path, parameter)] = adapter_parameters(model, name)
    put(parameter, rows[:tokens], path, adapter)
    if prefix and two_stacks(model):
        parameter.data = of_decoder(parameter.data, len(model.last.blocks))
    return {"prompt_embeddings"} | copy_beside(model, family, adapter, name, PREFIX, missing)


def of_decoder(table: Tensor, blocks: int) -> Tensor:
    """What `peft` (0.21) gives the blocks of an encoder-decoder out of a prefix's table (n, N x 2 x K x D).

    It takes every second pair of keys and values for those of the attention to the encoder, which it drops, and
    begins again at the table's end: block i gets pair 2 i modulo N. So few prefixes can be said in its layout, and
    ours of encoder-decoders are written in our own.
    """
    pairs = table.unflatten(1, (blocks, -1))
    return pairs[:, [2 * i % blocks for i in range(blocks)]].flatten(1)
