"""Pipeline parallelism: each rank of a group has some of the blocks, and micro-batches go through them in turn (Huang
et al. 2019), as soon as possible back again (1F1B, Narayanan et al. 2019), and several times round the group where
ranks have several runs of blocks (Narayanan et al. 2021).

All ranks of a group have the same micro-batches, so each knows what will come to it, and they may be as unequal as
texts are. What stands around the blocks lies in shards over the group too. In training only the first and the last rank
compute with it, else all do alike, with what comes out of the last block. An objective needs to know nothing of this:
where it asks for the last states and they are computed elsewhere, `Handed` ends its turn.

Legend: P ranks, K runs of blocks a rank, M micro-batches, R rows that a block computes on, C channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ronna.base.errors import RonnaError
from ronna.model.boxes import is_sharded, local
from ronna.model.sequences import Reads, Sequences
from ronna.model.transformer import Cache, Memory, Stack, Transformer
from ronna.parallel.world import World


class Turn(NamedTuple):
    """What a rank does next: a micro-batch's way through one of its runs of blocks, or back."""

    chunk: int
    micro: int
    forward: bool


def in_order(micros: int) -> list[Turn]:
    """Of a rank that has all blocks."""
    return [Turn(0, i, forward) for i in range(micros) for forward in (True, False)]


