"""The 2017 Transformer (Vaswani et al.) in Marian's files: post-norm, sinusoids, one matrix shared by all."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from ronna.base.errors import RonnaError
from ronna.model import config as c
from ronna.model.families.base import (
    ACTIVATIONS,
    Count,
    Depth,
    Family,
    HubActivation,
    Rate,
    Settings,
    Weight,
    head_size,
    hub_activation,
    layered,
    only,
    read,
)


class MarianSettings(Settings):
    """Layer drop changes only training and is left out: this software has no such regulariser."""

    vocab_size: Count = 58101
    decoder_vocab_size: Count | None = None
    max_position_embeddings: Count = 1024
    encoder_layers: Depth = 12
    encoder_ffn_dim: Count = 4096
    encoder_attention_heads: Count = 16
    decoder_layers: Depth = 12
    decoder_ffn_dim: Count = 4096
    decoder_attention_heads: Count = 16
    activation_function: HubActivation = "gelu"
    d_model: Count = 1024
    dropout: Rate = 0.1
    attention_dropout: Rate = 0.0
    activation_dropout: Rate = 0.0
    scale_embedding: bool = False
    tie_word_embeddings: bool = True
    share_encoder_decoder_embeddings: Literal[True] = True
    normalize_before: Literal[False] = False
    normalize_embedding: Literal[False] = False
    add_final_layer_norm: Literal[False] = False
    static_position_embeddings: Literal[True] = True


def from_hf(config: Mapping[str, Any]) -> c.Model:
    h = read(MarianSettings, config)
    if (h.decoder_vocab_size or h.vocab_size) != h.vocab_size:
        raise RonnaError("two vocabularies are not supported", where="config.json: decoder_vocab_size")
    if h.unit is not None:
        raise RonnaError("Marian with a classifier is not supported", where="config.json: architectures")
    norm, act = c.Norm("layer"), ACTIVATIONS[h.activation_function]

    def block(heads: int, hidden: int) -> c.Block:
        size = head_size(h.d_model, heads)
        attention = c.Attention(heads, size, bias=True, out_bias=True, dropout=h.attention_dropout)
        ffn = c.FeedForward(hidden, act, bias=True, dropout=h.activation_dropout)
        return c.Block(attention, ffn, norm, "post", dropout=h.dropout)

    encoder = block(h.encoder_attention_heads, h.encoder_ffn_dim)
    decoder = block(h.decoder_attention_heads, h.decoder_ffn_dim)
    decoder = replace(decoder, cross=decoder.attention)
    scale = math.sqrt(h.d_model) if h.scale_embedding else 1.0
    positions = c.SinusoidalPositions(h.max_position_embeddings)
    return c.Model(
        h.d_model,
        c.Embedding(h.vocab_size, positions, scale=scale, dropout=h.dropout),
        c.Head(tied=h.tie_word_embeddings, bias=True),
        encoder=c.Stack((encoder,) * h.encoder_layers, causal=False),
        decoder=c.Stack((decoder,) * h.decoder_layers, causal=True),
        init=c.Init("xavier"),
    )


def to_hf(model: c.Model) -> dict[str, Any]:
    if model.classifier:
        raise RonnaError("Marian folders hold no classifier", fix="use an encoder or a decoder, or drop the classifier")
    encoder, decoder = only(model.encoder).blocks, only(model.decoder).blocks
    positions = model.embedding.positions
    assert isinstance(positions, c.SinusoidalPositions)
    padding = model.embedding.vocab - 1
    return {
        "model_type": "marian",
        "architectures": ["MarianMTModel" if model.head else "MarianModel"],
        "is_encoder_decoder": True,
        "vocab_size": model.embedding.vocab,
        "decoder_vocab_size": model.embedding.vocab,
        "max_position_embeddings": positions.count,
        "encoder_layers": len(encoder),
        "encoder_ffn_dim": encoder[0].ffn.hidden,
        "encoder_attention_heads": encoder[0].attention.heads,
        "decoder_layers": len(decoder),
        "decoder_ffn_dim": decoder[0].ffn.hidden,
        "decoder_attention_heads": decoder[0].attention.heads,
        "activation_function": hub_activation(encoder[0].ffn.act),
        "d_model": model.dim,
        "dropout": encoder[0].dropout,
        "attention_dropout": encoder[0].attention.dropout,
        "activation_dropout": encoder[0].ffn.dropout,
        "scale_embedding": model.embedding.scale != 1.0,
        "tie_word_embeddings": model.head.tied if model.head else True,
        "share_encoder_decoder_embeddings": True,
        "normalize_before": False,
        "normalize_embedding": False,
        "static_position_embeddings": True,
        # Marian's custom: the last id pads, and starts the target. The class's own default may lie outside.
        "pad_token_id": padding,
        "decoder_start_token_id": padding,
        "eos_token_id": 0,
        "forced_eos_token_id": 0,
    }


def stack_names(stack: str, layers: int) -> dict[str, Weight]:
    table = {"attention_norm": "self_attn_layer_norm", "cross_norm": "encoder_attn_layer_norm"}
    for ours, theirs in (("attention", "self_attn"), ("cross", "encoder_attn")):
        table |= {f"{ours}.{n}": f"{theirs}.{n}_proj" for n in ("q", "k", "v", "out")}
    table |= {"ffn.up": "fc1", "ffn.down": "fc2", "ffn_norm": "final_layer_norm"}
    return layered(stack + ".blocks.{}.", f"model.{stack}.layers.{{}}.", layers, table)


def names(model: c.Model) -> dict[str, Weight]:
    return {
        "embedding.tokens": Weight("model.shared"),
        **stack_names("encoder", len(only(model.encoder).blocks)),
        **stack_names("decoder", len(only(model.decoder).blocks)),
        "head.logits": Weight("lm_head"),
        "head.logits.bias": Weight("final_logits_bias", row=True),
    }


def duplicates(model: c.Model) -> dict[str, str]:
    copies = ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"]
    if model.head and model.head.tied:
        copies.append("lm_head.weight")
    return dict.fromkeys(copies, "model.shared.weight")


def size(layers: int, dim: int, hidden: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {"d_model": dim, "scale_embedding": True}
    for stack in ("encoder", "decoder"):
        sizes |= {f"{stack}_layers": layers, f"{stack}_ffn_dim": hidden, f"{stack}_attention_heads": heads}
    return sizes | more


# base and big: table 3 of the paper, English-German. opus-mt: Tiedemann and Thottingal 2020.
PRESETS = {
    "transformer-tiny": size(2, 128, 512, 2, vocab_size=8000, activation_function="relu"),
    "transformer-base": size(6, 512, 2048, 8, vocab_size=37000, activation_function="relu"),
    "transformer-big": size(6, 1024, 4096, 16, vocab_size=37000, activation_function="relu", dropout=0.3),
    "opus-mt": size(6, 512, 2048, 8, activation_function="swish", max_position_embeddings=512),
}

TRANSFORMER2017 = Family(
    "transformer2017",
    {"marian": MarianSettings},
    from_hf=from_hf,
    to_hf=to_hf,
    names=names,
    duplicates=duplicates,
    classifier=None,
    prefix="model.",
    heads=r"(lm_head\.|final_logits_bias$)",
    ignored=r"model\.(encoder|decoder)\.embed_positions\.weight$",
    presets=PRESETS,
    aliases={
        "hidden_size": ("d_model",),
        "num_hidden_layers": ("encoder_layers", "decoder_layers"),
        "num_attention_heads": ("encoder_attention_heads", "decoder_attention_heads"),
        "intermediate_size": ("encoder_ffn_dim", "decoder_ffn_dim"),
    },
)
