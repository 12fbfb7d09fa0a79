"""Activations that are not kept from the forward to the backward pass but computed again (Chen et al. 2016)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ronna.base.config import Config
from ronna.base.errors import RonnaError
from ronna.model.transformer import Block, Transformer

Count = Literal["all"] | Annotated[int, Field(ge=0)]


class Recompute(Config):
    """How many blocks keep nothing but what they read, and of how many more that is so for their feed-forward half.

    Blocks are counted from the first one on, an encoder's before a decoder's. A whole block costs its forward pass once
    more, a half that of its products but the last; gradients are the same to the bit, and so is dropout.
    """

    blocks: Count = 0
    feeds: Count = 0  # of the blocks behind those


def recompute_blocks(model: Transformer, config: Recompute) -> None:
    """Let blocks compute again, from now on, wherever a gradient is taken. Raises RonnaError where it has fewer."""
    blocks = [block for stack in (model.encoder, model.decoder) if stack is not None for block in stack.blocks]
    whole = counted(config.blocks, len(blocks), "blocks")
    for block in blocks[:whole]:
        block.forward = recomputed(block.forward)
    rest = blocks[whole:]
    for block in rest[: counted(config.feeds, len(rest), "feeds")]:
        if isinstance(block, Block):  # else another rank has it
            block.feed = recomputed(block.feed)  # type: ignore[method-assign]
            block.finish = None  # compiled as one, it would keep what it likes


@contextmanager
def recomputed_blocks(model: Transformer) -> Iterator[None]:
    """Inside, every block computes again, whichever did so before."""
    before = [(block, vars(block).get("forward")) for block in blocks_of(model)]
    recompute_blocks(model, Recompute(blocks="all"))
    try:
        yield
    finally:
        for block, own in before:
            del block.forward
            if own is not None:
                block.forward = own  # type: ignore[method-assign]


def blocks_of(model: Transformer) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


def counted(count: Count, there: int, field: str) -> int:
    if count != "all" and count > there:
        what = f"{count} blocks are asked for, there are {there}"
        raise RonnaError(what, where=f"train.recompute.{field}", fix=f'give at most {there}, or "all"')
    return there if count == "all" else count


def recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*inputs: Any, **named: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return function(*inputs, **named)
        found: Tensor = checkpoint(function, *inputs, use_reentrant=False, **named)
        return found

    return run
