"""Context parallelism: each rank of a group has some of the rows of every text, for texts too long for one.

What looks at one token at a time needs nothing else. Attention does: before it ranks exchange rows of all heads for all
rows of some heads, and behind it the other way round (Ulysses, Jacobs et al. 2023), so that whatever a text, a mask or
a kernel is like, each rank has as much to do. The matrices lie in shards over these ranks too.

All that a rank computes of the ends of a model beside its own rows, it computes as all others do. So gradients are
those of the sum of as many losses as there are ranks, and are divided by that when they are added up.

Legend: R rows of a text's states, C channels, n ranks of the group.
"""

import math
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ronna.base.errors import RonnaError
from ronna.model import config as c
from ronna.model.group import Group
from ronna.model.transformer import Block, Transformer
from ronna.parallel.passes import PassingGroup, even, gathered, padded, part, scattered, to_channels, to_rows, total


class ContextGroup(PassingGroup):
    """inner: of the ranks that divide the matrices of each rank of this group, and maybe its rows once more."""

    def __init__(self, group: dist.ProcessGroup, inner: Group, rows: int):
        """rows: what their number is to be a multiple of."""
        self.group, self.inner, self.multiple = group, inner, rows
        self.size = inner.size

    def split(self, x: Tensor) -> Tensor:
        return self.inner.split(self.through(even(x, self.multiple), part, padded))

    def join(self, x: Tensor) -> Tensor:
        return self.through(self.inner.join(x), gathered, scattered)

    def heads(self, size: int, *maps: Tensor) -> tuple[Tensor, ...]:
        n = self.group.size()
        maps = tuple(enough(y.unflatten(1, (-1, size)), n, 1).flatten(1) for y in maps)
        widths = [y.shape[1] // n for y in maps]
        # One exchange of all: each rank's part of the first, of the second, ...
        together = [y.unflatten(1, (n, -1)) for y in maps]
        mixed = torch.cat(together, dim=2).flatten(1)
        return self.through(mixed, to_channels, to_rows).split(widths, dim=1)

    def rows(self, y: Tensor) -> Tensor:
        return self.through(even(y, self.multiple), to_rows, to_channels)

    def channels(self, table: Tensor) -> Tensor:
        n = self.group.size()
        return enough(table, n, -1).unflatten(-1, (n, -1))[..., self.group.rank(), :]

    def some(self, x: Tensor) -> Tensor:
        most = -(-len(x) // self.group.size())
        return x[most * self.group.rank() :][:most]

    def all_of(self, sums: Tensor) -> Tensor:
        return self.through(sums[None], total, total)[0]

    def into(self, x: Tensor) -> Tensor:
        return self.inner.into(x)

    def out(self, y: Tensor) -> Tensor:
        return self.inner.out(y)

    def total(self, x: Tensor) -> Tensor:
        return self.inner.total(x)

    def words(self, logits: Tensor, vocab: int) -> Tensor:
        return self.inner.words(logits, vocab)

    def reduced(self, x: Tensor, how: Literal["sum", "max", "min"]) -> Tensor:
        return self.inner.reduced(x, how)

    def shared(self, w: Tensor) -> Tensor:
        return self.inner.shared(w)


def enough(x: Tensor, ranks: int, dim: int) -> Tensor:
    """With as many copies of each head as every rank needs to have equally many."""
    heads = x.shape[dim]
    return x if heads % ranks == 0 else x.repeat_interleave(ranks // math.gcd(heads, ranks), dim)


def spread(model: Transformer, group: dist.ProcessGroup) -> None:
    """Let the ranks of the group have some of the rows each, of a model whose matrices may be divided already. Raises
    RonnaError where they cannot share the heads."""
    n = group.size()
    ends = [model.embedding] + ([model.head] if model.head is not None else [])
    for end in ends:
        end.group = ContextGroup(group, end.group, n)
    for stack in (model.encoder, model.decoder):
        if stack is None:
            continue
        multiple = n * stack.group.size
        alone, all_of_them = ContextGroup(group, Group(), multiple), ContextGroup(group, stack.group, multiple)
        for cfg in stack.cfg.blocks:
            refuse_few(cfg, multiple)
        stack.group = all_of_them
        if stack.bias is not None:
            stack.bias.group = alone
        for block in stack.blocks:
            if not isinstance(block, Block):  # another rank has it
                continue
            block.group = all_of_them
            block.attention.group = alone
            if block.cross is not None:
                block.cross.group = alone


def refuse_few(block: c.Block, ranks: int) -> None:
    for attention in (block.attention, block.cross):
        if attention is not None and attention.heads % ranks:
            what = f"{attention.heads} heads cannot be shared by {ranks} ranks"
            raise RonnaError(what, where="parallel.context", fix="give a number that divides them, tensor included")
