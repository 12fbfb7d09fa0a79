"""Span denoising: spans of the text are cut out and written by the decoder (Raffel et al. 2020, section 3.1.4)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from ronna.base.config import Config
from ronna.model.loss import vocabulary_loss
from ronna.model.transformer import Transformer
from ronna.objectives.base import Batch, Loss, Sample, predicted_states
from ronna.objectives.documents import Piece


class DenoiseConfig(Config):
    kind: Literal["denoise"] = "denoise"
    rate: float = Field(0.15, gt=0, lt=1)  # share of tokens cut out
    span: float = Field(3.0, ge=1)  # mean length of what is cut out, tokens


def partition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """`parts` positive lengths that sum to `total`, all such splits equally likely."""
    cuts = np.sort(rng.permutation(total - 1)[: parts - 1] + 1)
    return np.diff(np.concatenate([[0], cuts, [total]]))


@dataclass(frozen=True)
class Denoise:
    """Source: the text with each cut replaced by its sentinel. Target: each sentinel followed by what it stands for."""

    config: DenoiseConfig
    sentinels: tuple[int, ...]
    start: int  # the decoder's first input token
    eos: int

    overhead = 1  # the end mark of the source

    def samples(self, item: list[Piece], rng: np.random.Generator) -> list[Sample]:
        return [self.sample(piece.tokens, rng) for piece in item if len(piece.tokens) >= 2]

    def sample(self, tokens: np.ndarray, rng: np.random.Generator) -> Sample:
        n = len(tokens)
        noise = min(max(1, round(n * self.config.rate)), n - 1)
        spans = min(max(1, round(noise / self.config.span)), noise, n - noise, len(self.sentinels))
        cut, kept = partition(noise, spans, rng), partition(n - noise, spans, rng)
        source: list[np.ndarray] = []
        target: list[np.ndarray] = []
        at = 0
        for i in range(spans):
            mark = np.array([self.sentinels[i]])
            source += [tokens[at : at + kept[i]], mark]
            at += kept[i]
            target += [mark, tokens[at : at + cut[i]]]
            at += cut[i]
        labels = np.concatenate([*target, [self.eos]])
        inputs = np.concatenate([[self.start], labels[:-1]])
        return Sample(inputs, np.arange(len(labels)), labels, source=np.concatenate([*source, [self.eos]]))

    def counts(self, batch: Batch) -> dict[str, int]:
        assert batch.labels is not None
        return {"denoise": len(batch.labels)}

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        assert model.head is not None and batch.labels is not None
        hidden = predicted_states(model, batch)
        total, correct = vocabulary_loss(model.head, hidden, batch.labels)
        return Loss({"denoise": total}, {} if correct is None else {"denoise_accuracy": correct})
