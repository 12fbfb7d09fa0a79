import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.nn import Parameter

from ronna.base.errors import RonnaError
from ronna.train.optim import (
    SGD,
    Adafactor,
    Adam,
    AdamW,
    Muon,
    OptimizerConfig,
    build_optimizer,
    clip_gradients,
    load_optimizer_tensors,
    optimizer_tensors,
)
from ronna.train.schedule import set_lr

CONFIGS = {
    "adamw": AdamW(),
    "adam": Adam(),
    "sgd": SGD(nesterov=True),
    "plain sgd": SGD(momentum=0.0),
    "adafactor": Adafactor(),
    "muon": Muon(),
}
SHAPES = {
    "embedding.tokens.weight": (7, 4),
    "decoder.blocks.0.attention.q.weight": (4, 4),
    "decoder.blocks.0.ffn.up.weight": (6, 4),
    "decoder.blocks.0.ffn.up.bias": (6,),
    "decoder.final_norm.weight": (4,),
    "head.scale": (),
}


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return {name: Parameter(torch.randn(s, generator=generator, dtype=dtype)) for name, s in SHAPES.items()}


def set_gradients(named, step, skip=()):
    generator = torch.Generator().manual_seed(100 + step)
    for name in sorted(named):
        gradient = torch.randn(named[name].shape, generator=generator, dtype=named[name].dtype)
        named[name].grad = None if name in skip else gradient


def take_step(optimizers, scale=1.0):
    set_lr(optimizers, scale)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def train(optimizers, named, steps, skip=()):
    for step in steps:
        set_gradients(named, step, skip)
        take_step(optimizers, 1.0 / (step + 1))


def two_steps(config, value, gradients):
    """`value` as the parameter of a matrix after two float64 steps at full and at half rate."""
    parameter = Parameter(value.clone())
    optimizers = build_optimizer(config, [("w", parameter)])
    for gradient, scale in zip(gradients, (1.0, 0.5), strict=True):
        parameter.grad = gradient.clone()
        take_step(optimizers, scale)
    return parameter.detach()


def case():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(3)]


