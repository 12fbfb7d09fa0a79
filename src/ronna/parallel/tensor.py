"""Tensor parallelism (Shoeybi et al. 2019): each rank has some heads and some hidden channels of every block.

One table for every family. Attention and feed-forward each end in one sum over the ranks, and begin, backwards, with
another. Between them each rank keeps all rows of the states, or some of them (sequence parallelism, Korthikanti et al.
2022), which takes as many bytes on the way and holds less. A rank also has some of the words, in the token table and in
the head, whose loss needs no more than three numbers of each row of logits from the others.

Legend: R rows, C channels, V vocabulary, n ranks.
"""

from typing import Any, Literal

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ronna.base.errors import RonnaError
from ronna.model import config as c
from ronna.model.layers import Linear
from ronna.model.transformer import Transformer
from ronna.parallel.passes import PassingGroup, gathered, part, same, scattered, total

HEADS = {"q": 0, "k": 0, "v": 0, "out": 1}
# The dimension of its weight in which a map is divided: its outputs, or its inputs.
TABLE = {f"{part}.{name}": dim for part in ("attention", "cross") for name, dim in HEADS.items()}
TABLE |= {"ffn.up": 0, "ffn.gate": 0, "ffn.down": 1}
PER_HEAD = ("attention.q_norm", "attention.k_norm", "cross.q_norm", "cross.k_norm")
BETWEEN = ("attention_norm", "cross_norm", "ffn_norm")  # of what is divided by rows, if that is


class TensorGroup(PassingGroup):
    """rows: whether each rank keeps some of the rows of the states between divided maps."""

    def __init__(self, group: dist.ProcessGroup, rows: bool):
        self.group, self.by_rows, self.size = group, rows, group.size()

    def split(self, x: Tensor) -> Tensor:
        return self.through(x, part, gathered) if self.by_rows else x

    def join(self, x: Tensor) -> Tensor:
        return self.through(x, gathered, part) if self.by_rows else x

    def into(self, x: Tensor) -> Tensor:
        return self.through(x, gathered, scattered) if self.by_rows else self.through(x, same, total)

    def out(self, y: Tensor) -> Tensor:
        return self.through(y, scattered, gathered) if self.by_rows else self.through(y, total, same)

    def total(self, x: Tensor) -> Tensor:
        return self.through(x, total, same)

    def words(self, logits: Tensor, vocab: int) -> Tensor:
        most = -(-vocab // self.size)  # the last ranks may have fewer
        columns = F.pad(logits, (0, most - logits.shape[1])).T
        return self.through(columns, gathered, part).T[:, :vocab]

    def reduced(self, x: Tensor, how: Literal["sum", "max", "min"]) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, getattr(dist.ReduceOp, how.upper()), group=self.group)
        return x

    def shared(self, w: Tensor) -> Tensor:
        return self.through(w, same, total)


def divide(model: Transformer, mesh: DeviceMesh, ends: DeviceMesh, rows: bool) -> None:
    """Leave each rank of the mesh (one dimension) its heads, hidden channels and words and, with `rows`, its rows of
    the states between blocks; all have the same model before. ends: the same ranks, for what stands around the blocks.
    Raises RonnaError where numbers are no multiples of the ranks."""
    group = TensorGroup(mesh.get_group(), rows)
    model.embedding.group = group
    place(model.embedding.tokens, "weight", ends, 0)
    if model.head is not None:
        model.head.group = group
        place(model.head.logits, "weight", ends, 0)
        place(model.head.logits, "bias", ends, 0)
        model.tie()
    for stack in (model.encoder, model.decoder):
        if stack is None:
            continue
        for cfg in stack.cfg.blocks:
            refuse_uneven(cfg, mesh.size())
        stack.group = group
        if stack.bias is not None:
            place(stack.bias.table, "weight", ends, 1)  # a column is a head's
        for block in stack.blocks:
            divide_block(block, mesh, group)


def divide_block(block: nn.Module, mesh: DeviceMesh, group: TensorGroup) -> None:
    block.group = group  # type: ignore[assignment]
    for name, module in block.named_modules():
        if name in TABLE:
            place(module, "weight", mesh, TABLE[name])
            if TABLE[name] == 0:
                place(module, "bias", mesh, 0)
            else:  # each rank adds its share to its part of the sum
                module.passing = lambda bias: group.shared(bias) / mesh.size()
            assert isinstance(module, Linear)
            for change in module.companions:
                divide_change(change, TABLE[name], mesh, group)
        elif name in PER_HEAD or (name in BETWEEN and group.by_rows):
            module.passing = group.shared


def divide_change(change: Any, dim: int, mesh: DeviceMesh, group: TensorGroup) -> None:
    """Of a LoRA b goes with the outputs and a with the inputs of its map; each rank has the other whole."""
    divided, other = ("b", "a") if dim == 0 else ("a", "b")
    place(change, divided, mesh, dim)
    change.passing = {other: group.shared}


def place(module: nn.Module, name: str, mesh: DeviceMesh, dim: int) -> None:
    """Divide a parameter of a module along a dimension."""
    from torch.distributed.tensor import Shard, distribute_tensor  # who divides nothing does without

    whole = getattr(module, name)
    if whole is not None:
        divided = distribute_tensor(whole.detach(), mesh, [Shard(dim)], src_data_rank=None)
        setattr(module, name, nn.Parameter(divided, requires_grad=whole.requires_grad))


def refuse_uneven(block: c.Block, ranks: int) -> None:
    attentions = [block.attention] + ([block.cross] if block.cross else [])
    counts = [("heads", a.heads) for a in attentions] + [("heads of keys and values", a.kv) for a in attentions]
    for name, count in (*counts, ("hidden channels", block.ffn.hidden)):
        if count % ranks:
            fix = "give a number that divides them all"
            raise RonnaError(f"{count} {name} cannot be divided over {ranks} ranks", where="parallel.tensor", fix=fix)
