"""Llama (Touvron et al. 2023), Qwen2 (attention biases), Qwen3 (normed queries and keys): one decoder."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from ronna.base.errors import RonnaError
from ronna.model import config as c
from ronna.model.families.base import (
    ACTIVATIONS,
    Count,
    Depth,
    Family,
    HubActivation,
    Positive,
    Rate,
    Rope,
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
    rope_parameters,
    rope_scaling,
    with_decoder_classifier,
)


class LlamaSettings(Settings):
    vocab_size: Count = 32000
    hidden_size: Count = 4096
    intermediate_size: Count = 11008
    num_hidden_layers: Depth = 32
    num_attention_heads: Count = 32
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    hidden_act: HubActivation = "silu"
    max_position_embeddings: Count = 2048
    initializer_range: Positive = 0.02
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 10_000.0
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    partial_rotary_factor: float = Field(1.0, ge=1, le=1)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_dropout: Rate = 0.0
    classifier_dropout: Rate = 0.0  # of tokens and pairs; transformers has 0.1 where a folder does not say it
    mlp_bias: bool = False
    num_local_experts: Literal[1] = 1
    num_experts: Literal[1] = 1


class Qwen2Settings(LlamaSettings):
    vocab_size: Count = 151936
    intermediate_size: Count = 22016
    max_position_embeddings: Count = 32768
    use_sliding_window: bool = False
    sliding_window: Count = 4096
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    mlp_bias: Literal[False] = False

    @property
    def windowed(self) -> bool:
        """Whether some layer sees less than the longest text that the model is made for."""
        reaches = self.sliding_window >= self.max_position_embeddings
        if not self.use_sliding_window or reaches:
            return False
        if self.layer_types is not None:
            return "sliding_attention" in self.layer_types
        return self.max_window_layers < self.num_hidden_layers


class Qwen3Settings(Qwen2Settings):
    head_dim: Count | None = 128


SETTINGS: dict[str, type[Settings]] = {"llama": LlamaSettings, "qwen2": Qwen2Settings, "qwen3": Qwen3Settings}


def attention_of(h: LlamaSettings, rotary: c.Rotary) -> c.Attention:
    if not h.head_dim:
        head_size(h.hidden_size, h.num_attention_heads)
    heads, kv_heads = h.num_attention_heads, h.num_key_value_heads or h.num_attention_heads
    if heads % kv_heads:
        raise RonnaError(f"{heads} heads do not share {kv_heads} key/value heads evenly", where="config.json")
    qwen3, qwen2 = isinstance(h, Qwen3Settings), type(h) is Qwen2Settings
    return c.Attention(
        heads,
        h.head_dim or h.hidden_size // heads,
        kv_heads,
        bias=qwen2 or h.attention_bias,
        out_bias=h.attention_bias and not qwen2,
        qk_norm=c.Norm("rms", h.rms_norm_eps) if qwen3 else None,
        rotary=rotary,
        dropout=h.attention_dropout,
    )


def from_hf(config: Mapping[str, Any]) -> c.Model:
    kind = SETTINGS[config.get("model_type", "llama")]
    h = read(kind, config)
    assert isinstance(h, LlamaSettings)
    if isinstance(h, Qwen2Settings) and h.windowed:
        raise RonnaError(
            f"attention windows of {h.sliding_window} tokens are not supported for this family",
            where="config.json: use_sliding_window",
            fix=f"set use_sliding_window to false and keep texts within {h.sliding_window} tokens",
        )
    norm = c.Norm("rms", h.rms_norm_eps)
    rotary = (h.rope_scaling or h.rope_parameters or Rope()).rotary(h.rope_theta)
    ffn = c.FeedForward(h.intermediate_size, ACTIVATIONS[h.hidden_act], gated=True, bias=h.mlp_bias)
    block = c.Block(attention_of(h, rotary), ffn, norm)
    model = c.Model(
        h.hidden_size,
        c.Embedding(h.vocab_size),
        c.Head(tied=h.tie_word_embeddings),
        decoder=c.Stack((block,) * h.num_hidden_layers, causal=True, final_norm=norm),
        init=c.Init("normal", h.initializer_range),
        context=h.max_position_embeddings,
    )
    return with_decoder_classifier(model, h, h.classifier_dropout)


def model_type(attention: c.Attention) -> str:
    if attention.qk_norm:
        return "qwen3"
    return "qwen2" if attention.bias and not attention.out_bias else "llama"


def to_hf(model: c.Model) -> dict[str, Any]:
    one_head(model, "Llama or Qwen")
    block = only(model.decoder).blocks[0]
    attention, kind = block.attention, model_type(block.attention)
    rotary = attention.rotary or c.Rotary()
    config = {
        "model_type": kind,
        "architectures": architecture(model, kind.capitalize(), "ForCausalLM"),
        "vocab_size": model.embedding.vocab,
        "hidden_size": model.dim,
        "intermediate_size": block.ffn.hidden,
        "num_hidden_layers": len(only(model.decoder).blocks),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv,
        "head_dim": attention.head_dim,
        "hidden_act": hub_activation(block.ffn.act),
        "initializer_range": model.init.std,
        "rms_norm_eps": block.norm.eps,
        "rope_theta": rotary.theta,
        "rope_scaling": rope_scaling(rotary),
        "rope_parameters": rope_parameters(rotary),
        "tie_word_embeddings": model.head.tied if model.head else False,
        "attention_bias": attention.out_bias,
        "attention_dropout": attention.dropout,
        "mlp_bias": block.ffn.bias,
        "classifier_dropout": model.classifier.dropout if model.classifier else 0.0,
        **classifier_keys(model),
    }
    if model.context:
        config["max_position_embeddings"] = model.context
    if kind != "llama":
        config["use_sliding_window"] = False
    return config


def names(model: c.Model) -> dict[str, Weight]:
    theirs = {
        "q": "q_proj",
        "k": "k_proj",
        "v": "v_proj",
        "out": "o_proj",
        "q_norm": "q_norm",
        "k_norm": "k_norm",
    }
    table = {
        **{f"attention.{ours}": f"self_attn.{name}" for ours, name in theirs.items()},
        **{f"ffn.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    return {
        "embedding.tokens": Weight("model.embed_tokens"),
        **layered("decoder.blocks.{}.", "model.layers.{}.", len(only(model.decoder).blocks), table),
        "decoder.final_norm": Weight("model.norm"),
        "head.logits": Weight("lm_head"),
        "classifier.out": Weight("qa_outputs" if model.classifier and model.classifier.of == "spans" else "score"),
    }


def duplicates(model: c.Model) -> dict[str, str]:
    return {"lm_head.weight": "model.embed_tokens.weight"} if model.head and model.head.tied else {}


def llama(layers: int, dim: int, hidden: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": dim, "intermediate_size": hidden}
    return {"model_type": "llama", **sizes, "num_attention_heads": heads, **more}


LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5}
LLAMA32_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN2 = {"model_type": "qwen2", "rope_theta": 1_000_000.0, "max_position_embeddings": 32768}
QWEN3 = {
    "model_type": "qwen3",
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 40960,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
# llama-60m to llama-1b: Zhao et al. 2024 (GaLore), the usual ladder for pre-training on little compute.
PRESETS = {
    "llama-tiny": llama(2, 128, 344, 4, max_position_embeddings=512),
    "llama-60m": llama(8, 512, 1376, 8, max_position_embeddings=1024),
    "llama-130m": llama(12, 768, 2048, 12, max_position_embeddings=1024),
    "llama-160m": llama(12, 768, 3072, 12, max_position_embeddings=2048),
    "llama-350m": llama(24, 1024, 2736, 16, max_position_embeddings=1024),
    "llama-1b": llama(24, 2048, 5461, 32, max_position_embeddings=1024),
    "llama-2-7b": llama(32, 4096, 11008, 32, vocab_size=32000, max_position_embeddings=4096),
    "llama-2-13b": llama(40, 5120, 13824, 40, vocab_size=32000, max_position_embeddings=4096),
    "llama-3-70b": llama(80, 8192, 28672, 64, **LLAMA3, max_position_embeddings=8192),
    "llama-3-8b": llama(32, 4096, 14336, 32, **LLAMA3, max_position_embeddings=8192),
    "llama-3.2-1b": llama(
        16,
        2048,
        8192,
        32,
        **LLAMA3,
        max_position_embeddings=131072,
        rope_scaling=LLAMA32_ROPE,
        tie_word_embeddings=True,
    ),
    "qwen2.5-0.5b": llama(24, 896, 4864, 14, num_key_value_heads=2, tie_word_embeddings=True) | QWEN2,
    "qwen2.5-7b": llama(28, 3584, 18944, 28, num_key_value_heads=4, vocab_size=152064) | QWEN2,
    "qwen3-0.6b": llama(28, 1024, 3072, 16, tie_word_embeddings=True) | QWEN3,
    "qwen3-8b": llama(36, 4096, 12288, 32) | QWEN3,
}

LLAMA = Family(
    "llama",
    SETTINGS,
    from_hf=from_hf,
    to_hf=to_hf,
    names=names,
    duplicates=duplicates,
    classifier=decoder_classifier,
    prefix="model.",
    spans_prefix="transformer.",
    heads=r"(lm_head|score|qa_outputs)\.",
    ignored=r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq$",
    presets=PRESETS,
)
