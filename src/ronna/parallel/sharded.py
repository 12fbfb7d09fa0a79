"""A model whose parameters, gradients and optimizer states lie in parts on several ranks: FSDP2 (Zhao et al. 2023).

Each block is whole on every rank only while it computes, in the precision that it computes in; what stands around the
blocks (embedding, last norm, heads) is whole from the first look at it in a step to the end of that step, as losses
read its weights themselves.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from ronna.model.boxes import is_sharded, whole
from ronna.model.transformer import Block, Transformer
from ronna.parallel.context import spread
from ronna.parallel.pipeline import cut, pass_on
from ronna.parallel.tensor import divide
from ronna.parallel.world import ENDS, World

ENTRIES = ("encode", "hidden", "scores", "pooled")  # the ways into a model, beside its forward pass


def shard(model: Transformer, world: World, compute: torch.dtype) -> None:
    """Leave each rank its part of every parameter; all ranks have the same model before. Blocks are gathered in the
    precision of the computation, and their gradients added up in fp32.

    Gradients are then sums over the ranks, not means: the loop divides losses by the counts of all. But ranks of one
    context group have the same losses (see `ronna.parallel.context`). Raises RonnaError where a model cannot be divided
    as asked.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    assert world.mesh is not None
    # Of changes in place of what a model returns, which nobody makes, and of sums over two dimensions of a mesh, which
    # are taken one after the other.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    if world.pipeline > 1:
        cut(model, world)
    if world.tensor > 1:
        ends = world.mesh if world.ends_mesh is None else world.ends_mesh
        divide(model, world.mesh["tensor"], ends["tensor"], world.sequence)
    if world.context_mesh is not None:
        spread(model, world.context_mesh.get_group("context"))
    mesh = around = world.mesh["replicate", "shard"] if world.copies > 1 else world.mesh["shard"]
    if world.ends_mesh is not None:
        around = world.ends_mesh["replicate", ENDS] if world.copies > 1 else world.ends_mesh[ENDS]
    narrow = compute if compute.itemsize < 4 else None
    policy = MixedPrecisionPolicy(narrow, torch.float32 if narrow else None, cast_forward_inputs=False)
    for stack in (model.encoder, model.decoder):
        for block in stack.blocks if stack is not None else ():
            if isinstance(block, Block):
                fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=around, reshard_after_forward=False)
    for name in ENTRIES if world.pipeline == 1 else ("states",):
        register_fsdp_forward_method(model, name)
    if world.pipeline > 1:
        pass_on(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(float(world.context))
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other


def allot_shards(model: Transformer, world: World, device: torch.device, compute: torch.dtype) -> None:
    """Give a model whose parameters have no memory yet that of this rank's parts alone."""
    shard(model, world, compute)
    model.to_empty(device=device)
    model.tie()


def rest(model: Transformer) -> None:
    """Let go of what is whole after a look without a backward pass; nothing where nothing is in shards."""
    if is_sharded(model):
        model.reshard()


class Gathered(Mapping[str, Tensor]):
    """The whole tensors of a sharded state, each put together when rank 0 looks it up."""

    def __init__(self, state: Mapping[str, Tensor], world: World):
        self.state, self.world = state, world
        self.names = sorted(state)

    def __getitem__(self, name: str) -> Tensor:
        self.world.told(self.names.index(name))
        return brought(self.state[name], self.world)

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def brought(tensor: Tensor, world: World) -> Tensor:
    """All of it on rank 0, from the ranks that have it; on the others it is on "meta"."""
    here = not tensor.is_meta
    found = whole(tensor) if here else tensor
    if world.pipe is None or (source := world.least(world.rank if here else world.size)) == 0:
        return found
    if world.main:
        assert world.mesh is not None
        found = torch.empty_like(tensor, device=world.mesh.device_type)
        dist.recv(found, source)
    elif world.rank == source:
        dist.send(found.contiguous(), 0)
    return found


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
            brought(state[names[number]], world)
        yield None
