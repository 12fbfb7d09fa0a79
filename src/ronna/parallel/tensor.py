"""Tensor parallelism (Shoeybi et al. 2019): each rank has some heads and some hidden channels of every block.

One table for every family. What goes into a block and what comes out of it is whole on each rank; inside, attention
and feed-forward each end in one sum over the ranks, and begin, backwards, with another.
"""

import logging
from collections.abc import Callable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from ronna.base.errors import RonnaError
from ronna.model import config as c
from ronna.model.transformer import Transformer


def by_head() -> ParallelStyle:
    """Of a norm over the channels of a head: its weights are whole, its input (T, H, D) has this rank's heads."""
    return SequenceParallel(sequence_dim=1, use_local_output=True)


INTO: dict[str, Callable[[], ParallelStyle]] = {"q": ColwiseParallel, "k": ColwiseParallel, "v": ColwiseParallel}
HEADS = INTO | {"out": RowwiseParallel, "q_norm": by_head, "k_norm": by_head}
TABLE: dict[str, Callable[[], ParallelStyle]] = {
    **{f"{part}.{name}": style for part in ("attention", "cross") for name, style in HEADS.items()},
    "ffn.up": ColwiseParallel,
    "ffn.gate": ColwiseParallel,
    "ffn.down": RowwiseParallel,
}


def divide(model: Transformer, mesh: DeviceMesh) -> None:
    """Leave each rank of the mesh (one dimension) its heads and hidden channels. Raises RonnaError where their numbers
    are no multiples of the ranks."""
    # Of two sums, where one over ranks of both kinds would do.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    for stack in (model.encoder, model.decoder):
        if stack is None:
            continue
        for cfg in stack.cfg.blocks:
            refuse_uneven(cfg, mesh.size())
        if stack.bias is not None:
            parallelize_module(stack.bias, mesh, {"table": ColwiseParallel()})  # a column is a head's
        for block in stack.blocks:
            present = {name for name, module in block.named_modules() if not isinstance(module, nn.Identity)}
            parallelize_module(block, mesh, {name: style() for name, style in TABLE.items() if name in present})


def refuse_uneven(block: c.Block, ranks: int) -> None:
    attentions = [block.attention] + ([block.cross] if block.cross else [])
    counts = [("heads", a.heads) for a in attentions] + [("heads of keys and values", a.kv) for a in attentions]
    for name, count in (*counts, ("hidden channels", block.ffn.hidden)):
        if count % ranks:
            fix = "give a number that divides them all"
            raise RonnaError(f"{count} {name} cannot be divided over {ranks} ranks", where="parallel.tensor", fix=fix)
