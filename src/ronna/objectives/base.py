"""What the training loop asks of an objective, and the one way samples become a batch.

Legend: T flat tokens, B sequences, M predicted positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import nan
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor

from ronna.model.sequences import Sequences
from ronna.model.transformer import Memory, Transformer


@dataclass
class Sample:
    """One sequence as numpy arrays; `predict` are the places in it whose hidden state must give `labels`."""

    tokens: np.ndarray
    predict: np.ndarray | None = None
    labels: np.ndarray | None = None
    segments: np.ndarray | None = None
    source: np.ndarray | None = None  # what an encoder-decoder reads
    target: Any = None  # of the whole sequence: a class, a score, a row of label flags


@dataclass(frozen=True)
class Batch:
    """Samples laid end to end. `counts` says over how many items each term of the loss is a mean."""

    tokens: Tensor  # (T,)
    sequences: Sequences
    counts: dict[str, int] = field(default_factory=dict)
    segments: Tensor | None = None  # (T,)
    predict: Tensor | None = None  # (M,) indices into the flat tokens
    labels: Tensor | None = None  # (M,)
    source: Tensor | None = None
    source_sequences: Sequences | None = None
    targets: Tensor | None = None  # (B,) or (B, labels)
    stands_in: bool = False  # computed as other ranks wait for this one to compute something; adds nothing

    @property
    def real_tokens(self) -> int:
        return 0 if self.stands_in else len(self.tokens) + (0 if self.source is None else len(self.source))

    @property
    def computed_positions(self) -> int:
        """Cells of the rectangles that attention works on where it needs rectangles."""
        views = [s.packed for s in (self.sequences, self.source_sequences) if s and not self.stands_in]
        return sum(v.rows * v.columns for v in views)

    def standing_in(self) -> "Batch":
        return replace(self, counts=dict.fromkeys(self.counts, 0), stands_in=True)


@dataclass(frozen=True)
class Loss:
    """Each term of the loss as a sum, not a mean; `stats` are sums worth reporting (correct predictions)."""

    sums: dict[str, Tensor]
    stats: dict[str, Tensor] = field(default_factory=dict)

    def nothing(self) -> dict[str, Tensor]:
        """Its sums and statistics over nothing."""
        return {name: torch.zeros_like(value) for name, value in (self.sums | self.stats).items()}


@dataclass
class Totals:
    """Sums of losses and statistics, and over how many items each is a mean; a statistic is named `term_...`.

    Sums stay tensors until they are read, so that nothing waits for the device before that.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, sums: dict[str, Tensor], counts: dict[str, int]) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        for name, n in counts.items():
            self.counts[name] = self.counts.get(name, 0) + n

    def means(self) -> dict[str, float]:
        """Each mean (nan over nothing), and `loss`, the sum of the terms'."""
        counts = {name: self.counts[name.split("_")[0]] for name in self.sums}
        means = {name: float(total) / counts[name] if counts[name] else nan for name, total in self.sums.items()}
        return {"loss": sum(means[term] for term in self.counts if self.counts[term]), **means}


class Objective(Protocol):
    """Turns an item of the data into samples, and a model's view of a batch into a loss."""

    def samples(self, item: Any, rng: np.random.Generator) -> list[Sample]: ...

    def counts(self, batch: Batch) -> dict[str, int]: ...

    def loss(self, model: Transformer, batch: Batch) -> Loss: ...


class WholeBatch(Objective, Protocol):
    """An objective whose loss is of all sequences of a step together, by one vector of each; micro-batches then share
    it (see `ronna.train.loop.cached_gradients`)."""

    def vectors(self, model: Transformer, batch: Batch) -> Tensor:
        """(B, C)"""
        ...

    def loss_of(self, vectors: Tensor, batches: Sequence[Batch]) -> Loss:
        """Of the vectors of all batches, in order."""
        ...


def of_whole_batch(objective: Objective) -> TypeGuard[WholeBatch]:
    """What an objective says of itself as `whole_batch`; False where it says nothing."""
    return getattr(objective, "whole_batch", False)


def collate(objective: Objective, samples: Sequence[Sample], device: torch.device | str = "cpu") -> Batch:
    """Lay samples end to end. Optional fields must be present in all samples or in none."""
    lengths = np.array([len(s.tokens) for s in samples], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    first = samples[0]

    def join(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)

    def joined(name: str) -> Tensor | None:
        return None if getattr(first, name) is None else join([getattr(s, name) for s in samples])

    predict = targets = source_sequences = None
    if first.predict is not None:
        predict = join([s.predict + start for s, start in zip(samples, starts, strict=True)])
    if first.target is not None:
        targets = torch.from_numpy(np.asarray([s.target for s in samples])).to(device)
    if first.source is not None:
        source_sequences = Sequences.of([len(s.source) for s in samples], device)  # type: ignore[arg-type]
    batch = Batch(
        tokens=join([s.tokens for s in samples]),
        sequences=Sequences(torch.from_numpy(lengths), device=device),
        segments=joined("segments"),
        predict=predict,
        labels=joined("labels"),
        source=joined("source"),
        source_sequences=source_sequences,
        targets=targets,
    )
    return replace(batch, counts=objective.counts(batch))


def encoded(model: Transformer, batch: Batch) -> Memory | None:
    """What the encoder of an encoder-decoder makes of the batch's sources."""
    if batch.source is None or batch.source_sequences is None:
        return None
    return model.encode(batch.source, batch.source_sequences)


def last_states(model: Transformer, batch: Batch, at: Tensor | None = None) -> Tensor:
    """The last stack's hidden states of a batch, (T, C) or (M, C) at the places `at`."""
    return model.hidden(batch.tokens, batch.sequences, batch.segments, encoded(model, batch), at=at)


def predicted_states(model: Transformer, batch: Batch) -> Tensor:
    """Hidden states (M, C) of the positions to predict."""
    assert batch.predict is not None
    return last_states(model, batch, batch.predict)
