"""Prompt tuning (Lester et al. 2021): virtual tokens before every text, whose embeddings alone are trained.

An encoder-decoder has them before the source, as the paper's T5. They take the positions from 0 on, the text follows
them, and a classifier pools them with the text, so that the first state is the first virtual token's: this is what
the `peft` library does.

Legend: n virtual tokens, C channels.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ronna.base.config import Config
from ronna.base.errors import RonnaError
from ronna.model.config import room_beside
from ronna.model.init import generator
from ronna.model.transformer import Embedding, Transformer
from ronna.peft.changes import Changed, attach


class PromptConfig(Config):
    kind: Literal["prompt"] = "prompt"
    tokens: int = Field(20, ge=1, le=65_536)


class Prompt(nn.Module):
    """vectors: (n, C), in the place of token embeddings: positions are added to them, norms applied."""

    def __init__(self, tokens: int, dim: int):
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(tokens, dim))


class PromptedEmbedding(Embedding, Changed):
    def virtual(self) -> Tensor | None:
        prompts: list[Tensor] = [
            prompt.vectors for name in self.active if isinstance(prompt := self.changes[name], Prompt)
        ]
        return torch.cat(prompts) if prompts else None


def empty_prompt(model: Transformer, tokens: int) -> Prompt:
    """Raises RonnaError for a model that has no room for it, or that scales its embeddings."""
    if model.embedding.cfg.scale != 1.0:
        # The peft library hands transformers its text unscaled too, so no folder would mean the same to both.
        fix = "use lora or houlsby"
        raise RonnaError("prompt tuning of a model that scales its embeddings", where="peft.kind", fix=fix)
    room_beside(tokens, model.max_length)
    return Prompt(tokens, model.embedding.dim)


def add_prompt(model: Transformer, config: PromptConfig, name: str, seed: int) -> None:
    """Attach a fresh prompt: the embeddings of tokens drawn from the vocabulary."""
    prompt, table = empty_prompt(model, config.tokens), model.embedding.tokens.weight.detach()
    with torch.no_grad():
        drawn = torch.randint(len(table), (config.tokens,), generator=generator(seed, "embedding.prompt"))
        prompt.vectors.copy_(table[drawn.to(table.device)])
    attach(model.embedding, PromptedEmbedding, name, prompt)
