"""Muon: momentum whose singular values are all brought near to one.

Legend: R x C a matrix.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ronna.base.device import has_bf16
from ronna.train.lean import ByTensor

# Of the quintic whose slope at zero is steepest while values end between 0.7 and 1.2 or so (Jordan et al. 2024).
QUINTIC = (3.4445, -4.775, 2.0315)
TO_ADAMW = 0.2  # root mean square of AdamW's updates, which these get (Liu et al. 2025, arXiv:2502.16982)


class MuonOptimizer(ByTensor):
    """`ronna.train.optim.Muon` for matrices.

    In steps like `torch.optim.Muon`, to the bit where the device has bf16 instructions. That one multiplies in bf16
    everywhere, which on a CPU without them takes four fifths of a small model's step; here it is fp32 then.
    """

    def __init__(
        self, parameters: list[Parameter], lr: float, momentum: float, nesterov: bool, steps: int, weight_decay: float
    ):
        own = {"momentum": momentum, "nesterov": nesterov, "steps": steps}
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay} | own)

    def shapes(self, size: torch.Size) -> dict[str, tuple[int, ...]]:
        return {"momentum_buffer": tuple(size)}

    def update(self, p: Tensor, group: dict[str, Any]) -> None:
        gradient, state = p.grad, self.state[p]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        past = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        found = orthogonal(gradient.lerp(past, group["momentum"]) if group["nesterov"] else past, group["steps"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(found, alpha=-group["lr"] * TO_ADAMW * math.sqrt(max(p.shape)))


def orthogonal(x: Tensor, steps: int) -> Tensor:
    """Near to U V^T of x = U S V^T (R, C), by so many Newton-Schulz iterations."""
    a, b, c = QUINTIC
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x).to(precision(x.device))
    x = x / x.norm().clamp(min=1e-7)  # no singular value is above one
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


@cache
def precision(device: torch.device) -> torch.dtype:
    """That matrices are multiplied in."""
    return torch.bfloat16 if has_bf16(device) else torch.float32
