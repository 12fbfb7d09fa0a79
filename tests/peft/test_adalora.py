"""AdaLoRA: its formulas against the peft library's, its budget, and what a run with it leaves behind."""

import json
import random

import pytest
import torch
from torch import nn

from ronna.base.errors import RonnaError
from ronna.cli import main
from ronna.peft.adalora import AdaLoraConfig, Allocator, Triplets, orthogonality, triplets_of
from ronna.peft.changes import merge
from ronna.peft.methods import adapt

from .test_changes import model_of, output, stir


def test_triplets_are_their_formula_and_merge():
    model = model_of()
    linear = model.encoder.blocks[0].ffn.up
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    before = output(model)
    adapt(model, AdaLoraConfig(rank=6, target_rank=3, alpha=9))
    torch.testing.assert_close(output(model), before, atol=1e-6, rtol=0)
    stir(model)
    change, x = linear.changes["default"], torch.randn(5, 32)
    change.e.data[2] = 0.0
    expected = x @ weight.T + bias + 9 / 6 * (x @ change.a.T * change.e) @ change.b.T
    torch.testing.assert_close(linear(x), expected)
    beside = output(model)
    assert merge(model, "default") < 1e-6
    torch.testing.assert_close(output(model), beside, atol=1e-5, rtol=1e-5)


def test_the_penalty_is_zero_for_orthogonal_sides_and_else_their_distance():
    model = model_of()
    adapt(model, AdaLoraConfig(rank=4, target_rank=2))
    changes = triplets_of(model, "default")
    assert len(changes) == 12
    direct = [side @ side.T - torch.eye(4) for c in changes for side in (c.a, c.b.T)]
    torch.testing.assert_close(orthogonality(changes), torch.stack([d.norm() for d in direct]).mean())
    for c in changes:
        nn.init.orthogonal_(c.a)
        nn.init.orthogonal_(c.b)
    assert float(orthogonality(changes).detach()) < 1e-5


class Fake(nn.Module):
    """The same numbers under the names that peft's allocator looks for."""

    def __init__(self, changes: list[Triplets]):
        super().__init__()
        for i, c in enumerate(changes):
            for leaf, value in (("A", c.a), ("B", c.b), ("E", c.e[:, None])):
                self.register_parameter(f"m{i:02}_lora_{leaf}_default", nn.Parameter(value.detach().clone()))

    def named_parameters(self, *args, **kwargs):
        for name, p in super().named_parameters(*args, **kwargs):
            head, _, leaf = name.partition("_lora_")
            yield f"{head}.lora_{leaf.replace('_', '.')}", p


def test_importance_and_what_is_kept_are_those_of_the_peft_library():
    layer = pytest.importorskip("peft.tuners.adalora.layer")
    peft = pytest.importorskip("peft")
    model = model_of()
    adapt(model, AdaLoraConfig(rank=4, target_rank=2, every=3, warmup=0.0, final=0.2))
    changes, total = triplets_of(model, "default"), 40
    allocator = Allocator(changes, AdaLoraConfig(rank=4, target_rank=2, every=3, warmup=0.0, final=0.2), total)
    settings = peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=0, tfinal=8, deltaT=3, total_step=total, beta1=0.85, beta2=0.85
    )
    fake = Fake(changes)
    theirs = layer.RankAllocator(fake, settings, "default")
    named = dict(fake.named_parameters())
    rng = torch.Generator().manual_seed(0)
    masked = 0
    for step in range(total):
        for i, c in enumerate(changes):
            for leaf in "abe":
                p = getattr(c, leaf)
                p.grad = torch.randn(p.shape, generator=rng)
                p.data.add_(torch.randn(p.shape, generator=rng) * 0.05)
                twin = named[f"m{i:02}.lora_{leaf.upper()}.default"]
                twin.grad = p.grad.clone().view(twin.shape)
                twin.data.copy_(p.data.view(twin.shape))
        assert allocator.budget(step + 1) == theirs.budget_schedule(step + 1)[0]
        if step + 1 >= 0.8 * total:
            break
        allocator(step)
        theirs.update_and_allocate(fake, step + 1)
        for i, c in enumerate(changes):
            torch.testing.assert_close(c.e.data, named[f"m{i:02}.lora_E.default"].data[:, 0])
        masked += sum(int((c.e == 0).sum()) for c in changes)
    assert masked > 50


