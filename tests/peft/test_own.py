"""Adapters take turns on one base: each answers as if alone, with the classifier, norms and biases that are its own."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ronna
from ronna.base.errors import RonnaError
from ronna.cli import main
from ronna.model import config as c
from ronna.model.families import classifier_for, preset
from ronna.model.folder import load_folder, save_folder
from ronna.model.folder_config import save_config
from ronna.model.init import build
from ronna.model.transformer import Transformer
from ronna.peft.changes import activate, merge, unmerge
from ronna.peft.files import read_adapter
from ronna.peft.folder import attach_adapter, write_adapter
from ronna.peft.houlsby import HoulsbyConfig
from ronna.peft.lora import LoraConfig
from ronna.peft.methods import BitFitConfig, PeftConfig, adapt, trained
from ronna.peft.own import adapters, at_work
from ronna.peft.prefix import PrefixConfig
from ronna.peft.prompt import PromptConfig
from ronna.stored import open_beside, open_folder

from .test_changes import SIZES, model_of
from .test_folder import stir
from .test_prompt import TEXTS, flat

# Each with a number of labels of its own; two that change the same weights of the base are among them.
SOME: dict[str, tuple[PeftConfig, int]] = {
    "lora": (LoraConfig(rank=3), 2),
    "houlsby": (HoulsbyConfig(size=4), 5),
    "bitfit": (BitFitConfig(), 3),
    "prompt": (PromptConfig(tokens=3), 4),
    "prefix": (PrefixConfig(tokens=2), 6),
    "other": (HoulsbyConfig(size=6), 2),
}


def scores(model: Transformer) -> Tensor:
    with torch.no_grad():
        return model.eval().scores(*flat(TEXTS))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A base of one label, and adapters that were trained on it."""
    root = tmp_path_factory.mktemp("own")
    family, cfg = preset("bert-tiny", **SIZES)
    model = build(c.replace(cfg, head=None, classifier=classifier_for(family, cfg, 1)), 0)
    save_folder(model, family, root / "base")
    for i, (name, (config, labels)) in enumerate(SOME.items()):
        loaded = load_folder(root / "base", classifier=classifier_for(family, cfg, labels), seed=i)
        adapt(loaded.model, config)
        stir(loaded.model, seed=i)
        write_adapter(loaded.model, family, root / name, config, str(root / "base"))
        more = {"architectures": ["BertForSequenceClassification"]}
        save_config(loaded.model.cfg, family, root / name, labels=[f"{name}{k}" for k in range(labels)],
                    problem_type="single_label_classification", extra_config=more)  # fmt: skip
    return {name: root / name for name in ("base", *SOME)}


def test_adapters_take_turns_with_exactly_what_each_gives_alone(folders):
    loaded = load_folder(folders["base"])
    bare, state = scores(loaded.model), {n: p.clone() for n, p in loaded.model.state_dict().items()}
    alone = {name: scores(open_folder(folders[name]).model) for name in SOME}
    assert [len(alone[name][0]) for name in SOME] == [labels for _, labels in SOME.values()]
    for name in SOME:
        attach_adapter(loaded.model, loaded.family, read_adapter(folders[name]), name)
    assert adapters(loaded.model) == list(at_work(loaded.model)) == list(SOME)
    turns = [*SOME, *reversed(SOME), "other", "lora", "houlsby", "bitfit", "houlsby"]
    for name in turns:
        activate(loaded.model, name)
        assert torch.equal(scores(loaded.model), alone[name])
        assert loaded.model.cfg.classifier.labels == SOME[name][1]
    activate(loaded.model)
    assert torch.equal(scores(loaded.model), bare)
    assert all(torch.equal(loaded.model.state_dict()[n], p) for n, p in state.items())
    activate(loaded.model, "lora", "prefix")
    assert scores(loaded.model).shape == (len(TEXTS), 6)  # the classifier of the last
    activate(loaded.model, "lora")
    merge(loaded.model, "lora")
    torch.testing.assert_close(scores(loaded.model), alone["lora"], atol=1e-5, rtol=1e-4)
    unmerge(loaded.model, "lora")
    assert torch.equal(scores(loaded.model), alone["lora"])


def test_what_is_not_at_work_goes_along_to_another_precision_and_mode(folders):
    loaded = load_folder(folders["base"])
    for name in ("houlsby", "bitfit"):
        attach_adapter(loaded.model, loaded.family, read_adapter(folders[name]), name)
    loaded.model.double().train()
    loaded.model.compute = torch.float64
    for name in ("bitfit", "houlsby"):
        activate(loaded.model, name)
        assert {p.dtype for p in loaded.model.parameters()} == {torch.float64}
        assert all(module.training for module in loaded.model.modules())
        alone = open_folder(folders[name]).model.double()
        alone.compute = torch.float64
        assert torch.equal(scores(loaded.model), scores(alone))
        loaded.model.train()


