"""Adapter runs from the command line, for the tasks there are."""

import json
import random
from pathlib import Path

import pytest
import torch

from ronna.cli import main

METHODS = {"lora": ["--lr", "1e-2"], "houlsby": ["--lr", "1e-2"], "bitfit": ["--lr", "3e-2"]}
METHODS |= {"prompt": ["--lr", "3e-2"], "prefix": ["--lr", "1e-2", "--set", "peft.hidden=16"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """Reviews told by one word, and sentences in which that word is a person."""
    root, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    neutral = ["the", "film", "was", "a", "plot", "with", "acting", "and", "music", "story"]
    for split, n in (("train", 240), ("validation", 40), ("test", 40)):
        lines: dict[str, list[str]] = {"classify": [], "tag": []}
        for i in range(n):
            words = rng.choices(neutral, k=rng.randint(4, 9))
            at = rng.randrange(len(words))
            words.insert(at, "great" if i % 2 else "awful")
            row = {"text": f"{' '.join(words)} {split} {i}", "label": "pos" if i % 2 else "neg"}
            lines["classify"].append(json.dumps(row))
            tags = ["B-PER" if j == at else "O" for j in range(len(words))]
            lines["tag"].append(json.dumps({"tokens": [*words, split, str(i)], "tags": [*tags, "O", "O"]}))
        for task, some in lines.items():
            (root / task).mkdir(exist_ok=True)
            (root / task / f"{split}.jsonl").write_text("\n".join(some) + "\n")
    return {task: root / task for task in ("classify", "tag")}


@pytest.mark.parametrize("task", ["classify", "tag"])
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_trained_used_and_reported(method, task, tiny_bert, data, tmp_path, capsys):
    out = tmp_path / "run"
    call = ["finetune", "--task", task, "--peft", method, "--model", str(tiny_bert), "--train", str(data[task])]
    settings = ["--epochs", "6", "--batch", "16", "--length", "32", "--set", "model.dropout=0.0", *METHODS[method]]
    assert main([*call, *settings, "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    losses = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if line["kind"] == "train"]
    if method == "lora" or task == "tag":  # a first token of a random base says too little for the others
        assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    if method == "lora":
        assert report["test"][{"classify": "accuracy", "tag": "f1"}[task]]["value"] > 0.9
    written = {p.name for p in (out / "model").iterdir()}
    assert written >= {"adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json"}
    assert not (out / "model" / "model.safetensors").exists()
    capsys.readouterr()
    assert main(["evaluate", "--model", f"{out}/model", "--data", f"{data[task]}/test.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"] == report["test"]
    if method == "lora" or (method in ("prompt", "prefix") and task == "classify"):
        check_against_peft(out, tiny_bert, task)


def check_against_peft(out: Path, base: Path, task: str) -> None:
    """The folder as the peft library reads it, on the base as transformers reads it, answers as ours does."""
    peft, hf = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from ronna import load

    settings = hf.AutoConfig.from_pretrained(out / "model")
    cls = {"classify": hf.AutoModelForSequenceClassification, "tag": hf.AutoModelForTokenClassification}[task]
    theirs = peft.PeftModel.from_pretrained(cls.from_pretrained(base, config=settings), out / "model").eval()
    text = "the film was great with music"
    tokens = hf.AutoTokenizer.from_pretrained(out / "model")(text, return_tensors="pt")
    p = theirs(**tokens).logits.detach().softmax(-1)[0]
    [answer] = load(str(out / "model"), precision="fp32").predict([text])
    if task == "classify":
        assert answer["probabilities"]["pos"] == pytest.approx(float(p[settings.label2id["pos"]]), abs=1e-5)
    else:
        [entity] = answer["entities"]
        where = int(torch.argmax(p[:, settings.label2id["B-PER"]]))
        assert entity["text"] == "great" and entity["probability"] == pytest.approx(
            float(p[where, settings.label2id["B-PER"]]), abs=1e-5
        )


WRONG = {
    "unknown method": (["--peft", "loar"], ["loar", "lora"]),
    "unknown key": (["--peft", "lora", "--set", "peft.size=3"], ["peft.size", "houlsby"]),
    "unknown target": (["--peft", "lora", "--set", 'peft.targets=["query"]'], ["query", "attention.q"]),
    "no room": (["--peft", "prompt", "--set", "peft.tokens=600"], ["peft.tokens", "use fewer"]),
    "scratch": (["--peft", "lora", "--scratch"], ["model.scratch", "no base"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_refused(case, tiny_bert, data, tmp_path, capsys):
    more, words = WRONG[case]
    call = ["finetune", "--model", str(tiny_bert), "--train", str(data["classify"]), "--out", str(tmp_path / "run")]
    assert main([*call, *more]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said


def test_an_adapter_needs_its_base_as_it_was(tiny_bert, data, tmp_path, capsys):
    import shutil

    from safetensors.torch import load_file, save_file

    base = shutil.copytree(tiny_bert, tmp_path / "base")
    call = [
        "finetune",
        "--peft",
        "lora",
        "--model",
        str(base),
        "--train",
        str(data["classify"]),
        "--out",
        f"{tmp_path}/r",
    ]
    assert main([*call, "--set", "train.steps=2"]) == 0
    capsys.readouterr()
    use = ["evaluate", "--model", f"{tmp_path}/r/model", "--data", f"{data['classify']}/test.jsonl"]
    weights = {n: t + 0.01 for n, t in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert main(use) == 2 and "other weights" in capsys.readouterr().err
    shutil.rmtree(base)
    assert main(use) == 2 and "is not there" in capsys.readouterr().err


def test_an_adapter_has_a_rate_of_its_own_unless_one_is_named():
    from ronna.base.config import build
    from ronna.runfile import RATES, FinetuneRun

    def optim(**more):
        tree = {"out": "o", "model": {"name": "m"}, "data": {"train": "t"}, **more}
        return build(FinetuneRun, tree, where="here").optim

    assert optim().lr == 5e-5 and optim(peft={"kind": "houlsby"}).lr == RATES["houlsby"]
    assert optim(peft={"kind": "prefix", "hidden": 8}).lr < optim(peft={"kind": "prefix"}).lr == RATES["prefix"]
    assert optim(task={"kind": "dpo"}).lr == pytest.approx(1e-6)
    assert optim(model={"name": "llama-tiny", "tokenizer": "t"}).lr == 5e-4
    named = optim(peft={"kind": "lora"}, optim={"lr": 3e-4})
    assert named.lr == 3e-4 and named.weight_decay == 0.01
    rest = optim(peft={"kind": "lora"}, optim={"weight_decay": 0.0})
    assert rest.lr == RATES["lora"] and rest.weight_decay == 0.0 and rest.betas == (0.9, 0.999)
    assert optim(peft={"kind": "lora"}, optim={"kind": "sgd", "lr": 0.1}).lr == 0.1


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_an_adapter_of_an_embedding_model_gives_vectors(method, tiny_bert, tmp_path):
    import ronna
    from ronna.tasks.embed import Embed

    for split, n in (("train", 24), ("validation", 6), ("test", 6)):
        rows = [{"anchor": f"{split} film {i}", "positive": f"{split} plot {i}"} for i in range(n)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    call = ["finetune", "--task", "embed", "--peft", method, "--model", str(tiny_bert), "--train", str(tmp_path)]
    assert main([*call, "--set", "train.steps=3", "--batch", "8", "--out", f"{tmp_path}/run"]) == 0
    loaded = ronna.load(f"{tmp_path}/run/model")
    assert isinstance(loaded.task, Embed) and loaded.adapter == "default"
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert ronna.evaluate(model=f"{tmp_path}/run/model", data=[f"{tmp_path}/test.jsonl"])["test"] == report["test"]


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("base", ["tiny_gpt", "tiny_t5"])
def test_virtual_tokens_for_models_that_write(base, method, request, tmp_path):
    import ronna

    for split, n in (("train", 24), ("validation", 6), ("test", 6)):
        rows = [{"source": f"{split} film {i}", "target": f"plot {i}"} for i in range(n)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    folder = str(request.getfixturevalue(base))
    call = ["finetune", "--task", "seq2seq", "--peft", method, "--model", folder, "--train", str(tmp_path)]
    more = ["--set", "train.steps=3", "--batch", "8", "--length", "40", "--set", "task.target_length=10"]
    assert main([*call, *more, "--set", "peft.tokens=4", "--out", f"{tmp_path}/run"]) == 0
    model = f"{tmp_path}/run/model"
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert ronna.evaluate(model=model, data=[f"{tmp_path}/test.jsonl"])["test"] == report["test"]
    settings = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    own = base == "tiny_t5" and method == "prefix"
    assert settings["peft_type"] == ("RONNA" if own else f"{method.upper()}_TUNING")
    assert len(ronna.load(model).generate(["a film 3"])) == 1
