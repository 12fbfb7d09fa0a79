"""Folders we write are those that transformers would write: same keys, same shapes, loaded as they are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open

from ronna.model.folder import load_folder, save_folder
from ronna.model.transformer import Transformer

from .cases import CASES, CLASSIFIERS, NAMES, Case, ours, scores, texts, theirs
from .conftest import Pair


def layout(folder: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
            assert file.metadata() == {"format": "pt"}
    return found


def read_back(cls: Any, folder: Path) -> Any:
    """transformers' model of a folder, which must lack nothing and have nothing over."""
    model, info = cls.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    return model.eval()


def same_state(a: Transformer, b: Transformer) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_what_we_save_is_what_transformers_saves(pair: Pair, tmp_path: Path) -> None:
    save_folder(pair.ours, pair.family, tmp_path)
    assert layout(tmp_path) == layout(pair.folder)
    again = read_back(pair.case.lm, tmp_path)
    batch = texts()
    assert torch.equal(theirs(pair.case, again, batch), theirs(pair.case, pair.theirs, batch))
    loaded = load_folder(tmp_path)
    assert loaded.notes == [] and loaded.model.cfg == pair.ours.cfg
    assert same_state(loaded.model, pair.ours)
    assert torch.equal(ours(pair.case, loaded.model.eval(), batch), ours(pair.case, pair.ours, batch))


def test_shards_and_their_index(pair: Pair, tmp_path: Path) -> None:
    save_folder(pair.ours, pair.family, tmp_path, max_shard_bytes=100_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3 and not (tmp_path / "model.safetensors").exists()
    assert index["weight_map"].keys() == layout(pair.folder).keys()
    assert all((tmp_path / f).stat().st_size < 120_000 for f in files)
    read_back(pair.case.lm, tmp_path)
    assert same_state(load_folder(tmp_path).model, pair.ours)


@pytest.mark.parametrize(("case", "cls"), CLASSIFIERS, ids=NAMES)
def test_classifiers_travel_with_their_labels(case: Case, cls: Any, tmp_path: Path) -> None:
    batch, labels = texts(), ["sad", "glad"]
    model = case.build(cls, num_labels=2)
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_folder(tmp_path / "theirs")
    save_folder(
        loaded.model, loaded.family, tmp_path / "ours", labels=labels,
        problem_type="single_label_classification", extra_config=loaded.config,
    )  # fmt: skip
    assert layout(tmp_path / "ours") == layout(tmp_path / "theirs")
    again = read_back(cls, tmp_path / "ours")
    assert again.config.id2label == dict(enumerate(labels))
    assert again.config.label2id == {label: i for i, label in enumerate(labels)}
    assert again.config.problem_type == "single_label_classification"
    assert again.config.pad_token_id == model.config.pad_token_id
    assert torch.equal(theirs(case, again, batch), theirs(case, model, batch))
    kept = load_folder(tmp_path / "ours")
    assert torch.equal(scores(case, kept.model.eval(), batch), scores(case, loaded.model.eval(), batch))
    save_folder(kept.model, kept.family, tmp_path / "kept", extra_config=kept.config)
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["id2label"]["1"] == "glad"


def test_bert_with_both_heads_is_for_pretraining(tmp_path: Path) -> None:
    case = CASES["bert"]
    model = case.build(hf.BertForPreTraining)
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_folder(
        tmp_path / "theirs", head=True, classifier=load_folder(tmp_path / "theirs").model.cfg.classifier
    )
    save_folder(loaded.model, loaded.family, tmp_path / "ours")
    assert layout(tmp_path / "ours") == layout(tmp_path / "theirs")
    read_back(hf.BertForPreTraining, tmp_path / "ours")


def test_a_body_alone_has_no_prefix(pair: Pair, tmp_path: Path) -> None:
    body = load_folder(pair.folder, head=False)
    assert body.model.head is None
    save_folder(body.model, body.family, tmp_path)
    assert not any(key.startswith(("bert.", "model.", "transformer.", "roberta.")) for key in layout(tmp_path))
    model, info = hf.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    computed = ("pooler", "embed_positions")  # neither a body's weights: one is a head, the other sinusoids
    assert not info["unexpected_keys"]
    assert all(any(part in key for part in computed) for key in info["missing_keys"])
    assert type(model).__name__ == json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    again = load_folder(tmp_path)
    assert again.notes == [] and again.model.head is None and same_state(again.model, body.model)
    batch = texts()
    states = [ours(pair.case, m.eval(), batch, m.hidden) for m in (pair.ours, again.model)]
    assert torch.equal(*states)


def test_weights_in_half_precision(pair: Pair, tmp_path: Path) -> None:
    save_folder(pair.ours, pair.family, tmp_path, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    again = load_folder(tmp_path, dtype=torch.bfloat16).model
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    exact = pair.ours.state_dict()
    assert all(torch.equal(v, exact[k].bfloat16()) for k, v in again.state_dict().items())