def test_adamw_by_hand():
    value, *gradients = case()
    m = v = torch.zeros_like(value)
    w = value.clone()
    for t, (g, lr) in enumerate(zip(gradients, (0.01, 0.005), strict=True), start=1):
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        w = w - lr * 0.1 * w
        w = w - lr * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-6)
    config = AdamW(lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    torch.testing.assert_close(two_steps(config, value, gradients), w, rtol=1e-12, atol=0)


def test_adam_by_hand():
    value, *gradients = case()
    m = v = torch.zeros_like(value)
    w = value.clone()
    for t, (g, lr) in enumerate(zip(gradients, (0.01, 0.005), strict=True), start=1):
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        w = w - lr * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-6)
    config = Adam(lr=0.01, betas=(0.8, 0.9), eps=1e-6)
    torch.testing.assert_close(two_steps(config, value, gradients), w, rtol=1e-12, atol=0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_by_hand(nesterov):
    value, *gradients = case()
    w, buffer = value.clone(), torch.zeros_like(value)
    for g, lr in zip(gradients, (0.01, 0.005), strict=True):
        g = g + 0.1 * w
        buffer = 0.7 * buffer + g
        w = w - lr * (g + 0.7 * buffer if nesterov else buffer)
    config = SGD(lr=0.01, momentum=0.7, nesterov=nesterov, weight_decay=0.1)
    torch.testing.assert_close(two_steps(config, value, gradients), w, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("dtype", "size", "clip", "rtol"), [(torch.float64, 1.0, 1.2, 1e-9), (torch.float32, 1e-6, 1e3, 1e-4)]
)
def test_adafactor_by_hand(dtype, size, clip, rtol):
    """Algorithm 4 of the paper; tiny float32 gradients too, which a floor on the moments would distort."""
    value, *gradients = case()
    value, gradients = value.to(dtype), [size * g.to(dtype) for g in gradients]
    w, rows, columns = value.clone(), torch.zeros(3, 1, dtype=dtype), torch.zeros(1, 5, dtype=dtype)
    for t, (g, lr) in enumerate(zip(gradients, (0.01, 0.005), strict=True), start=1):
        beta = 1 - t**-0.6
        rows = beta * rows + (1 - beta) * (g * g).mean(1, keepdim=True)
        columns = beta * columns + (1 - beta) * (g * g).mean(0, keepdim=True)
        update = g / (rows @ columns / rows.mean()).sqrt()
        update = update / max(1.0, update.square().mean().sqrt().item() / clip)
        step = max(1e-3, w.square().mean().sqrt().item()) * min(lr, 1 / math.sqrt(t))
        w = w - lr * 0.1 * w - step * update
    config = Adafactor(lr=0.01, beta2_decay=-0.6, clip=clip, weight_decay=0.1)
    torch.testing.assert_close(two_steps(config, value, gradients), w, rtol=rtol, atol=0)


def test_muon_takes_the_matrices_inside_blocks_and_turns_them_orthogonal():
    named = parameters()
    before = {name: p.detach().clone() for name, p in named.items()}
    config = Muon(lr=0.1, weight_decay=0.0, adamw=AdamW(lr=0.5, weight_decay=0.0))
    optimizers = build_optimizer(config, named.items())
    set_gradients(named, 0)
    take_step(optimizers)
    muon, adamw = ({p for group in part.param_groups for p in group["params"]} for part in optimizers)
    assert {name for name, p in named.items() if p in muon} == set(list(SHAPES)[1:3])
    assert len(adamw) == 4
    name = "decoder.blocks.0.attention.q.weight"
    singular = torch.linalg.svdvals((before[name] - named[name]).detach() / (0.1 * 0.2 * math.sqrt(4)))
    assert singular.min() > 0.5 and singular.max() < 1.4
    moved = (before["embedding.tokens.weight"] - named["embedding.tokens.weight"]).abs()
    torch.testing.assert_close(moved.detach(), torch.full((7, 4), 0.5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("change", [{"momentum": 0.5}, {"nesterov": False}, {"steps": 1}, {"weight_decay": 0.5}])
def test_muon_options_reach_the_optimizer(change):
    def trained(config):
        named = parameters()
        train(build_optimizer(config, named.items()), named, range(2))
        return named["decoder.blocks.0.attention.q.weight"]

    assert not torch.equal(trained(Muon(lr=0.1)), trained(Muon(lr=0.1, **change)))


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "muon"])
def test_weight_decay_is_for_matrices(name):
    named = parameters()
    nested = {"adamw": AdamW(weight_decay=0.25)} if name == "muon" else {}
    config = CONFIGS[name].model_copy(update={"weight_decay": 0.25, **nested})
    optimizers = build_optimizer(config, named.items())
    groups = [group for part in optimizers for group in part.param_groups]
    decays = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert {decays[p] for p in named.values() if p.ndim >= 2} == {0.25}
    assert {decays[p] for p in named.values() if p.ndim < 2} == {0.0}


def test_frozen_parameters_stay_out_and_tied_ones_come_once():
    named = parameters()
    named["head.scale"].requires_grad_(False)
    tied = [*named.items(), ("head.logits.weight", named["embedding.tokens.weight"])]
    optimizers = build_optimizer(AdamW(), tied)
    taken = [p for group in optimizers[0].param_groups for p in group["params"]]
    assert len(taken) == len(set(taken)) == len(SHAPES) - 1
    train(optimizers, {name: p for name, p in tied if p.requires_grad}, range(1))
    assert "embedding.tokens.weight.exp_avg" in optimizer_tensors(optimizers, tied)
    assert "head.logits.weight.exp_avg" not in optimizer_tensors(optimizers, tied)


def test_nothing_to_train_is_an_error():
    named = parameters()
    with pytest.raises(RonnaError, match="no matrix inside a block"):
        build_optimizer(Muon(), [("head.weight", named["embedding.tokens.weight"])])
    for parameter in named.values():
        parameter.requires_grad_(False)
    with pytest.raises(RonnaError, match="no parameter is left to train"):
        build_optimizer(AdamW(), named.items())


def test_the_scale_multiplies_the_configured_rates_each_time():
    named = parameters()
    optimizers = build_optimizer(Muon(lr=0.2, adamw=AdamW(lr=0.4)), named.items())
    for scale in (0.5, 0.5, 0.25):
        set_gradients(named, 0)
        take_step(optimizers, scale)
        rates = [group["lr"] for part in optimizers for group in part.param_groups]
        assert rates == [0.2 * scale, 0.4 * scale, 0.4 * scale]


@pytest.mark.parametrize("name", CONFIGS)
def test_resuming_is_bit_exact_whatever_the_order_of_the_parameters(name):
    unused = ("decoder.blocks.0.ffn.up.bias", "decoder.blocks.0.ffn.up.weight")  # no gradient before step 3
    straight = parameters()
    optimizers = build_optimizer(CONFIGS[name], straight.items())
    train(optimizers, straight, range(3), skip=unused)
    tensors = {key: tensor.clone() for key, tensor in optimizer_tensors(optimizers, straight.items()).items()}
    weights = {key: p.detach().clone() for key, p in straight.items()}
    train(optimizers, straight, range(3, 6))

    resumed = {key: Parameter(weights[key]) for key in reversed(list(weights))}
    other = build_optimizer(CONFIGS[name], resumed.items())
    train(other, {key: Parameter(p.detach().clone()) for key, p in resumed.items()}, range(1))
    load_optimizer_tensors(other, resumed.items(), tensors)
    again = optimizer_tensors(other, resumed.items())
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)
    train(other, resumed, range(3, 6))
    for key in straight:
        assert torch.equal(straight[key], resumed[key]), key


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_state_that_does_not_fit_is_named_and_changes_nothing(name):
    named = parameters()
    optimizers = build_optimizer(CONFIGS[name], named.items())
    train(optimizers, named, range(2))
    good = {key: tensor.clone() for key, tensor in optimizer_tensors(optimizers, named.items()).items()}
    key = next(key for key in good if key.startswith("embedding") and not key.endswith("step"))
    lost = {k: t for k, t in good.items() if k != key}
    strange = {**good, "nose.step": torch.ones(()), "embedding.tokens.weight.nose": torch.ones(())}
    wrong = {**good, key: torch.zeros(8, 4)}
    for bad, words in ((lost, ["missing " + key]), (wrong, [key + " has shape (8, 4)"])):
        with pytest.raises(RonnaError) as caught:
            load_optimizer_tensors(optimizers, named.items(), bad)
        assert all(word in str(caught.value) for word in words)
    with pytest.raises(RonnaError, match=r"unknown embedding.tokens.weight.nose; unknown nose.step"):
        load_optimizer_tensors(optimizers, named.items(), strange)
    with pytest.raises(RonnaError, match="and 10 more"):
        load_optimizer_tensors(build_optimizer(AdamW(), named.items()), named.items(), {})
    assert all(torch.equal(tensor, good[key]) for key, tensor in optimizer_tensors(optimizers, named.items()).items())


