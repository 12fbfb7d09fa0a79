"""Adapters over a base in 4 bits: every method learns as over a wide base of the same weights, from run to folder."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ronna
from ronna.base.errors import RonnaError
from ronna.cli import main
from ronna.model.families import classifier_for, preset
from ronna.model.folder import load_folder, save_folder
from ronna.model.fourbit import held_in
from ronna.model.init import build
from ronna.model.layers import block_linears
from ronna.model.sequences import Sequences
from ronna.model.transformer import Transformer
from ronna.peft.adalora import AdaLoraConfig
from ronna.peft.changes import ChangedFourBitLinear, bare, merge
from ronna.peft.houlsby import HoulsbyConfig
from ronna.peft.lora import LoraConfig
from ronna.peft.methods import BitFitConfig, PeftConfig, adapt, freeze_to, trained
from ronna.peft.prefix import PrefixConfig
from ronna.peft.prompt import PromptConfig

pytest.importorskip("bitsandbytes")

SIZES = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
METHODS: dict[str, PeftConfig] = {
    "lora": LoraConfig(rank=4),
    "rslora": LoraConfig(rank=4, rslora=True, targets=("q", "ffn.up")),
    "dora": LoraConfig(rank=4, dora=True),
    "adalora": AdaLoraConfig(rank=4, target_rank=2),
    "houlsby": HoulsbyConfig(size=6),
    "bitfit": BitFitConfig(),
    "prompt": PromptConfig(tokens=3),
    "prefix": PrefixConfig(tokens=3),
}


@pytest.fixture(scope="module", params=["bert-tiny", "llama-tiny"])
def base(request, tmp_path_factory) -> Path:
    family, cfg = preset(request.param, **SIZES)
    folder = tmp_path_factory.mktemp("base") / request.param
    save_folder(build(cfg, seed=0), family, folder)
    return folder


def opened(folder: Path, quantize: str | None) -> Transformer:
    """With a classifier, and without dropout: in 4 bits, or wide with the weights that those stand for."""
    loaded = load_folder(folder)
    classifier = classifier_for(loaded.family, loaded.model.cfg, 3)
    how = {"head": False, "classifier": classifier, "dropout": 0.0}
    model = load_folder(folder, quantize="nf4", **how).model
    if quantize is None:
        wide, narrow = load_folder(folder, **how).model, dict(block_linears(model))
        for path, linear in block_linears(wide):
            linear.weight.data = narrow[path].weight
        return wide
    return model


def scores(model: Transformer) -> Tensor:
    return model.scores(torch.arange(80) * 7 % 99, Sequences.of([50, 30]))


def stir(model: Transformer) -> None:
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=rng) * 0.05)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_as_over_a_wide_base_of_these_weights(method, base):
    if method == "bitfit" and base.name == "llama-tiny":
        with pytest.raises(RonnaError, match="no bias"):
            adapt(opened(base, "nf4"), METHODS[method])
        return
    found = []
    for quantize in ("nf4", None):
        model = opened(base, quantize)
        adapt(model, METHODS[method], seed=1)
        fresh = scores(model).detach()
        stir(model)
        y = scores(model)
        y.square().sum().backward()
        with bare(model):
            under = scores(model).detach()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"fresh": fresh, "stirred": y.detach(), "bare": under, **gradients})
    ours, theirs = found
    assert ours.keys() == theirs.keys() and len(ours) > 4
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    assert (ours["stirred"] - ours["bare"]).abs().max() > 1e-3


def test_changes_stand_on_maps_in_four_bits_and_freezing_leaves_them_alone(base):
    model = opened(base, "nf4")
    adapt(model, LoraConfig(rank=2))
    before = {path: linear.weight for path, linear in block_linears(model)}
    assert all(isinstance(linear, ChangedFourBitLinear) for _, linear in block_linears(model))
    freeze_to(model, torch.bfloat16)
    model.to(torch.bfloat16)
    assert all(torch.equal(linear.weight, before[path]) for path, linear in block_linears(model))
    with pytest.raises(RonnaError, match="4 bits cannot take the change up"):
        merge(model, "default")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Reviews told by one word."""
    root, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    neutral = ["the", "film", "was", "a", "plot", "with", "acting", "and", "music", "story"]
    for split, n in (("train", 240), ("validation", 40), ("test", 40)):
        lines = []
        for i in range(n):
            words = rng.choices(neutral, k=rng.randint(4, 9))
            words.insert(rng.randrange(len(words)), "great" if i % 2 else "awful")
            row = {"text": f"{' '.join(words)} {split} {i}", "label": "pos" if i % 2 else "neg"}
            lines.append(json.dumps(row))
        (root / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("kind", ["nf4", "nf4_double"])
def test_a_lora_over_four_bits_is_trained_reported_and_used(kind, tiny_bert, data, tmp_path, capsys):
    out = tmp_path / "run"
    call = ["finetune", "--peft", "lora", "--quantize", kind, "--model", str(tiny_bert), "--train", str(data)]
    settings = ["--epochs", "6", "--batch", "16", "--length", "32", "--lr", "1e-2", "--set", "model.dropout=0.0"]
    assert main([*call, *settings, "--out", str(out)]) == 0
    assert f"weights of the blocks in {kind}: " in capsys.readouterr().err
    report = json.loads((out / "report.json").read_text())
    assert report["test"]["accuracy"]["value"] > 0.9
    assert report["memory"]["held"].startswith("16,384 weights of the blocks in " + kind)
    assert kind in (out / "report.html").read_text()
    assert not list(out.rglob("model.safetensors"))
    # The numbers of the run are those of the base that it was trained on ...
    use = ["evaluate", "--model", f"{out}/model", "--data", f"{data}/test.jsonl", "--json"]
    assert main([*use, "--quantize", kind]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["test"] == report["test"] and again["memory"]["held"] == report["memory"]["held"]
    # ... and its folder is used over the wide one, unless asked otherwise.
    assert main(use) == 0
    wide = json.loads(capsys.readouterr().out)
    assert wide["memory"]["held"] is None and wide["test"]["accuracy"]["value"] > 0.85
    check_against_peft(out / "model", tiny_bert)


def check_against_peft(folder: Path, base: Path) -> None:
    """The folder on the wide base, and on the base in 4 bits with the weights put in by hand, as `peft` has it."""
    peft, hf = pytest.importorskip("peft"), pytest.importorskip("transformers")
    settings, text = hf.AutoConfig.from_pretrained(folder), "the film was great with music"
    tokens = hf.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    found = []
    for quantize in (None, "nf4"):
        theirs = hf.BertForSequenceClassification.from_pretrained(base, config=settings)
        loaded = ronna.load(str(folder), precision="fp32", quantize=quantize)
        assert (held_in(loaded.model) is None) == (quantize is None)
        if quantize is not None:
            state = {n: p for n, p in theirs.named_parameters() if ".layer." in n and p.ndim == 2}
            narrow = dict(block_linears(loaded.model))
            assert len(state) == len(narrow)
            for (_, parameter), (_, linear) in zip(sorted_as_ours(state), sorted(narrow.items()), strict=True):
                parameter.data = linear.weight
        theirs = peft.PeftModel.from_pretrained(theirs, folder).eval()
        p = theirs(**tokens).logits.detach().softmax(-1)[0]
        [answer] = loaded.predict([text])
        found.append(answer["probabilities"]["pos"])
        assert found[-1] == pytest.approx(float(p[settings.label2id["pos"]]), abs=1e-5)
    assert found[0] != found[1]


def sorted_as_ours(state: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    names = {
        "self.query": "attention.q",
        "self.key": "attention.k",
        "self.value": "attention.v",
        "attention.output.dense": "attention.out",
        "intermediate.dense": "ffn.up",
        "output.dense": "ffn.down",
    }

    def ours(name: str) -> str:
        block = name.partition(".layer.")[2].partition(".")[0]
        return f"encoder.blocks.{block}.{next(v for k, v in names.items() if name.endswith(f'{k}.weight'))}"

    return sorted(state.items(), key=lambda pair: ours(pair[0]))


def test_predictions_and_what_is_written_can_be_made_in_four_bits(tiny_gpt, tmp_path, capsys):
    call = ["generate", "--model", str(tiny_gpt), "--prompt", "the film", "--max-tokens", "3"]
    assert main([*call, "--quantize", "nf4"]) == 0
    assert capsys.readouterr().out
    for split in ("train", "validation"):
        rows = [{"text": f"{split} film {i}", "label": "ab"[i % 2]} for i in range(16)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    train = ["finetune", "--peft", "lora", "--quantize", "nf4", "--model", str(tiny_gpt), "--train", str(tmp_path)]
    assert main([*train, "--set", "train.steps=2", "--out", f"{tmp_path}/run"]) == 0
    said = {}
    for quantize in ([], ["--quantize", "nf4"]):
        use = ["predict", "--model", f"{tmp_path}/run/model", "--input", f"{tmp_path}/train.jsonl"]
        assert main([*use, *quantize, "--output", f"{tmp_path}/said.jsonl"]) == 0
        said[bool(quantize)] = (tmp_path / "said.jsonl").read_text()
    assert said[True] != said[False] and said[True].count("\n") == 16


WRONG = {
    "no adapter": (["--quantize", "nf4"], ["model.quantize", "cannot learn", "--peft lora"]),
    "scratch": (["--quantize", "nf4", "--peft", "lora", "--scratch"], ["model.quantize", "new weights"]),
    "no such kind": (["--quantize", "int3", "--peft", "lora"], ["model.quantize", "nf4_double"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_refused(case, tiny_bert, data, tmp_path, capsys):
    more, words = WRONG[case]
    call = ["finetune", "--model", str(tiny_bert), "--train", str(data), "--out", str(tmp_path / "run")]
    assert main([*call, *more]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert not (tmp_path / "run").exists()


def test_a_preset_has_nothing_to_hold_and_the_library_is_named(tiny_bert, data, tmp_path, capsys, monkeypatch):
    call = ["finetune", "--train", str(data), "--out", str(tmp_path / "run"), "--peft", "lora", "--quantize", "nf4"]
    assert main([*call, "--model", "bert-tiny", "--tokenizer", str(tiny_bert)]) == 2
    assert "model.quantize: new weights" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert main([*call, "--model", str(tiny_bert)]) == 2
    assert "pip install 'ronna[quantize]'" in capsys.readouterr().err