def one_forward_one_backward(rank: int, ranks: int, chunks: int, micros: int) -> list[Turn]:
    """The order of a rank of P. Where micro-batches are no multiple of the ranks, several runs of blocks cannot be
    worked off by turns: then all go forward before the first one goes back."""
    total = chunks * micros
    if chunks > 1 and micros % ranks:
        order = [(chunk, micro) for chunk in range(chunks) for micro in range(micros)]
        warm = total
    else:
        order = [(k // ranks % chunks, k // (ranks * chunks) * ranks + k % ranks) for k in range(total)]
        ahead = ranks - rank - 1
        warm = min(total, ahead if chunks == 1 else 2 * ahead + (chunks - 1) * ranks)
    there = [Turn(chunk, micro, True) for chunk, micro in order]
    back = [Turn(chunks - 1 - chunk, micro, False) for chunk, micro in order]
    turns = there[:warm]
    for pair in zip(there[warm:], back, strict=False):
        turns += pair
    return turns + back[total - warm :]


def bounds(blocks: int, stages: int) -> list[range]:
    """Blocks of each stage, which differ by one at most."""
    return [range(blocks * i // stages, blocks * (i + 1) // stages) for i in range(stages)]


class Handed(Exception):
    """The states have gone to the next rank. `on` stands for the rest of the way: its gradient, whatever it is, lets
    that of the states come back."""

    def __init__(self, on: Tensor):
        self.on = on


class Pipe:
    """A rank's place among those that micro-batches go through, and whose turn it is on it."""

    def __init__(self, world: World, blocks: int):
        assert world.pipe is not None and world.pipe_back is not None
        # Each way has a group of its own, or what goes one way would wait for what goes the other.
        self.onward, self.back = world.pipe, world.pipe_back
        self.peers = dist.get_process_group_ranks(self.onward)
        self.rank, self.ranks, self.chunks = world.stage, world.pipeline, world.chunks
        self.parts = bounds(blocks, self.ranks * self.chunks)[self.rank :: self.ranks]
        self.chunk, self.closing = 0, False
        self.under_way = list[tuple[dist.Work, Tensor]]()

    @property
    def first(self) -> bool:
        """Whether the blocks whose turn it is begin the model."""
        return self.rank == 0 and self.chunk == 0

    @property
    def last(self) -> bool:
        return self.rank == self.ranks - 1 and self.chunk == self.chunks - 1

    def turns(self, micros: int) -> list[Turn]:
        return one_forward_one_backward(self.rank, self.ranks, self.chunks, micros)

    def send(self, x: Tensor, group: dist.ProcessGroup, steps: int) -> None:
        """To the rank so many steps further on, which may come for it later."""
        x = x.detach().contiguous()
        work = dist.isend(x, self.peers[(self.rank + steps) % self.ranks], group=group)
        assert work is not None
        self.under_way.append((work, x))
        self.settle(waiting(self.ranks, self.chunks))

    def receive(self, room: Tensor, group: dist.ProcessGroup, steps: int) -> Tensor:
        dist.recv(room, self.peers[(self.rank + steps) % self.ranks], group=group)
        return room

    def settle(self, most: int = 0) -> None:
        """Wait until no more than so many of the tensors sent have not arrived."""
        while len(self.under_way) > most:
            work, _ = self.under_way.pop(0)
            work.wait()

    def from_last(self, x: Tensor) -> Tensor:
        """What the last rank has, which all go on with."""
        dist.broadcast(x, self.peers[-1], group=self.onward)
        return x


def waiting(ranks: int, chunks: int) -> int:
    """Tensors that a rank may have sent and nobody come for: no order of turns needs more."""
    return 2 * ranks * chunks


class Hand(torch.autograd.Function):
    """States go to the next rank; what is left is a zero, with whose gradient that of the states comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pipe: Pipe) -> Tensor:
        ctx.pipe, ctx.like = pipe, (x.shape, x.dtype, x.device)
        pipe.send(x, pipe.onward, 1)
        return x.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        shape, dtype, device = ctx.like
        return ctx.pipe.receive(torch.empty(shape, dtype=dtype, device=device), ctx.pipe.back, 1), None


class Take(torch.autograd.Function):
    """States that the rank before sends; their gradient goes back there. `root` is any tensor that has a gradient."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, room: Tensor, pipe: Pipe) -> Tensor:
        ctx.pipe = pipe
        return pipe.receive(room, pipe.onward, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.pipe.send(gradient, ctx.pipe.back, -1)
        return None, None, None


class Beside(torch.autograd.Function):
    """States as they are; tensors that nothing was made of get a gradient of zeros, as other ranks have one of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.likes = [(t.shape, t.dtype, t.device) for t in tensors]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros(s, dtype=dtype, device=device) for s, dtype, device in ctx.likes)


class Elsewhere(nn.Module):
    """In the place of a block that another rank has."""


class Part(Stack):
    """Of the blocks those whose turn it is."""

    pipe: Pipe

    def forward(
        self,
        x: Tensor,
        sequences: Sequences,
        memory: Memory | None = None,
        cache: Cache | None = None,
        reads: Reads | None = None,
    ) -> Tensor:
        x = self.enter(x, sequences) if self.pipe.first else x
        x = self.through(x, self.pipe.parts[self.pipe.chunk], sequences, memory, cache, reads)
        return self.leave(x, sequences, reads) if self.pipe.last else x


class Piped(Transformer):
    """A model whose blocks lie on the ranks of a pipeline."""

    pipe: Pipe

    def embed(self, tokens: Tensor, sequences: Sequences, segments: Tensor | None = None) -> Tensor:
        if self.pipe.first:
            return super().embed(tokens, sequences, segments)
        with torch.no_grad():
            room = torch.empty(sequences.tokens, self.cfg.dim, dtype=self.compute, device=tokens.device)
            room = self.last.group.split(sequences.widen(room))
        root = torch.empty((), requires_grad=torch.is_grad_enabled())
        taken: Tensor = Take.apply(root, room, self.pipe)
        return taken

    def states(
        self,
        tokens: Tensor,
        sequences: Sequences,
        segments: Tensor | None,
        memory: Memory | None,
        cache: Cache | None,
        at: Tensor | None,
    ) -> Tensor:
        x = super().states(tokens, sequences, segments, memory, cache, at if self.pipe.last else None)
        if torch.is_grad_enabled() and self.pipe.closing:
            around = [local(p) for n, p in self.named_parameters() if ".blocks." not in n and p.requires_grad]
            x = Beside.apply(x, *around)
        return x


def cut(model: Transformer, world: World) -> None:
    """Leave a rank its blocks of a model that all ranks have. Raises RonnaError where there are too few of them, or two
    stacks."""
    if model.encoder is not None and model.decoder is not None:
        fix = "leave it out; parallel.tensor and shards divide these as well"
        raise RonnaError("an encoder-decoder has no pipeline", where="parallel.pipeline", fix=fix)
    stack, stages = model.last, world.pipeline * world.chunks
    if len(stack.blocks) < stages:
        what = f"{len(stack.blocks)} blocks cannot lie in {stages} parts"
        raise RonnaError(what, where="parallel.pipeline", fix="give fewer ranks or chunks")
    pipe = Pipe(world, len(stack.blocks))
    here = {i for part in pipe.parts for i in part}
    for i in range(len(stack.blocks)):
        if i not in here:
            stack.blocks[i] = Elsewhere()
    stack.__class__, model.__class__ = Part, Piped
    stack.pipe = model.pipe = pipe  # type: ignore[assignment]


def pass_on(model: Transformer) -> None:
    """Let the last states of a model that has been cut and put in shards be handed on where they are not the last,
    or, where no gradient is taken, come to all ranks."""
    assert isinstance(model, Piped)
    pipe, states = model.pipe, model.states

    def on_its_way(tokens: Tensor, sequences: Sequences, *more: Any) -> Tensor:
        if torch.is_grad_enabled():
            x = states(tokens, sequences, *more)
            if pipe.last:
                return x
            raise Handed(Hand.apply(x, pipe))
        for chunk in range(pipe.chunks):
            pipe.chunk = chunk
            x = states(tokens, sequences, *more)
            if not pipe.last:
                pipe.send(x, pipe.onward, 1)
        pipe.settle()
        at: Tensor | None = more[-1]
        if not pipe.last:
            x = x.new_empty(sequences.tokens if at is None else len(at), model.cfg.dim)
        return pipe.from_last(x)

    model.states = on_its_way  # type: ignore[assignment]


@contextmanager
def turning(model: Transformer, turn: Turn, turns: list[Turn]) -> Iterator[None]:
    """Inside it is this one's turn. What stands around the blocks stays whole until the last of them, whose gradients
    are then added up."""
    if isinstance(model, Piped):
        pipe, closes = model.pipe, turn == turns[-1]
        pipe.chunk, pipe.closing = turn.chunk, turn[:2] == turns[-1][:2]
        if is_sharded(model):
            model.set_is_last_backward(closes)
            model.set_requires_gradient_sync(closes, recurse=False)
            model.set_reshard_after_backward(closes, recurse=False)
    yield
    if isinstance(model, Piped) and turn == turns[-1]:
        model.pipe.settle()


def turns_of(model: Transformer, micros: int) -> list[Turn]:
    return model.pipe.turns(micros) if isinstance(model, Piped) else in_order(micros)


def stages_of(model: Transformer) -> dist.ProcessGroup | None:
    """The ranks that have the other blocks of a model, where there are some."""
    return model.pipe.onward if isinstance(model, Piped) else None


def absent(model: Transformer) -> tuple[str, ...]:
    """What names of parameters begin with that other ranks have."""
    return tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, Elsewhere))


def learning(model: Transformer) -> list[str]:
    """Names of the parameters that learn, those that other ranks have among them."""
    there = [name for name in whole_state(model) if name.startswith(away)] if (away := absent(model)) else []
    return [name for name, p in model.named_parameters() if p.requires_grad] + there


def whole_state(model: Transformer) -> dict[str, Tensor]:
    """The state of all blocks, on "meta" that of those that other ranks have."""
    with torch.device("meta"):
        held = model.embedding.tokens.weight.dtype
        there = Transformer(model.cfg).to(held).state_dict() if isinstance(model, Piped) else {}
    return there | model.state_dict()
