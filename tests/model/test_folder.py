"""Model folders that lack something, have too much, or are broken: what is drawn anew, left out, refused."""

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ronna.base.errors import RonnaError
from ronna.model import config as c
from ronna.model import folder
from ronna.model.families import Family, Weight, classifier_for, preset
from ronna.model.folder import Stored, load_folder, load_weights, save_folder
from ronna.model.init import build, hold, on_cpu
from ronna.model.tensorfiles import fingerprint
from ronna.model.transformer import Transformer

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def small(name: str, **more: Any) -> tuple[Family, Transformer]:
    family, cfg = preset(name, **SMALL, intermediate_size=48, max_position_embeddings=16, **more)
    return family, build(cfg, seed=1)


def write(folder: Path, name: str = "bert-tiny", **more: Any) -> Transformer:
    family, model = small(name, **more)
    save_folder(model, family, folder)
    return model


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)


def refusal(folder: Path, **how: Any) -> str:
    with pytest.raises(RonnaError) as error:
        load_folder(folder, **how)
    assert str(folder) in str(error.value)
    return str(error.value)


def same(a: Transformer, b: Transformer, but: tuple[str, ...] = ()) -> bool:
    first, second = dict(a.named_parameters()), dict(b.named_parameters())
    return all(torch.equal(p, second[n]) for n, p in first.items() if not n.startswith(but))


def test_a_classifier_is_drawn_anew_on_a_pretrained_body(tmp_path: Path) -> None:
    model = write(tmp_path)
    classifier = c.Classifier(3, "first", "tanh")
    loaded = [load_folder(tmp_path, head=False, classifier=classifier, seed=s) for s in (0, 0, 1)]
    first, again, other = (x.model for x in loaded)
    assert first.head is None and same(first, model, but=("classifier.",))
    assert same(first, again) and not same(first, other)
    assert same(first, other, but=("classifier.",))
    left, drawn = loaded[0].notes
    assert "cls.predictions.bias" in left and "and 1 more" in left
    assert "classifier.dense.bias" in drawn and "drawn anew" in drawn
    assert 0.015 < dict(first.named_parameters())["classifier.dense.weight"].detach().std() < 0.025


def test_a_classifier_for_other_labels_is_drawn_anew(tmp_path: Path) -> None:
    family, model = small("bert-tiny")
    cfg = replace(model.cfg, head=None, classifier=classifier_for(family, model.cfg, 3))
    save_folder(build(cfg, 0), family, tmp_path)
    assert load_folder(tmp_path).model.cfg == cfg
    loaded = load_folder(tmp_path, head=False, classifier=classifier_for(family, cfg, 5))
    assert "classifier.weight" in loaded.notes[0] and "another number of labels" in loaded.notes[0]
    kept = load_folder(tmp_path).model
    assert same(loaded.model, kept, but=("classifier.out",))
    without = load_folder(tmp_path, head=False)
    assert without.model.classifier is None and "classifier.weight" in without.notes[0]


@pytest.mark.parametrize("name", ["gpt2-tiny", "t5-tiny", "transformer-tiny", "modernbert-tiny", "roberta-base"])
def test_ties_hold_after_loading(tmp_path: Path, name: str) -> None:
    write(tmp_path, name)
    model = load_folder(tmp_path).model
    assert model.head is not None and model.head.logits.weight is model.embedding.tokens.weight
    assert sum(p.numel() for p in model.parameters()) == model.cfg.params()
    model.head.logits.weight.sum().backward()
    assert model.embedding.tokens.weight.grad is not None


def test_a_wanted_head_that_is_not_there_is_drawn_anew(tmp_path: Path) -> None:
    model = write(tmp_path, "llama-tiny")
    edit(tmp_path, lambda t: t.pop("lm_head.weight"))
    assert load_folder(tmp_path).model.head is None
    loaded = load_folder(tmp_path, head=True)
    assert "head.logits.weight" in loaded.notes[0] and same(loaded.model, model, but=("head.",))
    assert 0.015 < dict(loaded.model.named_parameters())["head.logits.weight"].detach().std() < 0.025


def test_missing_weights_are_named_and_counted(tmp_path: Path) -> None:
    write(tmp_path)

    def drop(tensors: dict[str, Tensor]) -> None:
        for key in [k for k in tensors if ".layer.1." in k]:
            del tensors[key]

    edit(tmp_path, drop)
    says = refusal(tmp_path)
    assert "weights are missing: bert.encoder.layer.1.attention.self.query.weight" in says and "and 12 more" in says


def test_unknown_weights_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    edit(tmp_path, lambda t: t.update({"bert.encoder.layer.2.output.dense.weight": torch.zeros(3)}))
    assert "no part of this bert model has: bert.encoder.layer.2.output.dense.weight" in refusal(tmp_path)