def test_only_the_adapter_that_was_attached_last_learns():
    model = model_of()
    adapt(model, HoulsbyConfig(size=4), name="a")
    first = {name: p for name, p in trained(model).items()}
    stir(model, seed=1)
    before = {name: p.detach().clone() for name, p in first.items()}
    adapt(model, HoulsbyConfig(size=4), name="b")
    activate(model, "b")
    assert set(trained(model)) == {name.replace(".changes.a.", ".changes.b.") for name in first}
    stir(model, seed=2)
    second = scores(model)
    assert all(torch.equal(p, before[name]) for name, p in first.items())
    activate(model, "a")
    assert all(".changes.b." in name for name in trained(model)) and not torch.equal(scores(model), second)
    live = dict(model.named_parameters())
    assert all(live[name] is p for name, p in first.items())
    activate(model, "b")
    assert torch.equal(scores(model), second)


def test_names_are_taken_once_for_methods_without_a_part_in_the_model_too():
    model = model_of()
    adapt(model, BitFitConfig(), name="a")
    with pytest.raises(RonnaError, match="already"):
        adapt(model, LoraConfig(), name="a")
    assert adapters(model) == ["a"]
    with pytest.raises(RonnaError, match="no linear map"):
        merge(model, "a")
    with pytest.raises(RonnaError, match="no adapter 'b'"):
        merge(model, "b")


def test_what_cannot_stand_beside_another_is_refused(folders, tmp_path):
    config = json.loads((folders["lora"] / "config.json").read_text())
    for name, key in (("one", "1"), ("two", "2")):
        made = tmp_path / name
        made.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (made / file).write_bytes((folders["lora"] / file).read_bytes())
        (made / "config.json").write_text(json.dumps(config | {"base_fingerprint": key}))
    loaded = open_folder(folders["lora"])
    loaded.config["base_fingerprint"] = "1"
    assert open_beside(loaded, tmp_path / "one", "same").model is loaded.model
    with pytest.raises(RonnaError, match="other weights"):
        open_beside(loaded, tmp_path / "two", "different")
    bare = config | {"architectures": ["BertModel"], "base_fingerprint": "1"}
    (tmp_path / "two" / "config.json").write_text(json.dumps(bare))
    with pytest.raises(RonnaError, match="the other none"):
        open_beside(loaded, tmp_path / "two", "different")


def test_two_runs_answer_in_turn_in_one_process(tiny_bert, tmp_path):
    """Other labels, another method: what `ronna.load` says of each alone, digit by digit."""
    rng = random.Random(0)
    for task, labels in (("mood", ["good", "bad"]), ("kind", ["film", "book", "song"])):
        (tmp_path / task).mkdir()
        for split, n in (("train", 60), ("validation", 12), ("test", 12)):
            rows = []
            for i in range(n):
                words = [*rng.choices(["the", "was", "a", "plot"], k=5), labels[i % len(labels)], split, str(i)]
                rows.append(json.dumps({"text": " ".join(words), "label": labels[i % len(labels)]}))
            (tmp_path / task / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
        call = [
            "finetune",
            "--model",
            str(tiny_bert),
            "--train",
            str(tmp_path / task),
            "--out",
            f"{tmp_path}/{task}-run",
        ]
        method = {"mood": "houlsby", "kind": "prompt"}[task]
        assert main([*call, "--peft", method, "--epochs", "2", "--batch", "16", "--lr", "1e-2"]) == 0
    texts = ["the film was good", "a song", "the plot of the book was bad", "the the the"]
    folders = [str(tmp_path / f"{task}-run" / "model") for task in ("mood", "kind")]
    alone = [ronna.load(folder).predict(texts) for folder in folders]
    assert [set(answers[0]["probabilities"]) for answers in alone] == [{"good", "bad"}, {"film", "book", "song"}]
    mood = ronna.load(folders[0])
    kind = mood.beside(folders[1], "kind")
    for _ in range(2):
        assert mood.predict(texts) == alone[0] and kind.predict(texts) == alone[1]
    assert mood.model is kind.model and at_work(mood.model) == ("kind",)
    with pytest.raises(RonnaError, match="no adapter's folder"):
        ronna.load(str(tiny_bert)).beside(folders[1], "kind")
