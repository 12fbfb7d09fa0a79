"""Optimizers that keep less than AdamW's eight bytes a weight.

Legend: R x C a matrix, its smaller side first; r rank of a projection.
"""

import math
from abc import abstractmethod
from functools import cache
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.optim import Optimizer

from ronna.base.device import seed_for
from ronna.model.fourbit import import_bitsandbytes
from ronna.train.rates import Rated

Betas = tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]]
BLOCK = 256  # numbers that share a scale
SMALL = 4096  # tensors of fewer numbers save nothing worth their rounding


class AdamW8bit(Rated):
    """AdamW with both moments in eight bits, each block of 256 scaled to its largest (Dettmers et al. 2022)."""

    kind: Literal["adamw8bit"] = "adamw8bit"
    lr: PositiveFloat = 3e-4
    betas: Betas = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1


class Apollo(Rated):
    """A gradient scaled as AdamW would scale it, judged by a random projection of it (Zhu et al. 2024).

    For the matrices inside the blocks: moments are kept of r x C numbers instead of R x C. The scale makes up for the
    projection, so that rates found for AdamW carry over. Embeddings, heads, norms and biases take AdamW, as with its
    authors: a small GPT with its embeddings and head projected too had a loss 9% above AdamW's after 460 steps.
    """

    kind: Literal["apollo"] = "apollo"
    lr: PositiveFloat = 3e-4
    betas: Betas = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    rank: PositiveInt | None = None  # None: a quarter of the smaller side; 1 is APOLLO-Mini
    scope: Literal["channel", "tensor"] = "channel"  # what has a scale of its own; tensor suits a rank of 1
    refresh: PositiveInt = 200  # steps between projections


class ByTensor(Optimizer):
    """An optimizer that looks at one tensor after another."""

    @abstractmethod
    def shapes(self, size: torch.Size) -> dict[str, tuple[int, ...]]:
        """Of the states of a parameter."""

    @abstractmethod
    def update(self, p: Tensor, group: dict[str, Any]) -> None: ...

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)


class EightBitAdamW(ByTensor):
    """`AdamW8bit` on bitsandbytes' kernels, its states plain tensors."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float):
        kernels()  # its absence is to be told before training
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.register_load_state_dict_post_hook(as_codes)

    def shapes(self, size: torch.Size) -> dict[str, tuple[int, ...]]:
        scales = (-(-size.numel() // BLOCK),)
        return {"step": (), "first": tuple(size), "second": tuple(size), "first_scale": scales, "second_scale": scales}

    def update(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        signed, unsigned = maps(p.device)
        if not state:
            scales = torch.zeros(-(-p.numel() // BLOCK), device=p.device)
            state["step"] = torch.zeros(())
            for name, codes in (("first", signed), ("second", unsigned)):
                nothing = int(codes.abs().argmin())  # the code of zero
                state[name] = torch.full_like(p, nothing, dtype=torch.uint8)
                state[f"{name}_scale"] = scales.clone()
        state["step"] += 1
        kernels().optimizer_update_8bit_blockwise(
            "adam", p.grad, p, state["first"], state["second"], *group["betas"], 0.0, 0.0, group["eps"],
            int(state["step"]), group["lr"], signed, unsigned, state["first_scale"], state["second_scale"],
            group["weight_decay"],
        )  # fmt: skip


def as_codes(optimizer: Optimizer) -> None:
    """torch takes codes that it loads for moments, and gives them the weights' precision."""
    for state in optimizer.state.values():
        state.update({name: state[name].to(torch.uint8) for name in ("first", "second")})


def kernels() -> Any:
    return import_bitsandbytes("optim.kind").functional


@cache
def maps(device: torch.device) -> tuple[Tensor, Tensor]:
    """(256,) each: the numbers that codes of the first and of the second moment stand for."""
    make = kernels().create_dynamic_map
    return make(signed=True).to(device), make(signed=False).to(device)


class ApolloOptimizer(ByTensor):
    """`Apollo` for matrices. What it projects by follows from shape and step, so there is nothing of it to keep."""

    LIMIT = 1.01  # growth of an update's norm from one step to the next

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        rank: int | None,
        scope: str,
        refresh: int,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0}
        super().__init__(groups, defaults | {"rank": rank, "scope": scope, "refresh": refresh})

    def shapes(self, size: torch.Size) -> dict[str, tuple[int, ...]]:
        low = (rank_of(size, self.param_groups[0]["rank"]), max(size))
        return {"step": (), "norm": (), "first": low, "second": low}

    def update(self, p: Tensor, group: dict[str, Any]) -> None:
        gradient = p.grad if p.shape[0] <= p.shape[1] else p.grad.T  # type: ignore[union-attr]  # (R, C)
        assert gradient is not None
        rank, state = rank_of(p.shape, group["rank"]), self.state[p]
        if not state:
            state.update(step=torch.zeros(()), norm=torch.zeros((), device=p.device))
            state.update({name: p.new_zeros(rank, gradient.shape[1]) for name in ("first", "second")})
        turn = int(state["step"]) // group["refresh"]
        state["step"] += 1
        low = projection(rank, gradient.shape[0], seed_for(*gradient.shape, turn)).to(gradient) @ gradient  # (r, C)
        scale = adapted(low, state, group)
        update = gradient * (scale * math.sqrt(gradient.shape[0] / rank))
        norm = torch.linalg.vector_norm(update)
        bound = torch.where(state["norm"] > 0, state["norm"] * self.LIMIT, norm)
        shrink = (bound / norm.clamp(min=1e-30)).clamp(max=1.0)
        state["norm"] = norm * shrink
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_((update if p.shape[0] <= p.shape[1] else update.T) * (shrink * -group["lr"]))


def rank_of(size: tuple[int, ...], rank: int | None) -> int:
    return min(rank or max(1, min(size) // 4), min(size))


def projection(rank: int, side: int, seed: int) -> Tensor:
    """(r, R), entries N(0, 1 / r), so that norms are kept in the mean (Johnson and Lindenstrauss 1984)."""
    return torch.randn(rank, side, generator=torch.Generator().manual_seed(seed)) / math.sqrt(rank)


def adapted(low: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
    """How much larger AdamW would make the projected gradient (r, C): (C,) by channel, () of the whole."""
    (beta1, beta2), step = group["betas"], int(state["step"])
    first, second = state["first"].lerp_(low, 1 - beta1), state["second"].lerp_(low.square(), 1 - beta2)
    root = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
    direction = (first / (1 - beta1**step)).div_(root)
    over = 0 if group["scope"] == "channel" else None
    size = torch.linalg.vector_norm(low, dim=over).clamp(min=1e-30)
    return torch.linalg.vector_norm(direction, dim=over) / size