def test_shapes_are_compared_as_stored(tmp_path: Path) -> None:
    write(tmp_path, "gpt2-tiny")
    key = "transformer.h.0.attn.c_attn.weight"
    edit(tmp_path, lambda t: t.update({key: t[key].T}))
    assert f"{key} has shape [96, 32], by config.json it is [32, 96]" in refusal(tmp_path)


def test_a_differing_copy_of_a_tied_matrix_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "gpt2-tiny")
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    assert load_folder(tmp_path).notes == []
    edit(tmp_path, lambda t: t["lm_head.weight"][3, 3].add_(1e-3))
    assert "lm_head.weight and transformer.wte.weight are one matrix" in refusal(tmp_path)


def test_a_copy_stands_in_for_its_original(tmp_path: Path) -> None:
    model = write(tmp_path, "t5-tiny")
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("shared.weight")}))
    assert same(load_folder(tmp_path).model, model)


def test_two_matrices_of_a_t5_that_transformers_5_calls_tied(tmp_path: Path) -> None:
    model = write(tmp_path, "t5-v1.1-small")
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_folder(tmp_path)
    assert loaded.model.cfg == model.cfg and same(loaded.model, model)
    edit(tmp_path, lambda t: t.pop("lm_head.weight"))
    head = load_folder(tmp_path).model.cfg.head
    assert head == c.Head(tied=True)


def test_what_carries_nothing_is_passed_over(tmp_path: Path) -> None:
    model = write(tmp_path)
    edit(tmp_path, lambda t: t.update({"bert.embeddings.position_ids": torch.arange(16)[None]}))

    def old_names(tensors: dict[str, Tensor]) -> None:
        for key in [k for k in tensors if "LayerNorm" in k]:
            tensors[key.replace("weight", "gamma").replace("bias", "beta")] = tensors.pop(key)

    edit(tmp_path, old_names)
    loaded = load_folder(tmp_path)
    assert loaded.notes == [] and same(loaded.model, model)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    says = refusal(tmp_path)
    assert "only pickled weights (pytorch_model.bin)" in says and "save_pretrained" in says


def test_broken_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for broken in (whole[:-10], whole[:100], b"", b"\xff" * 8 + whole[8:]):
        path.write_bytes(broken)
        assert "model.safetensors: cannot be read" in refusal(tmp_path)


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    edit(tmp_path, lambda t: t.update({"cls.predictions.bias": t["cls.predictions.bias"].to(torch.int8)}))
    assert "cls.predictions.bias holds I8 numbers" in refusal(tmp_path)


@pytest.mark.parametrize("place", ["../model.safetensors", "{}/model.safetensors", "lost.safetensors", "x.bin", 7])
def test_an_index_cannot_point_elsewhere(tmp_path: Path, place: Any) -> None:
    folder = tmp_path / "model"
    family, model = small("bert-tiny")
    save_folder(model, family, folder, max_shard_bytes=20_000)
    save_folder(model, family, tmp_path)  # so that what is pointed to is there, and whole
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["cls.predictions.bias"] = place = str(place).format(tmp_path) if place != 7 else 7
    path.write_text(json.dumps(index))
    assert str(place) in refusal(folder)


def test_an_index_must_be_true(tmp_path: Path) -> None:
    family, model = small("bert-tiny")
    save_folder(model, family, tmp_path, max_shard_bytes=20_000)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    moved = next(k for k, v in index["weight_map"].items() if v == files[0])
    path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {moved: files[1]}}))
    assert f"{files[1]} does not hold {moved}" in refusal(tmp_path)
    path.write_text("{}")
    assert "not an index of weights" in refusal(tmp_path)


def test_saving_again_leaves_no_stale_weights(tmp_path: Path) -> None:
    family, model = small("bert-tiny")
    save_folder(model, family, tmp_path)
    save_folder(model, family, tmp_path, max_shard_bytes=20_000)
    assert not (tmp_path / "model.safetensors").exists()
    save_folder(model, family, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_given_tensors_are_written_instead(tmp_path: Path) -> None:
    family, model = small("modernbert-tiny")
    doubled = {name: 2 * value for name, value in model.state_dict().items()}
    save_folder(model, family, tmp_path, tensors=doubled)
    state = load_folder(tmp_path).model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in doubled.items())


def test_a_model_that_a_family_cannot_express_is_not_saved(tmp_path: Path) -> None:
    family, model = small("bert-tiny")
    stack = model.cfg.encoder
    assert stack is not None
    odd = replace(stack.blocks[1], norm_at="pre")
    cfg = replace(model.cfg, encoder=replace(stack, blocks=(stack.blocks[0], odd)))
    with pytest.raises(RonnaError, match=r"model\.encoder\.blocks\[1\]\.norm_at is 'pre', there it is 'post'"):
        save_folder(Transformer(cfg), family, tmp_path / "a")
    pooled = replace(model.cfg, head=None, classifier=c.Classifier(2, "mean", "tanh"))
    with pytest.raises(RonnaError, match=r"classifier\.pool is 'mean'"):
        save_folder(Transformer(pooled), family, tmp_path / "b")
    both = replace(model.cfg, classifier=c.Classifier(3, "first", "tanh"))
    with pytest.raises(RonnaError, match="scores 2 labels, not 3"):
        save_folder(Transformer(both), family, tmp_path / "c")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["roberta-base", "gpt2-tiny", "llama-tiny", "modernbert-tiny", "t5-tiny", "opus-mt"])
