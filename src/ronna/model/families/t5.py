"""T5 (Raffel et al. 2020) v1.0 and v1.1: encoder-decoder, relative position biases, unscaled attention."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ronna.base.errors import RonnaError
from ronna.model import config as c
from ronna.model.families.base import (
    ACTIVATIONS,
    Count,
    Depth,
    Family,
    Positive,
    Rate,
    Settings,
    Weight,
    layered,
    only,
    read,
)


class T5Settings(Settings):
    vocab_size: Count = 32128
    d_model: Count = 512
    d_kv: Count = 64
    d_ff: Count = 2048
    num_layers: Depth = 6
    num_decoder_layers: Depth | None = None
    num_heads: Count = 8
    n_positions: Count | None = None
    relative_attention_num_buckets: Count = 32
    relative_attention_max_distance: Count = 128
    dropout_rate: Rate = 0.1
    layer_norm_epsilon: Positive = 1e-6
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None


def feed_forward(h: T5Settings) -> c.FeedForward:
    kind, _, act = h.feed_forward_proj.rpartition("-")
    if kind not in ("", "gated") or act not in ACTIVATIONS:
        raise RonnaError(
            f'found "{h.feed_forward_proj}"',
            where="config.json: feed_forward_proj",
            fix=f"it should be one of: {', '.join(ACTIVATIONS)}, or one of these behind gated-",
        )
    # In these files "gated-gelu" has always meant the tanh form, while "gelu" alone is the exact one.
    exact = h.feed_forward_proj != "gated-gelu"
    return c.FeedForward(h.d_ff, ACTIVATIONS[act] if exact else "gelu_tanh", bool(kind), dropout=h.dropout_rate)


def feed_forward_proj(ffn: c.FeedForward) -> str:
    if ffn.gated:
        return "gated-" + ("gelu" if ffn.act == "gelu_tanh" else "gelu_python" if ffn.act == "gelu" else ffn.act)
    return "gelu_new" if ffn.act == "gelu_tanh" else ffn.act


def from_hf(config: Mapping[str, Any]) -> c.Model:
    h = read(T5Settings, config)
    if h.unit is not None:
        raise RonnaError("T5 with a classifier is not supported", where="config.json: architectures")
    norm = c.Norm("rms", h.layer_norm_epsilon)
    attention = c.Attention(h.num_heads, h.d_kv, scale=1.0, dropout=h.dropout_rate)
    block = c.Block(attention, feed_forward(h), norm, dropout=h.dropout_rate)
    bias = c.RelativeBias(h.relative_attention_num_buckets, h.relative_attention_max_distance)

    def stack(block: c.Block, layers: int, causal: bool) -> c.Stack:
        return c.Stack((block,) * layers, causal, norm, bias, dropout=h.dropout_rate)

    # transformers 4 says tie_word_embeddings = false for v1.1, which also means unscaled; 5 says it apart.
    scaled = h.tie_word_embeddings if h.scale_decoder_outputs is None else h.scale_decoder_outputs
    return c.Model(
        h.d_model,
        c.Embedding(h.vocab_size),
        c.Head(tied=h.tie_word_embeddings, scale=1 / math.sqrt(h.d_model) if scaled else 1.0),
        encoder=stack(block, h.num_layers, False),
        decoder=stack(replace(block, cross=attention), h.num_decoder_layers or h.num_layers, True),
        init=c.Init("fan_in"),
        context=h.n_positions,
    )


def to_hf(model: c.Model) -> dict[str, Any]:
    if model.classifier:
        raise RonnaError("T5 folders hold no classifier", fix="use an encoder or a decoder, or drop the classifier")
    encoder, decoder = only(model.encoder), only(model.decoder)
    block, bias = encoder.blocks[0], encoder.relative_bias or c.RelativeBias()
    config = {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration" if model.head else "T5Model"],
        "is_encoder_decoder": True,
        "vocab_size": model.embedding.vocab,
        "d_model": model.dim,
        "d_kv": block.attention.head_dim,
        "d_ff": block.ffn.hidden,
        "num_layers": len(encoder.blocks),
        "num_decoder_layers": len(decoder.blocks),
        "num_heads": block.attention.heads,
        "relative_attention_num_buckets": bias.buckets,
        "relative_attention_max_distance": bias.max_distance,
        "dropout_rate": block.dropout,
        "layer_norm_epsilon": block.norm.eps,
        "feed_forward_proj": feed_forward_proj(block.ffn),
        "tie_word_embeddings": model.head.tied if model.head else True,
        "scale_decoder_outputs": model.head.scale != 1.0 if model.head else True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    return config | ({"n_positions": model.context} if model.context else {})


def stack_names(stack: str, cfg: c.Stack, cross: bool) -> dict[str, Weight]:
    ffn = "layer.2" if cross else "layer.1"
    up = "wi_1" if cfg.blocks[0].ffn.gated else "wi"
    table = {
        **{f"attention.{n}": f"layer.0.SelfAttention.{n[0]}" for n in ("q", "k", "v", "out")},
        "attention_norm": "layer.0.layer_norm",
        "ffn.up": f"{ffn}.DenseReluDense.{up}",
        "ffn.gate": f"{ffn}.DenseReluDense.wi_0",
        "ffn.down": f"{ffn}.DenseReluDense.wo",
        "ffn_norm": f"{ffn}.layer_norm",
    }
    if cross:
        table |= {f"cross.{n}": f"layer.1.EncDecAttention.{n[0]}" for n in ("q", "k", "v", "out")}
        table["cross_norm"] = "layer.1.layer_norm"
    return {
        **layered(stack + ".blocks.{}.", stack + ".block.{}.", len(cfg.blocks), table),
        f"{stack}.bias.table": Weight(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"),
        f"{stack}.final_norm": Weight(f"{stack}.final_layer_norm"),
    }


def names(model: c.Model) -> dict[str, Weight]:
    return {
        "embedding.tokens": Weight("shared"),
        **stack_names("encoder", only(model.encoder), cross=False),
        **stack_names("decoder", only(model.decoder), cross=True),
        "head.logits": Weight("lm_head"),
    }


def duplicates(model: c.Model) -> dict[str, str]:
    copies = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    if model.head and model.head.tied:
        copies.append("lm_head.weight")
    return dict.fromkeys(copies, "shared.weight")


def unties(model: c.Model) -> bool:
    """transformers 5 writes tie_word_embeddings = true for every T5, also for v1.1 with its two matrices."""
    return model.head is not None and model.head.scale == 1.0


def size(layers: int, dim: int, hidden: int, heads: int) -> dict[str, Any]:
    return {"num_layers": layers, "d_model": dim, "d_ff": hidden, "num_heads": heads, "n_positions": 512}


V11 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
PRESETS = {
    "t5-tiny": size(2, 128, 512, 2),
    "t5-small": size(6, 512, 2048, 8),
    "t5-base": size(12, 768, 3072, 12),
    "t5-large": size(24, 1024, 4096, 16),
    "t5-v1.1-small": size(8, 512, 1024, 6) | V11,
    "t5-v1.1-base": size(12, 768, 2048, 12) | V11,
    "t5-v1.1-large": size(24, 1024, 2816, 16) | V11,
    "t5-v1.1-xl": size(24, 2048, 5120, 32) | V11,
}

T5 = Family(
    "t5",
    {"t5": T5Settings},
    from_hf=from_hf,
    to_hf=to_hf,
    names=names,
    duplicates=duplicates,
    classifier=None,
    prefix="",
    heads=r"(lm_head|classification_head|qa_outputs|classifier)\.",
    ignored=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",
    presets=PRESETS,
    unties=unties,
    aliases={
        "max_position_embeddings": ("n_positions",),
        "hidden_size": ("d_model",),
        "num_hidden_layers": ("num_layers",),
        "num_attention_heads": ("num_heads",),
        "intermediate_size": ("d_ff",),
    },
)
