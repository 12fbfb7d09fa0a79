"""RoBERTa (Liu et al. 2019): BERT without next-sentence prediction; positions start behind the padding id."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from ronna.model import config as c
from ronna.model.families import bert
from ronna.model.families.base import (
    Count,
    Family,
    Weight,
    architecture,
    one_head,
    only,
    read,
)


class RobertaSettings(bert.BertSettings):
    vocab_size: Count = 50265
    pad_token_id: Annotated[int, Field(ge=0)] = 1


def from_hf(config: Mapping[str, Any]) -> c.Model:
    h = read(RobertaSettings, config)
    # The head's activation is fixed to the exact GELU, whatever hidden_act says.
    model = bert.with_classifier(bert.body(h, offset=h.pad_token_id + 1, act="gelu"), h)
    return replace(model, classifier=twice_dropped(model.classifier)) if model.classifier else model


def twice_dropped(made: c.Classifier) -> c.Classifier:
    """Unlike BERT's, the dense layer reads with dropout too."""
    return replace(made, dense_dropout=made.dropout) if made.dense else made


def classifier(model: c.Model, labels: int, of: c.Unit) -> c.Classifier:
    return twice_dropped(bert.classifier(model, labels, of))


def to_hf(model: c.Model) -> dict[str, Any]:
    one_head(model, "RoBERTa")
    positions = model.embedding.positions
    assert isinstance(positions, c.LearnedPositions)
    return {
        "model_type": "roberta",
        "architectures": architecture(model, "Roberta", "ForMaskedLM"),
        **bert.body_to_hf(model),
        "pad_token_id": positions.offset - 1,
    }


def names(model: c.Model) -> dict[str, Weight]:
    dense = model.classifier is not None and model.classifier.dense is not None
    return {
        **bert.body_names("roberta.", len(only(model.encoder).blocks)),
        "head.dense": Weight("lm_head.dense"),
        "head.norm": Weight("lm_head.layer_norm"),
        "head.logits.bias": Weight("lm_head.bias"),
        "classifier.dense": Weight("classifier.dense"),
        "classifier.out": Weight(bert.output_name(model, "classifier.out_proj" if dense else "classifier")),
    }


def duplicates(model: c.Model) -> dict[str, str]:
    if not model.head:
        return {}
    return {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }


OFFICIAL = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
PRESETS = {
    "roberta-base": bert.size(12, 768) | OFFICIAL,
    "roberta-large": bert.size(24, 1024) | OFFICIAL,
}

ROBERTA = Family(
    "roberta",
    {"roberta": RobertaSettings},
    from_hf=from_hf,
    to_hf=to_hf,
    names=names,
    duplicates=duplicates,
    classifier=classifier,
    prefix="roberta.",
    heads=r"(lm_head|classifier|qa_outputs|roberta\.pooler)\.",
    ignored=r"roberta\.embeddings\.(position_ids|token_type_ids)$",
    presets=PRESETS,
)
