"""Tensors that lie in parts on several ranks (torch's DTensor): which part is here, and all of it.

A process that divides nothing imports neither DTensor nor FSDP, which takes a second.

A plain tensor is one whose only part is here.
"""

import sys
from collections.abc import Sequence
from operator import sub
from typing import TYPE_CHECKING, NamedTuple, Self, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def in_parts(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether it lies on several ranks."""
    divided = sys.modules.get("torch.distributed.tensor")
    return divided is not None and isinstance(tensor, divided.DTensor)


def is_sharded(model: nn.Module) -> "TypeGuard[FSDPModule]":
    """Whether its parameters do, under FSDP2."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies here."""
    return tensor.to_local() if in_parts(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it; every rank asks at once."""
    return tensor.full_tensor() if in_parts(tensor) else tensor


class Box(NamedTuple):
    """A part of a tensor: where it begins and how long it is, by dimension."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def all_of(cls, shape: Sequence[int]) -> Self:
        return cls((0,) * len(shape), tuple(shape))

    def common(self, other: "Box") -> "Box | None":
        """What is in both, if anything is."""
        start = tuple(map(max, self.start, other.start))
        ends = (map(sum, zip(box.start, box.shape, strict=True)) for box in (self, other))
        shape = tuple(end - first for first, end in zip(start, map(min, *ends), strict=True))
        return Box(start, shape) if all(n > 0 for n in shape) else None

    def within(self, other: "Box") -> tuple[slice, ...]:
        """How to cut it out of the other, which holds it."""
        begins = map(sub, self.start, other.start)
        return tuple(slice(begin, begin + n) for begin, n in zip(begins, self.shape, strict=True))


def box_of(tensor: Tensor) -> Box:
    """What of a tensor lies here."""
    if not in_parts(tensor):
        return Box.all_of(tensor.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Box(tuple(start), tuple(shape))


@torch.no_grad()
def put(tensor: Tensor, values: Tensor) -> None:
    """Copy the values, which are of all of it, into what lies here."""
    local(tensor).copy_(values[box_of(tensor).within(Box.all_of(tensor.shape))])
