"""Bottleneck adapters behind attention and feed-forward (Houlsby et al. 2019)."""

import math
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
    """y + up(act(down(y))). down: (m, O), up: (O, m), zero at first, so that it starts as the identity."""

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
            # The paper draws both with a deviation of 0.01. Behind attention that lets next to nothing through, and
            # learning waits for it to grow. With `up` zero the start is the identity whatever `down` is.
            rng = generator(seed, f"{path}.houlsby.down")
            change.down.normal_(0.0, 2 / math.sqrt(linear.out_features), generator=rng)
            change.up.zero_()
        attach_change(linear, name, change)
