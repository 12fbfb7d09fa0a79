"""ModernBERT (Warner et al. 2024): pre-norm encoder, rotary positions, windows in most layers, no biases."""

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
    Positive,
    Rate,
    Rope,
    Settings,
    Weight,
    architecture,
    classifier_keys,
    head_size,
    hub_activation,
    layered,
    one_head,
    only,
    read,
    rope_parameters,
)

Kind = Literal["full_attention", "sliding_attention"]
GLOBAL: Kind = "full_attention"
LOCAL: Kind = "sliding_attention"


class ModernBertSettings(Settings):
    vocab_size: Count = 50368
    hidden_size: Count = 768
    intermediate_size: Count = 1152
    num_hidden_layers: Depth = 22
    num_attention_heads: Count = 12
    hidden_activation: HubActivation = "gelu"
    max_position_embeddings: Count = 8192
    initializer_range: Positive = 0.02
    norm_eps: Positive = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    attention_dropout: Rate = 0.0
    layer_types: list[Kind] | None = None
    global_attn_every_n_layers: Count = 3
    rope_parameters: dict[Kind, Rope | None] | None = None
    rope_scaling: Rope | None = None
    global_rope_theta: Positive = 160_000.0
    local_rope_theta: Positive | None = None
    local_attention: Count = 128
    embedding_dropout: Rate = 0.0
    mlp_bias: bool = False
    mlp_dropout: Rate = 0.0
    decoder_bias: bool = True
    classifier_pooling: Literal["cls", "mean"] = "cls"
    classifier_dropout: Rate = 0.0
    classifier_bias: bool = False
    classifier_activation: HubActivation = "gelu"
    tie_word_embeddings: bool = True

    @property
    def kinds(self) -> list[Kind]:
        """Which attention each layer has."""
        every = self.global_attn_every_n_layers
        kinds = self.layer_types or [LOCAL if i % every else GLOBAL for i in range(self.num_hidden_layers)]
        if len(kinds) != self.num_hidden_layers:
            raise RonnaError(
                f"{len(kinds)} entries for {self.num_hidden_layers} layers", where="config.json: layer_types"
            )
        return kinds

    def rotary(self, kind: Kind, config: Mapping[str, Any]) -> c.Rotary:
        # An absent local theta is 10,000, one that is null is the global one.
        local = self.local_rope_theta or (self.global_rope_theta if "local_rope_theta" in config else 10_000.0)
        theta = self.global_rope_theta if kind == GLOBAL else local
        return (self.rope_scaling or (self.rope_parameters or {}).get(kind) or Rope()).rotary(theta)


def classifier(model: c.Model, labels: int, of: c.Unit) -> c.Classifier:
    transform = model.head.transform if model.head else None
    norm = transform.norm if transform else only(model.encoder).final_norm
    act, bias = (transform.act, transform.bias) if transform else ("gelu", False)
    if of == "pair":
        return c.Classifier(labels, model.pool or "first", of=of)
    return c.Classifier(labels, model.pool or "first", act, dense_bias=bias, norm=norm, of=of)


def from_hf(config: Mapping[str, Any]) -> c.Model:
    h = read(ModernBertSettings, config)
    norm = c.Norm("layer", h.norm_eps, h.norm_bias)
    act = ACTIVATIONS[h.hidden_activation]
    ffn = c.FeedForward(h.intermediate_size, act, gated=True, bias=h.mlp_bias, dropout=h.mlp_dropout)

    def block(i: int, kind: Kind) -> c.Block:
        attention = c.Attention(
            h.num_attention_heads,
            head_size(h.hidden_size, h.num_attention_heads),
            bias=h.attention_bias,
            out_bias=h.attention_bias,
            rotary=h.rotary(kind, config),
            window=None if kind == GLOBAL else h.local_attention // 2,
            dropout=h.attention_dropout,
        )
        return c.Block(attention, ffn, norm, skip_first_norm=i == 0)

    transform = c.Transform(ACTIVATIONS[h.classifier_activation], norm, bias=h.classifier_bias)
    blocks = tuple(block(i, kind) for i, kind in enumerate(h.kinds))
    model = c.Model(
        h.hidden_size,
        c.Embedding(h.vocab_size, norm=norm, dropout=h.embedding_dropout),
        c.Head(tied=h.tie_word_embeddings, bias=h.decoder_bias, transform=transform),
        encoder=c.Stack(blocks, causal=False, final_norm=norm),
        init=c.Init("residual", h.initializer_range),
        context=h.max_position_embeddings,
        pool="mean" if h.classifier_pooling == "mean" else None,
    )
    if h.unit is None:
        return model
    made = h.with_transitions(classifier(model, h.labels, h.unit))
    return replace(model, classifier=replace(made, dropout=h.classifier_dropout))


