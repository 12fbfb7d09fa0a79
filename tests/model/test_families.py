"""Configs of transformers 4 and 5 to parts and back; presets against published sizes; what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import transformers as hf

from ronna.base.errors import RonnaError
from ronna.model import config as c
from ronna.model.config import Unit, without_dropout
from ronna.model.families import (
    FAMILIES,
    Family,
    classifier_for,
    family_of,
    locate,
    preset,
    read_config,
    with_dropout,
)
from ronna.model.families.base import CLASSIFIERS
from ronna.model.folder import parameter_names

PRESETS = [name for family in FAMILIES for name in family.presets]

# Millions of parameters, by the papers or model cards, tied matrices once.
PUBLISHED = {
    "gpt2": 124.4,
    "gpt2-xl": 1557.6,
    "bert-large": 335.2,
    "llama-60m": 58.1,
    "llama-2-7b": 6738.4,
    "llama-2-13b": 13015.9,
    "llama-3-8b": 8030.3,
    "llama-3-70b": 70553.7,
    "llama-3.2-1b": 1235.8,
    "qwen2.5-0.5b": 494.0,
    "qwen2.5-7b": 7615.6,
    "qwen3-0.6b": 596.0,
    "qwen3-8b": 8190.7,
    "t5-small": 60.5,
    "t5-base": 222.9,
    "t5-large": 737.7,
    "t5-v1.1-small": 77.0,
    "t5-v1.1-base": 247.6,
    "t5-v1.1-large": 783.2,
    "t5-v1.1-xl": 2849.8,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_as_many_parameters_as_in_transformers(name: str) -> None:
    family, model = preset(name)
    config = family.to_hf(model)
    with torch.device("meta"):
        theirs = getattr(hf, config["architectures"][0])(hf.AutoConfig.for_model(**config))
    counted = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    if family.name == "t5" and not config["tie_word_embeddings"]:
        counted += model.embedding.vocab * model.dim  # transformers 5 parts the two matrices only on loading
    if family.name == "transformer2017":
        counted += model.embedding.vocab  # the bias of the logits is a buffer there
    assert model.params() == counted
    if name in PUBLISHED:
        assert round(model.params() / 1e6, 1) == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_the_way_there_and_back(name: str) -> None:
    family, model = preset(name)
    config = json.loads(json.dumps(family.to_hf(model)))
    assert family_of(config) is family
    assert family.from_hf(config) == model
    written_by_5 = hf.AutoConfig.for_model(**config).to_dict()
    assert model.head is not None
    # transformers 5 calls every T5 tied; that v1.1 has two matrices shows in its weights (test_folder.py).
    head = replace(model.head, tied=True) if family.name == "t5" else model.head
    assert family.from_hf(written_by_5) == replace(model, head=head)


# Values for settings whose default gives no hint; ALONE have their own tests, or no effect alone.
VALUES: dict[str, Any] = {
    "n_inner": 100,
    "head_dim": 32,
    "num_key_value_heads": 8,
    "num_decoder_layers": 3,
    "n_positions": 77,
    "scale_decoder_outputs": False,
    "local_rope_theta": 5000.0,
    "classifier_dropout": 0.3,
    "classifier_pooling": "mean",
    "feed_forward_proj": "gated-silu",
    "layer_types": ["full_attention"] * 21 + ["sliding_attention"],
    "rope_scaling": {"type": "linear", "factor": 2.0},
}
ALONE = {"num_local_experts", "num_experts", "partial_rotary_factor", "max_window_layers"} | {
    "architectures", "id2label", "num_labels", "decoder_vocab_size", "pruned_heads", "rope_parameters",
    "sliding_window", "use_sliding_window",
}  # fmt: skip


def other(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int():
            return 2 * value
        case float():
            return value / 2 or 0.25
    return "relu"


def settings() -> list[tuple[Family, str, str, Any]]:
    return [
        (family, kind, key, VALUES.get(key, other(field.default)))
        for family in FAMILIES
        for kind, keys in family.settings.items()
        for key, field in keys.model_fields.items()
        if key not in ALONE and not (get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1)
        if (key, kind) not in {("layer_types", "qwen2"), ("layer_types", "qwen3"), ("attention_bias", "qwen2")}
        if family.classifier or key != "tag_transitions"
    ]


@pytest.mark.parametrize(("family", "kind", "key", "value"), settings(), ids=lambda v: getattr(v, "name", str(v)))
def test_every_setting_counts_and_survives(family: Family, kind: str, key: str, value: Any) -> None:
    """Another value is another model, with the one head or the other, and `to_hf` writes it down."""
    differs = False
    kinds = CLASSIFIERS.values() if family.classifier else ()
    heads = [[], *([f"X{kind}"] for kind in kinds)]
    for classes in heads:
        base = {"model_type": kind, "architectures": classes}
        without: dict[str, Any] = {"head": None} if classes else {}
        changed = replace(family.from_hf(base | {key: value}), **without)
        assert replace(family.from_hf(family.to_hf(changed)), **without) == changed
        differs |= changed != replace(family.from_hf(base), **without)
    assert differs


@pytest.mark.parametrize("of", ["sequence", "tokens", "spans", "pair"])
@pytest.mark.parametrize("name", [n for f in FAMILIES if f.classifier for n in list(f.presets)[:1]])
def test_classifiers_survive_it_too(name: str, of: Unit) -> None:
    family, model = preset(name)
    classifier = classifier_for(family, model, 7, of)
    model = replace(model, head=None, classifier=classifier)
    config = family.to_hf(model)
    assert config["architectures"][0].endswith(CLASSIFIERS[of])
    assert hf.AutoConfig.for_model(**config).num_labels == 7
    assert family.from_hf(config).classifier == classifier


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_dropout_returns_to_where_the_family_has_it(family: Family) -> None:
    """A model pre-trained and saved without dropout is fine-tuned with it."""
    _, usual = preset(next(iter(family.presets)))
    if family.classifier:
        usual = replace(usual, head=None, classifier=classifier_for(family, usual, 3))
    bare = without_dropout(usual)
    given = with_dropout(family, bare, 0.25)
    assert given != bare and without_dropout(given) == bare and with_dropout(family, given, 0.0) == bare
    if usual != bare:
        assert given == with_dropout(family, usual, 0.25)
    assert replace(family.from_hf(family.to_hf(given)), head=given.head) == given


def test_a_modernbert_folder_says_how_a_classifier_of_it_pools() -> None:
    for name, pool in (("cls", "first"), ("mean", "mean")):
        family, model = preset("modernbert-base", classifier_pooling=name)
        assert classifier_for(family, model, 2).pool == pool
        config = family.to_hf(model)
        assert config["classifier_pooling"] == name and family.from_hf(config) == model
        assert hf.AutoConfig.for_model(**config).classifier_pooling == name


def test_roberta_drops_before_its_classifiers_dense_layer_too() -> None:
    for name, before in (("roberta-base", 0.1), ("bert-base", 0.0)):
        family, model = preset(name)
        classifier = classifier_for(family, model, 2)
        assert (classifier.dense_dropout, classifier.dropout) == (before, 0.1)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_absent_keys_have_the_defaults_of_transformers(family: Any) -> None:
    """A config.json with nothing but its type is what transformers makes of it."""
    for kind in family.model_types:
        full = hf.AutoConfig.for_model(kind).to_dict()
        bare = family.from_hf({"model_type": kind})
        assert bare == replace(family.from_hf(full), context=bare.context)
        assert family.from_hf(dict.fromkeys(full) | {"model_type": kind}).params() == bare.params()


@pytest.mark.parametrize("name", [next(iter(f.presets)) for f in FAMILIES])
def test_every_parameter_has_a_place_of_its_own(name: str) -> None:
    family, model = preset(name)
    weights = [locate(family.names(model), parameter) for parameter in parameter_names(model)]
    assert len({(w.name, w.part) for w in weights}) == len(weights)


def llama(**keys: Any) -> dict[str, Any]:
    return {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4} | keys


def rotary(config: dict[str, Any]) -> c.Rotary | None:
    stack = family_of(config).from_hf(config).decoder
    assert stack is not None
    return stack.blocks[0].attention.rotary


def test_rotary_positions_of_transformers_4_and_5() -> None:
    scaled = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    llama3 = c.Rotary(5e5, c.Llama3Scaling(8.0, 1.0, 4.0, 64))
    assert rotary(llama()) == c.Rotary(10_000.0)
    assert rotary(llama(rope_theta=500000, rope_scaling=None)) == c.Rotary(5e5)
    assert rotary(llama(rope_parameters={"rope_theta": 5e5, "rope_type": "default"})) == c.Rotary(5e5)
    assert rotary(llama(rope_scaling={"type": "linear", "factor": 2})) == c.Rotary(1e4, c.LinearScaling(2.0))
    assert rotary(llama(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaled})) == llama3
    assert rotary(llama(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaled})) == llama3


def test_modernbert_of_transformers_4() -> None:
    old = {
        "model_type": "modernbert", "num_hidden_layers": 5, "global_attn_every_n_layers": 2,
        "local_attention": 64, "global_rope_theta": 80000.0, "local_rope_theta": 20000.0,
    }  # fmt: skip
    stack = family_of(old).from_hf(old).encoder
    assert stack is not None
    attentions = [b.attention for b in stack.blocks]
    assert [a.window for a in attentions] == [None, 32, None, 32, None]
    assert [a.rotary.theta for a in attentions if a.rotary] == [80000.0, 20000.0, 80000.0, 20000.0, 80000.0]


def test_t5_of_transformers_4_and_5() -> None:
    def head(**keys: Any) -> c.Head:
        head = family_of({"model_type": "t5"}).from_hf({"model_type": "t5", "d_model": 64, **keys}).head
        assert head is not None
        return head

    assert head() == c.Head(tied=True, scale=1 / 8)
    assert head(tie_word_embeddings=False) == c.Head(tied=False)
    assert head(tie_word_embeddings=True, scale_decoder_outputs=False) == c.Head(tied=True)


REFUSED = [
    ({"model_type": "bert", "position_embedding_type": "relative_key"}, "position_embedding_type"),
    ({"model_type": "bert", "is_decoder": True}, "is_decoder"),
    ({"model_type": "bert", "hidden_act": "mish"}, "hidden_act"),
    ({"model_type": "bert", "hidden_size": "768"}, "hidden_size"),
    ({"model_type": "bert", "hidden_size": 100}, "do not split into 12 heads"),
    ({"model_type": "bert", "num_hidden_layers": 0}, "num_hidden_layers"),
    ({"model_type": "t5", "num_layers": 10**6}, "num_layers"),
    ({"model_type": "gpt2", "vocab_size": 2**40}, "vocab_size"),
    (llama(rope_scaling="linear"), "rope_scaling"),
    ({"model_type": "roberta", "add_cross_attention": True}, "add_cross_attention"),
    ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention"),
    (llama(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope_scaling.rope_type"),
    (llama(rope_scaling={"type": "linear"}), "linear rope needs factor"),
    (llama(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    (llama(num_local_experts=8), "num_local_experts"),
    (llama(num_key_value_heads=3), "4 heads do not share 3"),
    ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2}, "use_sliding_window"),
    ({"model_type": "t5", "feed_forward_proj": "gated-mish"}, "feed_forward_proj"),
    ({"model_type": "t5", "architectures": ["T5ForSequenceClassification"]}, "T5 with a classifier"),
    ({"model_type": "modernbert", "layer_types": ["full_attention"]}, "layer_types"),
    ({"model_type": "marian", "normalize_before": True}, "normalize_before"),
    ({"model_type": "marian", "share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings"),
    ({"model_type": "marian", "decoder_vocab_size": 100}, "decoder_vocab_size"),
    ({"model_type": "qwen2_moe"}, "did you mean qwen2?"),
    ({}, "no model_type"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "says"), REFUSED)
def test_what_we_do_not_compute_is_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(RonnaError) as error:
        family_of(config).from_hf(config)
    assert says in str(error.value) and "config.json" in str(error.value)


def test_a_window_beyond_every_text_does_not_matter() -> None:
    config = {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "max_window_layers": 2,
        "sliding_window": 32768,
    }
    assert family_of(config).from_hf(config) == family_of(config).from_hf({"model_type": "qwen2"})


def test_presets_take_settings_by_any_common_name() -> None:
    for name in ("gpt2-tiny", "t5-tiny", "bert-tiny", "llama-tiny", "modernbert-tiny", "transformer-tiny"):
        _, model = preset(name, vocab_size=1234, max_position_embeddings=77)
        assert (model.embedding.vocab, model.max_length) == (1234, 77)
    _, model = preset("roberta-base", max_position_embeddings=40, pad_token_id=0)
    assert model.max_length == 39


def test_unknown_names_get_the_nearest() -> None:
    for call in (lambda: preset("bert-bas"), lambda: preset("gpt2", vocab_sise=10)):
        with pytest.raises(RonnaError, match=r"did you mean (bert-base|vocab_size)\?"):
            call()
    with pytest.raises(RonnaError, match="have no classifier"):
        classifier_for(*preset("t5-tiny"), 2)


def test_read_config_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(RonnaError, match="no such folder"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(RonnaError, match=r"config\.json cannot be read"):
        read_config(tmp_path)
    for text, says in (
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"model_type": "bert", "quantization_config": {}}', "quantized"),
        ('{"model_type": "bert", "hidden_act": "mish"}', f"{tmp_path}/config.json: hidden_act"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(RonnaError) as error:
            read_config(tmp_path)
        assert says in str(error.value) and str(tmp_path) in str(error.value)


def test_families_need_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, ronna.model.families; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
