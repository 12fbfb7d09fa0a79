"""Bottleneck adapters behind attention and feed-forward (Houlsby et al. 2019)."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ronna.base.config import Config
from ronna.model.config import Activation
from ronna.model.init import generator
from ronna.model.layers import ACTIVATIONS, Linear
from ronna.model.transformer import Transformer
from ronna.peft.changes import Change, attach_change, targeted

# The last map of attention and of the feed-forward: what they write into the residual stream.
PLACES = ("attention.out", "ffn.down")


class HoulsbyConfig(Config):
    kind: Literal["houlsby"] = "houlsby"
    size: int = Field(64, ge=1, le=65_536)  # of the bottleneck
    act: Activation = "gelu"


class Bottleneck(Change):
    """y + up(act(down(y))). down: (m, O), up: (O, m), both small at first, so that it starts near the identity."""

    def __init__(self, base: Linear, size: int, act: Activation):
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.down = nn.Parameter(torch.empty(size, base.out_features))
        self.down_bias = nn.Parameter(torch.zeros(size))
        self.up = nn.Parameter(torch.empty(base.out_features, size))
        self.up_bias = nn.Parameter(torch.zeros(base.out_features))

    def forward(self, base: Linear, x: Tensor, y: Tensor) -> Tensor:
        h = self.act(F.linear(y, self.down.to(y.dtype), self.down_bias.to(y.dtype)))
        return y + F.linear(h, self.up.to(y.dtype), self.up_bias.to(y.dtype))


def add_houlsby(model: Transformer, config: HoulsbyConfig, name: str, seed: int) -> None:
    """Attach fresh bottlenecks, two a block; norms are to be trained with them (see `trained`)."""
    for path, linear in targeted(model, PLACES):
        change = Bottleneck(linear, config.size, config.act)
        with torch.no_grad():
            for leaf in ("down", "up"):  # the paper's truncated normal of deviation 0.01
                weight = getattr(change, leaf)
                rng = generator(seed, f"{path}.houlsby.{leaf}")
                nn.init.trunc_normal_(weight, std=0.01, a=-0.02, b=0.02, generator=rng)
        attach_change(linear, name, change)
