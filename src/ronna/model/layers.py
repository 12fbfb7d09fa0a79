"""The parts of a block that look at one token at a time: linear maps, norms, feed-forward, dropout.

Parameters may be fp32 masters while activations are bf16: each layer casts its weights to what it is given.

Legend: T tokens, C channels.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ronna.model import config as c
from ronna.model.boxes import local

ACTIVATIONS: dict[c.Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
}


def on_card(x: Tensor) -> bool:
    """Whether it is a GPU that computes with it."""
    return x.is_cuda


Passing = Callable[[Tensor], Tensor] | None  # what becomes of a weight before its use, where ranks have it in common


def at_hand(weight: Tensor, passing: Passing) -> Tensor:
    """What of a weight this rank computes with."""
    here = local(weight)
    return here if passing is None else passing(here)


class Linear(nn.Linear):
    """A linear map that computes in the precision of its input."""

    passing: Passing = None  # of a bias that is added to a part of a sum

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else at_hand(self.bias, self.passing).to(input.dtype)
        return self.changed(input, F.linear(input, local(self.weight).to(input.dtype), bias))

    @property
    def companions(self) -> list[nn.Module]:
        """What adapts its weight, and is divided as that is."""
        return []

    def changed(self, input: Tensor, output: Tensor) -> Tensor:
        """What an adapter makes of the output: `peft` gives the class of a module another meaning of this."""
        return output


class Table(nn.Embedding):
    """A vector for each number."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # where torch would import its compiler, for a second, to draw nothing
            super().reset_parameters()


def block_linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """The linear maps inside a model's blocks, by path."""
    for path, module in model.named_modules():
        if isinstance(module, Linear) and ".blocks." in path:
            yield path, module


def merged(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """Several linear maps of one input as a single matrix product, which small matrices need to be fast.

    Products of few tokens are left apart: joining the weights would cost more than it saves. So are large weights,
    which are fast as they are and would be held twice, and maps that compute in a way of their own.
    """
    if x.shape[0] < 64 or any(type(m).forward is not Linear.forward for m in linears):
        return tuple(m(x) for m in linears)
    maps = cast(tuple[Linear, ...], linears)
    weights = [local(m.weight) for m in maps]
    if sum(w.numel() for w in weights) > 2**22:
        return tuple(m(x) for m in linears)
    weight = torch.cat([w.to(x.dtype) for w in weights])
    biases: list[Tensor] = [local(m.bias) for m in maps if m.bias is not None]
    bias = torch.cat(biases).to(x.dtype) if biases else None
    outputs = F.linear(x, weight, bias).split([len(w) for w in weights], dim=-1)
    return tuple(m.changed(x, y) for m, y in zip(maps, outputs, strict=True))


class LayerNorm(nn.LayerNorm):
    passing: Passing = None

    def forward(self, input: Tensor) -> Tensor:
        weight = at_hand(self.weight, self.passing)
        bias = None if self.bias is None else at_hand(self.bias, self.passing)
        # The CPU kernel takes fp32 weights with bf16 input as they are, but not the other way round.
        if input.is_cuda or bias is None or weight.dtype != torch.float32:
            weight, bias = weight.to(input.dtype), None if bias is None else bias.to(input.dtype)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    passing: Passing = None

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, at_hand(self.weight, self.passing).to(x.dtype), self.eps)


def make_norm(cfg: c.Norm | None, dim: int) -> nn.Module:
    if cfg is None:
        return nn.Identity()
    return RMSNorm(dim, eps=cfg.eps) if cfg.kind == "rms" else LayerNorm(dim, eps=cfg.eps, bias=cfg.bias)


class CheapDropout(torch.autograd.Function):
    """Dropout that draws 16 random bits an element, four elements a word, and masks without multiplying.

    On a CPU torch's own takes most of its time to draw one 24-bit number an element. The rate is rounded to
    1/65,536 and the scale follows it exactly, so the expectation is unbiased. torch's generator gives the seed
    of each mask, so `torch.manual_seed` decides them all.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float) -> Tensor:
        bound = round(rate * 2**16)
        seed = int(torch.empty((), dtype=torch.int64).random_())
        words = np.random.SFC64(seed).random_raw(-(-x.numel() // 4)).view(np.int16)
        dropped = (words[: x.numel()] < bound - 2**15).view(np.int8)
        kept = torch.from_numpy(np.subtract(dropped, 1, out=dropped)).view(x.shape)
        ctx.save_for_backward(kept)
        ctx.scale = 2**16 / (2**16 - bound)
        return where_kept(x, kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return where_kept(gradient, kept).mul_(ctx.scale), None


def where_kept(x: Tensor, kept: Tensor) -> Tensor:
    """x where `kept` (int8) is -1, zeros where it is 0: a mask of bits, since x * bool converts element by element."""
    bits = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    return kept.to(bits.dtype).bitwise_and_(bits).view(x.dtype)


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """Each element 0 with probability `rate`, else divided by 1 - rate; x itself when not training."""
    if not training or rate == 0.0:
        return x
    if x.device.type == "cpu":
        return CheapDropout.apply(x, rate)
    return F.dropout(x, rate)


class FeedForward(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, cfg: c.FeedForward, dim: int):
        super().__init__()
        self.cfg = cfg
        self.up = Linear(dim, cfg.hidden, bias=cfg.bias)
        self.gate = Linear(dim, cfg.hidden, bias=cfg.bias) if cfg.gated else None
        self.down = Linear(cfg.hidden, dim, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        act = ACTIVATIONS[self.cfg.act]
        if self.gate is None:
            h = act(self.up(x))
        else:
            gate, up = merged(x, self.gate, self.up)
            h = act(gate) * up
        return self.down(dropout(h, self.cfg.dropout, self.training))
