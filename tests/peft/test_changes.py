"""Adapters: what they do to a model, what learns, how they are switched, stacked, merged and taken off again."""

import pytest
import torch
from torch import Tensor

from ronna.base.errors import RonnaError
from ronna.model import config as c
from ronna.model.families import classifier_for, preset
from ronna.model.init import build
from ronna.model.sequences import Sequences
from ronna.model.transformer import Transformer
from ronna.peft import lora
from ronna.peft.changes import ChangedLinear, activate, merge, targeted, unmerge
from ronna.peft.houlsby import HoulsbyConfig
from ronna.peft.lora import LoraConfig
from ronna.peft.methods import BitFitConfig, adapt, freeze_to, trained
from ronna.peft.own import adapters

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
METHODS = {
    "lora": LoraConfig(rank=4),
    "dora": LoraConfig(rank=4, dora=True, rslora=True),
    "houlsby": HoulsbyConfig(size=6),
    "bitfit": BitFitConfig(),
}
PRESETS = {
    "bert-tiny": {},
    "gpt2-tiny": {},
    "llama-tiny": {"num_key_value_heads": 1},
    "t5-tiny": {},
    "modernbert-tiny": {},
}


def model_of(name: str = "bert-tiny", seed: int = 0) -> Transformer:
    family, cfg = preset(name, **SIZES, **PRESETS[name])
    if family.classifier:
        cfg = c.replace(cfg, head=None, classifier=classifier_for(family, cfg, 3))
    return build(c.without_dropout(cfg), seed)


def output(model: Transformer, n: int = 80) -> Tensor:
    tokens = torch.arange(n) * 7 % 99
    sequences = Sequences.of([n - 30, 30])
    memory = model.encode(tokens, sequences) if model.encoder is not None and model.decoder is not None else None
    return model.hidden(tokens, sequences, memory=memory)