def test_the_budget_falls_from_first_to_last_and_stays():
    model = model_of()
    config = AdaLoraConfig(rank=6, target_rank=2, warmup=0.1, final=0.3, every=5)
    adapt(model, config)
    changes = triplets_of(model, "default")
    allocator = Allocator(changes, config, 100)
    budgets = [allocator.budget(s) for s in range(101)]
    assert budgets[:11] == [72] * 11 and budgets[70:] == [24] * 31 and sorted(budgets, reverse=True) == budgets
    rng = torch.Generator().manual_seed(0)
    held = []
    for step in range(100):
        for c in changes:
            for p in (c.a, c.e, c.b):
                p.grad = torch.randn(p.shape, generator=rng)
                p.data.add_(torch.randn(p.shape, generator=rng) * 0.1)
        allocator(step)
        held.append(tuple(bool(x) for c in changes for x in c.e != 0))
    assert all(sum(h) == 24 for h in held[70:]) and len(set(held[70:])) == 1  # the last ranks are fixed
    ranks = [int((c.e != 0).sum()) for c in changes]
    assert sum(ranks) == 24 and len(set(ranks)) > 1  # dealt out over the maps, not to each alike
    assert not any(bool(c.e[i]) for c in changes for i in range(6) if c.e[i] == 0)


def test_settings_that_cannot_be():
    from ronna.base.config import build as build_config

    for wrong, message in (
        ({"target_rank": 20}, "target_rank is above rank"),
        ({"warmup": 0.7, "final": 0.4}, "no step"),
    ):
        with pytest.raises(RonnaError, match=message):
            build_config(AdaLoraConfig, wrong, where="peft")


def test_a_run_ends_with_its_ranks_and_peft_reads_them(tiny_bert, tmp_path, capsys):
    rng = random.Random(0)
    for split, n in (("train", 160), ("validation", 40), ("test", 40)):
        rows = []
        for i in range(n):
            words = [
                *rng.choices(["the", "film", "was", "a", "plot"], k=6),
                "great" if i % 2 else "awful",
                split,
                str(i),
            ]
            rows.append(json.dumps({"text": " ".join(words), "label": "pos" if i % 2 else "neg"}))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    out = tmp_path / "run"
    call = ["finetune", "--peft", "adalora", "--model", str(tiny_bert), "--train", str(tmp_path), "--out", str(out)]
    settings = ["--lr", "1e-2", "--epochs", "8", "--batch", "16", "--precision", "fp32"]
    settings += ["--set", "peft.rank=6", "--set", "peft.target_rank=2", "--set", "peft.every=5"]
    assert main([*call, *settings]) == 0
    report = json.loads((out / "report.json").read_text())
    config = json.loads((out / "model" / "adapter_config.json").read_text())
    assert sum(config["rank_pattern"].get(m, 2) for m in config["target_modules"]) == 24
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all("orthogonality" in m for m in metrics if m["kind"] == "train")
    capsys.readouterr()
    assert (
        main(
            ["evaluate", "--model", f"{out}/model", "--data", f"{tmp_path}/test.jsonl", "--json", "--precision", "fp32"]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["test"] == report["test"]
    peft, hf = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from ronna import load

    settings_of = hf.AutoConfig.from_pretrained(out / "model")
    base = hf.AutoModelForSequenceClassification.from_pretrained(tiny_bert, config=settings_of)
    theirs = peft.PeftModel.from_pretrained(base, out / "model").eval()
    tokens = hf.AutoTokenizer.from_pretrained(out / "model")("the film was great", return_tensors="pt")
    p = theirs(**tokens).logits.softmax(-1)[0]
    [answer] = load(str(out / "model"), precision="fp32").predict(["the film was great"])
    assert answer["probabilities"]["pos"] == pytest.approx(float(p[settings_of.label2id["pos"]]), abs=1e-5)
