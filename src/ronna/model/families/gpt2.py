"""GPT-2 (Radford et al. 2019): pre-norm decoder; its files hold matrices transposed, and q, k, v as one."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from ronna.model import config as c
from ronna.model.families.base import (
    ACTIVATIONS,
    Count,
    Depth,
    Family,
    HubActivation,
    Positive,
    Rate,
    Settings,
    Weight,
    architecture,
    classifier_keys,
    decoder_classifier,
    head_size,
    hub_activation,
    layered,
    one_head,
    only,
    read,
    with_decoder_classifier,
)


class Gpt2Settings(Settings):
    vocab_size: Count = 50257
    n_positions: Count = 1024
    n_embd: Count = 768
    n_layer: Depth = 12
    n_head: Count = 12
    n_inner: Count | None = None
    activation_function: HubActivation = "gelu_new"
    resid_pdrop: Rate = 0.1
    embd_pdrop: Rate = 0.1
    attn_pdrop: Rate = 0.1
    classifier_dropout: Rate = 0.1  # of tokens and pairs
    layer_norm_epsilon: Positive = 1e-5
    initializer_range: Positive = 0.02
    scale_attn_weights: bool = True
    tie_word_embeddings: bool = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    add_cross_attention: Literal[False] = False
    pruned_heads: dict[str, Any] = Field({}, max_length=0)


def from_hf(config: Mapping[str, Any]) -> c.Model:
    h = read(Gpt2Settings, config)
    norm = c.Norm("layer", eps=h.layer_norm_epsilon)
    attention = c.Attention(
        h.n_head,
        head_size(h.n_embd, h.n_head),
        bias=True,
        out_bias=True,
        scale=None if h.scale_attn_weights else 1.0,
        dropout=h.attn_pdrop,
    )
    ffn = c.FeedForward(h.n_inner or 4 * h.n_embd, ACTIVATIONS[h.activation_function], bias=True)
    block = c.Block(attention, ffn, norm, dropout=h.resid_pdrop)
    model = c.Model(
        h.n_embd,
        c.Embedding(h.vocab_size, c.LearnedPositions(h.n_positions), dropout=h.embd_pdrop),
        c.Head(tied=h.tie_word_embeddings),
        decoder=c.Stack((block,) * h.n_layer, causal=True, final_norm=norm),
        init=c.Init("residual", h.initializer_range),
    )
    return with_decoder_classifier(model, h, h.classifier_dropout)


def to_hf(model: c.Model) -> dict[str, Any]:
    one_head(model, "GPT-2")
    block, positions = only(model.decoder).blocks[0], model.embedding.positions
    assert isinstance(positions, c.LearnedPositions)
    return {
        "model_type": "gpt2",
        "architectures": architecture(model, "GPT2", "LMHeadModel"),
        "vocab_size": model.embedding.vocab,
        "n_positions": positions.count,
        "n_embd": model.dim,
        "n_layer": len(only(model.decoder).blocks),
        "n_head": block.attention.heads,
        "n_inner": None if block.ffn.hidden == 4 * model.dim else block.ffn.hidden,
        "activation_function": hub_activation(block.ffn.act),
        "resid_pdrop": block.dropout,
        "embd_pdrop": model.embedding.dropout,
        "attn_pdrop": block.attention.dropout,
        "layer_norm_epsilon": block.norm.eps,
        "initializer_range": model.init.std,
        "scale_attn_weights": block.attention.scale is None,
        "tie_word_embeddings": model.head.tied if model.head else True,
        "classifier_dropout": model.classifier.dropout if model.classifier else 0.1,
        **classifier_keys(model),
    }


OUTPUTS: dict[c.Unit, str] = {
    "sequence": "score",
    "tokens": "classifier",
    "pair": "classifier",
    "spans": "qa_outputs",
}


def names(model: c.Model) -> dict[str, Weight]:
    table = {
        **{f"attention.{n}": Weight("attn.c_attn", i, 3, transpose=True) for i, n in enumerate("qkv")},
        "attention.out": Weight("attn.c_proj", transpose=True),
        "attention_norm": Weight("ln_1"),
        "ffn.up": Weight("mlp.c_fc", transpose=True),
        "ffn.down": Weight("mlp.c_proj", transpose=True),
        "ffn_norm": Weight("ln_2"),
    }
    return {
        "embedding.tokens": Weight("transformer.wte"),
        "embedding.positions": Weight("transformer.wpe"),
        **layered("decoder.blocks.{}.", "transformer.h.{}.", len(only(model.decoder).blocks), table),
        "decoder.final_norm": Weight("transformer.ln_f"),
        "head.logits": Weight("lm_head"),
        "classifier.out": Weight(OUTPUTS[model.classifier.of] if model.classifier else "score"),
    }


def duplicates(model: c.Model) -> dict[str, str]:
    return {"lm_head.weight": "transformer.wte.weight"} if model.head and model.head.tied else {}


def size(layers: int, dim: int) -> dict[str, Any]:
    return {"n_layer": layers, "n_embd": dim, "n_head": dim // 64}


PRESETS = {
    "gpt2-tiny": size(2, 128) | {"n_positions": 512},
    "gpt2": size(12, 768),
    "gpt2-medium": size(24, 1024),
    "gpt2-large": size(36, 1280),
    "gpt2-xl": size(48, 1600),
}

GPT2 = Family(
    "gpt2",
    {"gpt2": Gpt2Settings},
    from_hf=from_hf,
    to_hf=to_hf,
    names=names,
    duplicates=duplicates,
    classifier=decoder_classifier,
    prefix="transformer.",
    heads=r"(lm_head|score|multiple_choice_head|qa_outputs|classifier)\.",
    ignored=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)$",
    presets=PRESETS,
    aliases={
        "max_position_embeddings": ("n_positions",),
        "hidden_size": ("n_embd",),
        "num_hidden_layers": ("n_layer",),
        "num_attention_heads": ("n_head",),
        "intermediate_size": ("n_inner",),
    },
)
