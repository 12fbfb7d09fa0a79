"""LoRA (Hu et al. 2021), rank-stabilised (Kalajdzievski 2023) and weight-decomposed (Liu et al. 2024, DoRA)."""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ronna.base.config import Config
from ronna.model.init import generator
from ronna.model.layers import Linear, at_hand, dropout, on_card
from ronna.model.transformer import Transformer
from ronna.peft.changes import Change, attach_change, targeted


class LoraConfig(Config):
    kind: Literal["lora"] = "lora"
    rank: int = Field(8, ge=1, le=65_536)
    alpha: float = Field(16.0, gt=0)
    targets: tuple[str, ...] = Field(("all",), min_length=1)  # names of linear maps: q, v, ffn.up, ...
    dropout: float = Field(0.0, ge=0, lt=1)  # on what the adapter reads
    rslora: bool = False  # divide alpha by the root of the rank
    dora: bool = False  # learn the length of each output's weights apart from their direction

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LowRank(Change):
    """y + scale * b a x, and with `magnitude` the sum's rows brought to learnt lengths.

    a: (r, I), uniform as a new linear map's; b: (O, r), zeros, so that nothing changes at first.
    """

    def __init__(self, base: Linear, rank: int, scale: float, dropout: float = 0.0, dora: bool = False):
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.passing: dict[str, Callable[[Tensor], Tensor]] = {}  # as that of a linear map, by name
        self.a = nn.Parameter(torch.empty(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        self.magnitude: nn.Parameter | None = None
        if dora:
            self.magnitude = nn.Parameter(lengths(base.weight.detach().float()))

    def here(self, name: str) -> Tensor:
        weight: Tensor = getattr(self, name)
        return at_hand(weight, self.passing.get(name))

    def forward(self, base: Linear, x: Tensor, y: Tensor) -> Tensor:
        x, a = dropout(x, self.dropout, self.training), self.here("a").to(x.dtype)
        if self.magnitude is None:
            return with_low_rank(y, x, a, (self.here("b") * self.scale).to(x.dtype))
        # The length of a row is a constant for the gradient, as the paper's section 4.3 has it.
        stretch = self.magnitude / lengths(self.weight(base)).detach()
        bare = y if base.bias is None else y - base.bias.to(y.dtype)
        return y + (stretch - 1).to(y.dtype) * bare + stretch.to(y.dtype) * self.up(F.linear(x, a))

    def up(self, h: Tensor) -> Tensor:
        return F.linear(h, (self.b * self.scale).to(h.dtype))

    def weight(self, base: Linear) -> Tensor:
        """(O, I) fp32, before any stretching."""
        return base.weight.detach().float() + self.scale * (self.b.detach().float() @ self.a.detach().float())

    def merged_weight(self, base: Linear) -> Tensor:
        weight = self.weight(base)
        return weight if self.magnitude is None else weight * (self.magnitude / lengths(weight))[:, None]


def with_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y (T, O) + x a^T b^T, for x (T, I), a (r, I) and b (O, r)."""
    if not on_card(y):
        return torch.addmm(y, F.linear(x, a), b.T)
    # Apart: compiled, the sum is made where it is next read, and `addmm` would copy y first. In bf16 a rank that is no
    # multiple of 8 has slow products.
    if missing := -len(a) % 8:
        a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
    return y + F.linear(F.linear(x, a), b)


def lengths(weight: Tensor) -> Tensor:
    """(O,) Euclidean length of each row."""
    return torch.linalg.vector_norm(weight, dim=1)


def add_lora(model: Transformer, config: LoraConfig, name: str, seed: int) -> None:
    """Attach a fresh LoRA to the maps that the config names; each is drawn from (seed, its path)."""
    for path, linear in targeted(model, config.targets):
        change = LowRank(linear, config.rank, config.scale, config.dropout, config.dora)
        with torch.no_grad():
            nn.init.kaiming_uniform_(change.a, a=math.sqrt(5), generator=generator(seed, f"{path}.lora.a"))
        attach_change(linear, name, change)