def attention_keys(stack: c.Stack) -> dict[str, Any]:
    """Which layers see a window, and their positions: as transformers 5 says it, and 4 where that can."""
    kinds = [GLOBAL if b.attention.window is None else LOCAL for b in stack.blocks]
    first = {kind: stack.blocks[kinds.index(kind)].attention for kind in (GLOBAL, LOCAL) if kind in kinds}
    rotary = {kind: attention.rotary or c.Rotary() for kind, attention in first.items()}
    defaults = {GLOBAL: c.Rotary(160_000.0), LOCAL: c.Rotary()}
    ropes = defaults | rotary
    keys: dict[str, Any] = {
        "layer_types": kinds,
        "rope_parameters": {kind: rope_parameters(rope) for kind, rope in ropes.items()},
        "global_rope_theta": ropes[GLOBAL].theta,
        "local_rope_theta": ropes[LOCAL].theta,
    }
    if LOCAL in first:
        keys["local_attention"] = 2 * (first[LOCAL].window or 0)
    for every in range(1, len(kinds) + 1):
        if kinds == [LOCAL if i % every else GLOBAL for i in range(len(kinds))]:
            return keys | {"global_attn_every_n_layers": every}
    return keys


def to_hf(model: c.Model) -> dict[str, Any]:
    one_head(model, "ModernBERT")
    stack, head, scores = only(model.encoder), model.head, model.classifier
    block = stack.blocks[0]
    transform = head.transform if head else None
    dense = (transform.act, transform.bias) if transform else (scores.dense, scores.dense_bias) if scores else None
    act, bias = dense or ("gelu", False)
    config = {
        "model_type": "modernbert",
        "architectures": architecture(model, "ModernBert", "ForMaskedLM"),
        "vocab_size": model.embedding.vocab,
        "hidden_size": model.dim,
        "intermediate_size": block.ffn.hidden,
        "num_hidden_layers": len(stack.blocks),
        "num_attention_heads": block.attention.heads,
        "hidden_activation": hub_activation(block.ffn.act),
        "initializer_range": model.init.std,
        "norm_eps": block.norm.eps,
        "norm_bias": block.norm.bias,
        "attention_bias": block.attention.bias,
        "attention_dropout": block.attention.dropout,
        "embedding_dropout": model.embedding.dropout,
        "mlp_bias": block.ffn.bias,
        "mlp_dropout": block.ffn.dropout,
        "decoder_bias": head.bias if head else True,
        "classifier_pooling": "mean" if (scores.pool if scores else model.pool) == "mean" else "cls",
        "classifier_dropout": scores.dropout if scores else 0.0,
        "classifier_bias": bias,
        "classifier_activation": hub_activation(act or "gelu"),
        "tie_word_embeddings": head.tied if head else True,
        # The class's default ids belong to its own tokenizer and need not exist in this vocabulary.
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")),
        **attention_keys(stack),
        **classifier_keys(model),
    }
    return config | ({"max_position_embeddings": model.context} if model.context else {})


def names(model: c.Model) -> dict[str, Weight]:
    table = {
        **{f"attention.{n}": Weight("attn.Wqkv", i, 3) for i, n in enumerate("qkv")},
        "attention.out": Weight("attn.Wo"),
        "attention_norm": Weight("attn_norm"),
        "ffn.gate": Weight("mlp.Wi", 0, 2),
        "ffn.up": Weight("mlp.Wi", 1, 2),
        "ffn.down": Weight("mlp.Wo"),
        "ffn_norm": Weight("mlp_norm"),
    }
    return {
        "embedding.tokens": Weight("model.embeddings.tok_embeddings"),
        "embedding.norm": Weight("model.embeddings.norm"),
        **layered("encoder.blocks.{}.", "model.layers.{}.", len(only(model.encoder).blocks), table),
        "encoder.final_norm": Weight("model.final_norm"),
        "head.dense": Weight("head.dense"),
        "head.norm": Weight("head.norm"),
        "head.logits": Weight("decoder"),
        "classifier.dense": Weight("head.dense"),
        "classifier.norm": Weight("head.norm"),
        "classifier.out": Weight("classifier"),
    }


def duplicates(model: c.Model) -> dict[str, str]:
    return {"decoder.weight": "model.embeddings.tok_embeddings.weight"} if model.head and model.head.tied else {}


MEAN: dict[str, Any] = {
    "classifier_pooling": "mean"
}  # as the published sizes have it: masked words alone teach [CLS] nothing

PRESETS = {
    "modernbert-tiny": MEAN
    | {
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_attention_heads": 2,
        "max_position_embeddings": 1024,
    },
    "modernbert-mini": MEAN
    | {
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
    },
    "modernbert-base": MEAN,
    "modernbert-large": MEAN
    | {
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "intermediate_size": 2624,
        "num_attention_heads": 16,
    },
}

MODERNBERT = Family(
    "modernbert",
    {"modernbert": ModernBertSettings},
    from_hf=from_hf,
    to_hf=to_hf,
    names=names,
    duplicates=duplicates,
    classifier=classifier,
    prefix="model.",
    heads=r"(head|decoder|classifier)\.",
    ignored=r"model\.(layers\.\d+\.attn\.)?rotary_emb\.(\w+_)?inv_freq$",
    presets=PRESETS,
)
