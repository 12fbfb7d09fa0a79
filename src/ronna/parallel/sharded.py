"""A model whose parameters, gradients and optimizer states lie in parts on several ranks: FSDP2 (Zhao et al. 2023).

Each block is whole on every rank only while it computes; what stands around the blocks (embedding, last norm, heads)
is whole from the first look at it in a step to the end of that step, as losses read its weights themselves.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import sub
from typing import NamedTuple

from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ronna.model.transformer import Transformer
from ronna.parallel.world import World

ENTRIES = ("encode", "hidden", "scores", "pooled")  # the ways into a model, beside its forward pass


def shard(model: Transformer, world: World) -> None:
    """Leave each rank its part of every parameter, along the first dimension; all ranks have the same model before.

    Gradients are then sums over the ranks, not means: the loop divides losses by the counts of all.
    """
    assert world.mesh is not None
    mesh = world.mesh if world.mesh.size(0) > 1 else world.mesh["shard"]
    for stack in (model.encoder, model.decoder):
        for block in stack.blocks if stack is not None else ():
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for name in ENTRIES:
        register_fsdp_forward_method(model, name)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other


def rest(model: Transformer) -> None:
    """Let go of what is whole after a look without a backward pass; nothing where nothing is in shards."""
    if isinstance(model, FSDPModule):
        model.reshard()


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it; every rank asks at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Box(NamedTuple):
    """A part of a tensor: where it begins and how long it is, by dimension."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

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
    if not isinstance(tensor, DTensor):
        return Box((0,) * tensor.ndim, tuple(tensor.shape))
    shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Box(tuple(start), tuple(shape))


class Gathered(Mapping[str, Tensor]):
    """The whole tensors of a sharded state, each put together when rank 0 looks it up."""

    def __init__(self, state: Mapping[str, Tensor], world: World):
        self.state, self.world = state, world
        self.names = sorted(state)

    def __getitem__(self, name: str) -> Tensor:
        self.world.told(self.names.index(name))
        return whole(self.state[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


@contextmanager
def gathered(state: Mapping[str, Tensor], world: World) -> Iterator[Mapping[str, Tensor] | None]:
    """The state whole on rank 0, one tensor at a time, while the others help; they get None and nothing to do.

    No rank ever holds more than one tensor that is not its own.
    """
    if world.size == 1:
        yield state
    elif world.main:
        try:
            yield Gathered(state, world)
        finally:
            world.told(-1)
    else:
        names = sorted(state)
        while (number := world.told(0)) >= 0:
            whole(state[names[number]])
        yield None
