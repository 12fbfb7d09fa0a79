"""What ranks of a group give each other while they compute, there and back.

Legend: R rows that a rank has, C channels, n ranks.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ronna.model.group import Group

# Of torch 2.13, and by their names before.
gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Step = Callable[[Tensor, dist.ProcessGroup], Tensor]


def same(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x.view_as(x)


def total(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


def even(x: Tensor, ranks: int) -> Tensor:
    """With zeros behind, so that every rank has as many rows."""
    return F.pad(x, (0, 0, 0, -len(x) % ranks)).contiguous()


def part(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return even(x, group.size()).chunk(group.size())[group.rank()].contiguous()


def padded(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's rows where they lie among those of all, which are zeros: what `part` does not take."""
    whole = x.new_zeros(len(x) * group.size(), *x.shape[1:])
    whole.chunk(group.size())[group.rank()].copy_(x)
    return whole


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    whole = x.new_empty(len(x) * group.size(), *x.shape[1:])
    gather(whole, x.contiguous(), group=group)
    return whole


def scattered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = even(x, group.size())
    rows = x.new_empty(len(x) // group.size(), *x.shape[1:])
    reduce_scatter(rows, x, group=group)
    return rows


def exchanged(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(n, ...): the i-th is what rank i had for this one."""
    x = x.contiguous()
    found = torch.empty_like(x)
    dist.all_to_all_single(found, x, group=group)
    return found


def to_channels(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's rows of all channels (R, C) -> all rows of its channels (n R, C / n)."""
    return exchanged(x.unflatten(1, (group.size(), -1)).transpose(0, 1), group).flatten(0, 1)


def to_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The other way round."""
    return exchanged(x.unflatten(0, (group.size(), -1)), group).transpose(0, 1).flatten(1)


class Pass(torch.autograd.Function):
    """One of these on the way forward, another on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Step, back: Step, group: dist.ProcessGroup) -> Tensor:
        ctx.back, ctx.group, ctx.rows = back, group, len(x)
        return there(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(gradient, ctx.group)[: ctx.rows], None, None, None


class PassingGroup(Group):
    """Ranks of one process group."""

    group: dist.ProcessGroup

    def through(self, x: Tensor, there: Step, back: Step) -> Tensor:
        passed: Tensor = Pass.apply(x, there, back, self.group)
        return passed