def test_two_heads_do_not_fit_where_transformers_has_one(tmp_path: Path, name: str) -> None:
    family, model = small(name)
    cfg = replace(model.cfg, classifier=c.Classifier(2))
    with pytest.raises(RonnaError, match="classifier"):
        save_folder(Transformer(cfg), family, tmp_path)


def test_labels_must_fit_and_token_ids_are_the_tokenizers(tmp_path: Path) -> None:
    family, model = small("roberta-base")
    with pytest.raises(RonnaError, match="2 names for 0 scores"):
        save_folder(model, family, tmp_path, labels=["a", "b"])
    extra = {"bos_token_id": 7, "vocab_size": 3, "torch_dtype": "float16", "license": "x"}
    save_folder(model, family, tmp_path, extra_config=extra)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["bos_token_id"], config["vocab_size"], config["license"]) == (7, 50, "x")
    assert "torch_dtype" not in config and config["dtype"] == "float32"
    # RoBERTa's positions start behind the padding id, so another one is another model.
    with pytest.raises(RonnaError, match=r"positions\.offset is 2, there it is 1"):
        save_folder(model, family, tmp_path, extra_config={"pad_token_id": 0})


@pytest.mark.parametrize("piece", [2**22, 100])
def test_loading_holds_no_second_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """When a weight, or some rows of one, are read from the disk, those before are already gone."""
    monkeypatch.setattr(folder, "PIECE", piece)
    written = write(tmp_path, "gpt2-tiny")
    count = 0
    seen: list[weakref.ref[torch.UntypedStorage]] = []
    read = Stored.read

    def watched(self: Stored, weight: Weight, ndim: int, *rows: int) -> Tensor:
        nonlocal count
        assert all(tensor() is None for tensor in seen)
        tensor = read(self, weight, ndim, *rows)
        assert tensor.numel() <= piece
        seen.append(weakref.ref(tensor.untyped_storage()))
        count += tensor.numel()
        return tensor

    monkeypatch.setattr(Stored, "read", watched)
    loaded = load_folder(tmp_path)
    assert count == loaded.model.cfg.params() and same(loaded.model, written)


def test_weights_are_never_held_in_another_precision_than_asked_for(tmp_path: Path) -> None:
    write(tmp_path, "gpt2-tiny")
    made = []

    def watched(model: Transformer) -> None:
        assert all(p.is_meta for p in model.parameters())
        made.append({p.dtype for p in model.parameters() if p.ndim == 2})
        on_cpu(model)

    narrow = load_folder(tmp_path, precision=partial(hold, matrices=torch.bfloat16), allot=watched).model
    assert made == [{torch.bfloat16}] and {p.dtype for p in narrow.parameters() if p.ndim == 2} == made[0]
    wide = load_folder(tmp_path).model
    hold(wide, torch.bfloat16)
    assert same(narrow, wide) and narrow.head.logits.weight is narrow.embedding.tokens.weight


@pytest.mark.parametrize("name", ["gpt2-tiny", "bert-tiny", "t5-tiny"])
def test_weights_come_back_into_the_model_that_is_there(tmp_path: Path, name: str) -> None:
    family, model = small(name)
    hold(model, torch.bfloat16)
    before = {n: p.clone() for n, p in model.named_parameters()}
    places = {n: p.data_ptr() for n, p in model.named_parameters()}
    save_folder(model, family, tmp_path)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    load_weights(model, family, tmp_path)
    assert all(torch.equal(p, before[n]) and p.data_ptr() == places[n] for n, p in model.named_parameters())
    other = Transformer(replace(model.cfg, head=None, classifier=c.Classifier(3)))
    with pytest.raises(RonnaError, match=r"missing|no place"):
        load_weights(other, family, tmp_path)


def test_a_fingerprint_tells_weights_apart_and_takes_any_type(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(20, 3), "a.position_ids": torch.arange(9), "a.scale": torch.tensor(2.0)}
    found = set()
    for name, change in (("first", 0.0), ("again", 0.0), ("other", 1e-3)):
        (tmp_path / name).mkdir()
        save_file(tensors | {"a.weight": tensors["a.weight"] + change}, tmp_path / name / "model.safetensors")
        found.add(fingerprint(tmp_path / name))
    assert len(found) == 2
