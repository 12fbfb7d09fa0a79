"""BERT (Devlin et al. 2019): post-norm encoder, learned positions, segments; masked tokens, next sentence."""

from collections.abc import Mapping
from dataclasses import replace
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
    Settings,
    Weight,
    architecture,
    classifier_keys,
    head_size,
    hub_activation,
    layered,
    only,
    read,
)


class BertSettings(Settings):
    vocab_size: Count = 30522
    hidden_size: Count = 768
    num_hidden_layers: Depth = 12
    num_attention_heads: Count = 12
    intermediate_size: Count = 3072
    hidden_act: HubActivation = "gelu"
    hidden_dropout_prob: Rate = 0.1
    attention_probs_dropout_prob: Rate = 0.1
    max_position_embeddings: Count = 512
    type_vocab_size: Count = 2
    initializer_range: Positive = 0.02
    layer_norm_eps: Positive = 1e-12
    classifier_dropout: Rate | None = None
    position_embedding_type: Literal["absolute"] = "absolute"
    is_decoder: Literal[False] = False
    add_cross_attention: Literal[False] = False
    tie_word_embeddings: Literal[True] = True
    pruned_heads: dict[str, Any] = Field({}, max_length=0)


def body(h: BertSettings, *, offset: int, act: c.Activation) -> c.Model:
    """What BERT and RoBERTa share; `act` is that of the vocabulary head."""
    norm = c.Norm("layer", eps=h.layer_norm_eps)
    attention = c.Attention(
        h.num_attention_heads,
        head_size(h.hidden_size, h.num_attention_heads),
        bias=True,
        out_bias=True,
        dropout=h.attention_probs_dropout_prob,
    )
    ffn = c.FeedForward(h.intermediate_size, ACTIVATIONS[h.hidden_act], bias=True)
    block = c.Block(attention, ffn, norm, "post", dropout=h.hidden_dropout_prob)
    positions = c.LearnedPositions(h.max_position_embeddings, offset)
    return c.Model(
        h.hidden_size,
        c.Embedding(h.vocab_size, positions, h.type_vocab_size, norm, dropout=h.hidden_dropout_prob),
        c.Head(bias=True, transform=c.Transform(act, norm)),
        encoder=c.Stack((block,) * h.num_hidden_layers, causal=False),
        init=c.Init("normal", h.initializer_range),
    )


def with_classifier(model: c.Model, h: BertSettings) -> c.Model:
    """The model with the classifier that the folder's architecture has, if it has one."""
    if h.unit is None:
        return model
    rate = h.hidden_dropout_prob if h.classifier_dropout is None else h.classifier_dropout
    made = h.with_transitions(classifier(model, h.labels, h.unit))
    return replace(model, classifier=made if h.unit == "spans" else replace(made, dropout=rate))


def classifier(model: c.Model, labels: int, of: c.Unit) -> c.Classifier:
    dense: c.Activation | None = "tanh" if of == "sequence" else None
    return c.Classifier(labels, dense=dense, dropout=0.0 if of == "spans" else model.embedding.dropout, of=of)


def output_name(model: c.Model, usual: str) -> str:
    """Of the classifier's last map."""
    return "qa_outputs" if model.classifier and model.classifier.of == "spans" else usual


def from_hf(config: Mapping[str, Any]) -> c.Model:
    h = read(BertSettings, config)
    model = body(h, offset=0, act=ACTIVATIONS[h.hidden_act])
    if "BertForPreTraining" in h.architectures:
        return replace(model, classifier=c.Classifier(2, "first", "tanh"))
    return with_classifier(model, h)


def body_to_hf(model: c.Model) -> dict[str, Any]:
    block, positions = only(model.encoder).blocks[0], model.embedding.positions
    assert isinstance(positions, c.LearnedPositions)
    return {
        "vocab_size": model.embedding.vocab,
        "hidden_size": model.dim,
        "num_hidden_layers": len(only(model.encoder).blocks),
        "num_attention_heads": block.attention.heads,
        "intermediate_size": block.ffn.hidden,
        "hidden_act": hub_activation(block.ffn.act),
        "hidden_dropout_prob": block.dropout,
        "attention_probs_dropout_prob": block.attention.dropout,
        "max_position_embeddings": positions.count,
        "type_vocab_size": model.embedding.segments,
        "initializer_range": model.init.std,
        "layer_norm_eps": block.norm.eps,
        "classifier_dropout": model.classifier.dropout if model.classifier else None,
        **classifier_keys(model),
    }


def to_hf(model: c.Model) -> dict[str, Any]:
    classes = architecture(model, "Bert", "ForMaskedLM")
    if model.head and model.classifier:
        classes = ["BertForPreTraining"]
        if model.classifier.labels != 2:
            raise RonnaError(
                f"beside its vocabulary head BERT scores 2 labels, not {model.classifier.labels}",
                fix="save the model without one of them",
            )
    return {"model_type": "bert", "architectures": classes, **body_to_hf(model), "pad_token_id": 0}


def body_names(prefix: str, layers: int) -> dict[str, Weight]:
    table = {
        "attention.q": "attention.self.query",
        "attention.k": "attention.self.key",
        "attention.v": "attention.self.value",
        "attention.out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "ffn.up": "intermediate.dense",
        "ffn.down": "output.dense",
        "ffn_norm": "output.LayerNorm",
    }
    return {
        "embedding.tokens": Weight(f"{prefix}embeddings.word_embeddings"),
        "embedding.positions": Weight(f"{prefix}embeddings.position_embeddings"),
        "embedding.segments": Weight(f"{prefix}embeddings.token_type_embeddings"),
        "embedding.norm": Weight(f"{prefix}embeddings.LayerNorm"),
        **layered("encoder.blocks.{}.", prefix + "encoder.layer.{}.", layers, table),
    }


def names(model: c.Model) -> dict[str, Weight]:
    return {
        **body_names("bert.", len(only(model.encoder).blocks)),
        "head.dense": Weight("cls.predictions.transform.dense"),
        "head.norm": Weight("cls.predictions.transform.LayerNorm"),
        "head.logits.bias": Weight("cls.predictions.bias"),
        "classifier.dense": Weight("bert.pooler.dense"),
        "classifier.out": Weight("cls.seq_relationship" if model.head else output_name(model, "classifier")),
    }


def duplicates(model: c.Model) -> dict[str, str]:
    if not model.head:
        return {}
    return {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }


def size(layers: int, dim: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": dim,
        "num_attention_heads": dim // 64,
        "intermediate_size": 4 * dim,
    }


# base and large: Devlin et al. 2019; the smaller ones: Turc et al. 2019.
PRESETS = {
    "bert-tiny": size(2, 128),
    "bert-mini": size(4, 256),
    "bert-small": size(4, 512),
    "bert-medium": size(8, 512),
    "bert-base": size(12, 768),
    "bert-large": size(24, 1024),
}

BERT = Family(
    "bert",
    {"bert": BertSettings},
    from_hf=from_hf,
    to_hf=to_hf,
    names=names,
    duplicates=duplicates,
    classifier=classifier,
    prefix="bert.",
    heads=r"(cls|classifier|qa_outputs|bert\.pooler)\.",
    ignored=r"bert\.embeddings\.(position_ids|token_type_ids)$",
    presets=PRESETS,
)
