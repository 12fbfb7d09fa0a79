"""Causal language modelling: every token from those before it in its own document."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ronna.base.config import Config
from ronna.model.loss import vocabulary_loss
from ronna.model.transformer import Transformer
from ronna.objectives.base import Batch, Loss, Sample, predicted_states
from ronna.objectives.documents import Piece


class CLMConfig(Config):
    kind: Literal["clm"] = "clm"


@dataclass(frozen=True)
class CausalLM:
    """Documents begin with `bos` and end with `eos`; a piece from the middle begins with the token before it."""

    bos: int
    eos: int

    overhead = 1  # the token put in front of each piece

    def samples(self, item: list[Piece], rng: np.random.Generator) -> list[Sample]:
        made = []
        for piece in item:
            first = self.bos if piece.before is None else piece.before
            last = self.eos if piece.after is None else piece.after
            tokens = np.concatenate([[first], piece.tokens])
            made.append(Sample(tokens, np.arange(len(tokens)), np.append(tokens[1:], last)))
        return made

    def counts(self, batch: Batch) -> dict[str, int]:
        assert batch.labels is not None
        return {"clm": len(batch.labels)}

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        assert model.head is not None and batch.labels is not None
        hidden = predicted_states(model, batch)
        total, correct = vocabulary_loss(model.head, hidden, batch.labels)
        return Loss({"clm": total}, {} if correct is None else {"clm_accuracy": correct})