def stir(model: Transformer, seed: int = 3) -> None:
    """Weights that learn are given other values, as training would."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=rng) * 0.1)


@pytest.mark.parametrize("preset_name", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does(method, preset_name):
    model = model_of(preset_name)
    names = set(model.state_dict())
    before = output(model)
    if method == "bitfit" and preset_name in ("llama-tiny", "t5-tiny", "modernbert-tiny"):
        with pytest.raises(RonnaError, match="no bias"):
            adapt(model, METHODS[method])
        return
    adapt(model, METHODS[method], seed=1)
    torch.testing.assert_close(output(model), before, atol=1e-6, rtol=0)
    assert set(model.state_dict()) >= names  # the base's names are as they were
    stir(model)
    assert (output(model) - before).abs().max() > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_only_the_adapter_and_what_belongs_to_it_learn(method):
    model = model_of()
    adapt(model, METHODS[method])
    learning = set(trained(model))
    base = {name for name in learning if ".changes." not in name}
    classifier = {name for name, _ in model.named_parameters() if name.startswith("classifier.")}
    norms = {n for n, _ in model.named_parameters() if "norm" in n}
    biases = {n for n, _ in model.named_parameters() if n.endswith(".bias") and ".blocks." in n}
    beside = {"houlsby": norms, "bitfit": biases}.get(method, set())
    assert base == classifier | beside
    output(model).square().sum().backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == learning - classifier
    if method == "houlsby":
        assert sum(".changes." in n for n in learning) == 2 * 2 * 4  # two bottlenecks a block


@pytest.mark.parametrize("card", [False, True], ids=["cpu", "as a card"])
def test_lora_is_its_formula(card, monkeypatch):
    monkeypatch.setattr(lora, "on_card", lambda y: card)
    model = model_of()
    linear = model.encoder.blocks[0].attention.q
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    adapt(model, LoraConfig(rank=4, alpha=6, targets=("q", "v")))
    stir(model)
    assert isinstance(linear, ChangedLinear)
    low, x = linear.changes["default"], torch.randn(5, 32)
    expected = x @ weight.T + bias + 6 / 4 * (x @ low.a.T @ low.b.T)
    torch.testing.assert_close(linear(x), expected)
    assert LoraConfig(rank=4, alpha=6, rslora=True).scale == 3.0


def test_dora_is_its_formula():
    model = model_of()
    linear = model.encoder.blocks[0].ffn.up
    adapt(model, LoraConfig(rank=4, alpha=4, dora=True))
    stir(model)
    low, x = linear.changes["default"], torch.randn(5, 32)
    direction = linear.weight + low.b @ low.a
    expected = x @ (low.magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)).T + linear.bias
    torch.testing.assert_close(linear(x), expected)


def test_dropout_falls_on_what_the_adapter_reads_in_training_only():
    model = model_of()
    adapt(model, LoraConfig(rank=4, dropout=0.5))
    stir(model)
    model.eval()
    assert torch.equal(output(model), output(model))
    model.train()
    assert not torch.equal(output(model), output(model))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merging_is_exact_enough_and_comes_undone_to_the_bit(method):
    model = model_of()
    adapt(model, METHODS[method])
    stir(model)
    state, beside = {n: p.clone() for n, p in model.state_dict().items()}, output(model)
    assert merge(model, "default") < 1e-6
    torch.testing.assert_close(output(model), beside, atol=1e-5, rtol=1e-5)
    assert not torch.equal(model.encoder.blocks[0].ffn.up.weight, state["encoder.blocks.0.ffn.up.weight"])
    with pytest.raises(RonnaError, match="works alone"):
        merge(model, "default")
    with pytest.raises(RonnaError, match="unmerge it first"):
        activate(model)
    unmerge(model, "default")
    assert all(torch.equal(p, state[n]) for n, p in model.state_dict().items())
    assert torch.equal(output(model), beside)


def test_a_merge_that_rounding_would_eat_is_refused():
    model = model_of()
    adapt(model, LoraConfig(rank=4))
    with torch.no_grad():
        for name, parameter in trained(model).items():
            if name.endswith(".b"):
                parameter.fill_(1e-5)
    freeze_to(model, torch.bfloat16)
    before = model.encoder.blocks[0].ffn.up.weight.clone()
    with pytest.raises(RonnaError, match="would miss"):
        merge(model, "default")
    assert torch.equal(model.encoder.blocks[0].ffn.up.weight, before)
    assert merge(model, "default", tolerance=10.0) > 0.01


def test_what_is_no_linear_map_is_not_merged():
    model = model_of()
    adapt(model, HoulsbyConfig(size=4))
    with pytest.raises(RonnaError, match="no linear map"):
        merge(model, "default")


def test_adapters_are_switched_stacked_and_taken_off():
    model = model_of()
    bare = output(model)
    for i, name in enumerate(("french", "law")):
        adapt(model, LoraConfig(rank=2 + i), seed=i, name=name)
        stir(model, seed=i)
    assert adapters(model) == ["french", "law"]
    activate(model, "french")
    french = output(model)
    activate(model, "law")
    law = output(model)
    activate(model, "french", "law")
    both = output(model)
    activate(model)
    torch.testing.assert_close(output(model), bare, atol=1e-6, rtol=0)
    assert len({float(x.detach().abs().sum()) for x in (bare, french, law, both)}) == 4
    with pytest.raises(RonnaError, match="no adapter 'latin'"):
        activate(model, "latin")
    with pytest.raises(RonnaError, match="already"):
        adapt(model, LoraConfig(), name="law")


def test_targets_are_named_or_refused():
    model = model_of()
    assert {path.rsplit(".", 1)[1] for path, _ in targeted(model, ("q", "ffn.up"))} == {"q", "up"}
    assert len(targeted(model, ("all",))) == 12
    with pytest.raises(RonnaError, match=r"no linear map is called query\n.*attention\.q"):
        targeted(model, ("query",))


def test_a_frozen_base_stays_to_the_bit_in_the_precision_of_the_computation():
    model = model_of()
    adapt(model, LoraConfig(rank=4))
    freeze_to(model, torch.bfloat16)
    model.compute = torch.bfloat16
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert all(p.dtype == torch.bfloat16 for p in frozen.values())
    assert all(p.dtype == torch.float32 for p in trained(model).values())
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    output(model).float().square().sum().backward()
    optimizer.step()
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in frozen.items())