def test_a_lost_parameter_is_not_taken_for_one_without_state():
    named = parameters()
    optimizers = build_optimizer(AdamW(), named.items())
    train(optimizers, named, range(1), skip=("head.scale",))
    tensors = optimizer_tensors(optimizers, named.items())
    load_optimizer_tensors(optimizers, named.items(), tensors)
    with pytest.raises(RonnaError, match=r"missing head.scale.exp_avg"):
        load_optimizer_tensors(
            optimizers, named.items(), {k: t for k, t in tensors.items() if not k.startswith("head.scale")}
        )


@pytest.mark.parametrize("max_norm", [0.5, 100.0, math.inf])
def test_clipping_scales_all_gradients_to_the_norm(max_norm):
    named = parameters()
    set_gradients(named, 0, skip=("head.scale",))
    before = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    true = math.sqrt(sum(g.double().square().sum().item() for g in before.values()))
    assert clip_gradients(named.values(), max_norm).item() == pytest.approx(true, rel=1e-6)
    scale = min(1.0, max_norm / true)
    for name, gradient in before.items():
        torch.testing.assert_close(named[name].grad, gradient * scale, rtol=1e-5, atol=0)


def test_the_norm_of_bfloat16_gradients_is_accumulated_in_float32():
    parameter = Parameter(torch.zeros(4096, dtype=torch.bfloat16))
    parameter.grad = torch.full((4096,), 1.0078125, dtype=torch.bfloat16)
    norm = clip_gradients([parameter], math.inf)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(64 * 1.0078125, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite_are_told_and_left_alone(bad):
    named = parameters()
    set_gradients(named, 0)
    named["head.scale"].grad.fill_(bad)
    before = {name: p.grad.clone() for name, p in named.items()}
    assert not math.isfinite(clip_gradients(named.values(), 0.1).item())
    for name, gradient in before.items():
        assert torch.equal(named[name].grad.nan_to_num(7.0), gradient.nan_to_num(7.0))


def test_no_gradients_have_norm_zero():
    assert clip_gradients(parameters().values(), 1.0).item() == 0


def test_configs_are_told_apart_by_kind():
    adapter = TypeAdapter(OptimizerConfig)
    assert adapter.validate_python({"kind": "muon", "adamw": {"lr": 0.1}}) == Muon(adamw=AdamW(lr=0.1))
    for wrong in (
        {"kind": "adam", "weight_decay": 0.1},
        {"kind": "adamw", "lr": 0},
        {"kind": "adamw", "betas": [0.9, 1]},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)
    with pytest.raises(ValidationError, match="nesterov needs a momentum"):
        SGD(momentum=0.0, nesterov=True)
