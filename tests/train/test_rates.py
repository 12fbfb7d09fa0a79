"""Parts of a model that learn faster or slower than the rest."""

import pytest
import torch
from pydantic import ValidationError
from torch.nn import Parameter

from ronna.base.errors import RonnaError
from ronna.model.families import preset
from ronna.model.transformer import Transformer
from ronna.train.lean import AdamW8bit, Apollo
from ronna.train.loop import TrainConfig
from ronna.train.optim import SGD, Adafactor, Adam, AdamW, Muon, build_apart, build_optimizer
from ronna.train.schedule import set_lr
from ronna.train.stepping import stepping

NAMES = [
    "embedding.tokens.weight",
    "decoder.blocks.0.ffn.up.weight",
    "decoder.blocks.0.ffn_norm.weight",
    "decoder.norm.weight",
]
RATES = {"ffn_norm": 0.25, "norm": 0.5}
FACTORS = [1.0, 1.0, 0.25, 0.5]
KINDS = [AdamW, Adam, SGD, Adafactor, Muon, AdamW8bit, Apollo]


def named() -> dict[str, Parameter]:
    return {name: Parameter(torch.ones(*(8, 4) if "norm" not in name else (4,))) for name in NAMES}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_each_parameter_has_the_rate_of_the_first_text_in_its_name(kind, apart):
    config = kind(lr=0.01, rates=RATES)
    some = named()
    if apart:
        optimizers = [o for found in build_apart(config, some.items()).values() for o in found]
    else:
        optimizers = build_optimizer(config, some.items())
    set_lr(optimizers, 0.5)
    rates = {p: group["lr"] for o in optimizers for group in o.param_groups for p in group["params"]}
    own = [0.01 if kind is not Muon or name == NAMES[1] else AdamW().lr for name in NAMES]
    expected = [0.5 * rate * factor for rate, factor in zip(own, FACTORS, strict=True)]
    assert [rates[p] for p in some.values()] == pytest.approx(expected)


def test_a_step_is_as_much_smaller():
    some = named()
    optimizers = build_optimizer(Adam(lr=0.01, rates=RATES), some.items())
    for parameter in some.values():
        parameter.grad = torch.ones_like(parameter)
    set_lr(optimizers, 1.0)
    for optimizer in optimizers:
        optimizer.step()
    assert [1 - p.flatten()[0].item() for p in some.values()] == pytest.approx([0.01 * f for f in FACTORS], rel=1e-3)


def test_a_text_that_no_name_of_what_learns_holds_is_refused():
    model = Transformer(preset("bert-tiny", vocab_size=101)[1])
    stepping(model, AdamW(rates={"norm": 0.1}), TrainConfig(), None, None)
    for parameter in model.embedding.parameters():
        parameter.requires_grad = False
    for wrong in ("nrom", "embedding"):
        with pytest.raises(RonnaError, match="no parameter that learns is called so") as caught:
            stepping(model, AdamW(rates={"blocks": 0.5, wrong: 0.1}), TrainConfig(), None, None)
        assert caught.value.where == f"optim.rates.{wrong}" and "such as" in caught.value.fix


def test_rates_of_parts_stand_in_one_place():
    with pytest.raises(ValidationError, match="beside adamw"):
        Muon(adamw=AdamW(rates={"norm": 0.1}))
