"""Prefix tuning (Li & Liang 2021): trained keys and values before those of every sequence, in every attention layer.

An encoder-decoder has them in the decoder's attention to itself alone, and positions of the text begin behind them:
this is what the `peft` library does with its past keys.

Legend: n keys of the prefix, N blocks, K key/value heads, D head size, m width of the network.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ronna.base.config import Config
from ronna.base.errors import RonnaError
from ronna.decoding.batch import inference
from ronna.model import attention
from ronna.model.config import room_beside
from ronna.model.init import generator
from ronna.model.sequences import Sequences
from ronna.model.transformer import Cache, Stack, Transformer
from ronna.peft.changes import Changed, attach


class PrefixConfig(Config):
    kind: Literal["prefix"] = "prefix"
    tokens: int = Field(20, ge=1, le=65_536)
    hidden: int | None = Field(
        None, ge=1
    )  # width of a network that makes them while they are trained; None: no network


class Prefix(nn.Module):
    """table: (n, N x 2 x K x D), of each block the keys of all heads and then the values."""

    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(tokens, width))

    def forward(self) -> Tensor:
        return self.table


class MadePrefix(nn.Module):
    """The paper's reparametrisation: the table is outer(tanh(inner(seeds))), seeds (n, m)."""

    def __init__(self, tokens: int, width: int, hidden: int):
        super().__init__()
        self.seeds = nn.Parameter(torch.empty(tokens, hidden))
        self.inner = nn.Linear(hidden, hidden)
        self.outer = nn.Linear(hidden, width)

    def forward(self) -> Tensor:
        table: Tensor = self.outer(torch.tanh(self.inner(self.seeds)))
        return table


class PrefixedStack(Stack, Changed):
    @property
    def ahead(self) -> int:
        return sum(tokens_of(self.changes[name]) for name in self.active)

    def prefix(self) -> list[attention.Prefix | None]:
        if not self.active:
            return [None] * len(self.blocks)
        table = torch.cat([self.changes[name]() for name in self.active])
        heads, size = layout(self)
        pairs = table.view(len(table), len(self.blocks), 2, heads, size).unbind(1)
        return [attention.Prefix(*pair.unbind(1)) for pair in pairs]


def tokens_of(made: nn.Module) -> int:
    return len(made.seeds if isinstance(made, MadePrefix) else made.table)  # type: ignore[arg-type]


def layout(stack: Stack) -> tuple[int, int]:
    """Key/value heads and their size, the same in every block."""
    first = stack.cfg.blocks[0].attention
    return first.kv, first.head_dim


def empty_prefix(model: Transformer, config: PrefixConfig) -> Prefix | MadePrefix:
    """Raises RonnaError for a model that has no room for it, and for one whose attention sees a window alone."""
    stack = model.last
    if any(block.attention.window is not None for block in stack.cfg.blocks):
        fix = "use prompt, lora or houlsby"
        raise RonnaError("prefix tuning of attention that sees a window alone", where="peft.kind", fix=fix)
    heads, size = layout(stack)
    if any((block.attention.kv, block.attention.head_dim) != (heads, size) for block in stack.cfg.blocks):
        raise RonnaError("prefix tuning of blocks that differ in their heads", where="peft.kind", fix="use lora")
    room_beside(config.tokens, model.max_length)
    width = len(stack.blocks) * 2 * heads * size
    return Prefix(config.tokens, width) if config.hidden is None else MadePrefix(config.tokens, width, config.hidden)


def add_prefix(model: Transformer, config: PrefixConfig, name: str, seed: int) -> None:
    """Attach a fresh prefix: what the attention of tokens drawn from the vocabulary has as keys and values.

    Where a network makes it, the network's weights are drawn as a new linear map's and its seeds from N(0, 1).
    """
    made = empty_prefix(model, config)
    if isinstance(made, Prefix):
        made.table.data = keys_and_values(model, config.tokens, seed).flatten(1)
    else:
        bound = made.inner.in_features**-0.5
        with torch.no_grad():
            for leaf, weight in made.named_parameters():
                rng = generator(seed, f"prefix.{leaf}")
                weight.normal_(generator=rng) if leaf == "seeds" else weight.uniform_(-bound, bound, generator=rng)
    attach(model.last, PrefixedStack, name, made)


def keys_and_values(model: Transformer, tokens: int, seed: int) -> Tensor:
    """(n, N, 2, K, D) fp32 of tokens drawn from the vocabulary, each of which reads those before it."""
    drawn = torch.randint(model.cfg.embedding.vocab, (tokens,), generator=generator(seed, "prefix"))
    drawn, cache, words = drawn.to(model.device), Cache(), Sequences.of([tokens], model.device)
    with inference(model):
        memory = model.encode(drawn, words) if model.encoder is not None and model.decoder is not None else None
        begin = model.placed(words, model.last, memory).reach - tokens
        model.hidden(drawn, words, memory=memory, cache=cache)
        found = [(layer.keys, layer.values) for layer in cache.layers]
        pairs = [torch.stack([kv[0, begin : begin + tokens] for kv in pair if kv is not None], 1) for pair in found]
        table = torch.stack(pairs, 1).float()
    return table.clone()  # which may have a gradient, unlike what was made in there
