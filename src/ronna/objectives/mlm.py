"""Masked language modelling with or without next-sentence prediction (Devlin et al. 2019)."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from ronna.base.config import Config
from ronna.data.shards import Shards
from ronna.model.loss import vocabulary_loss
from ronna.model.transformer import Transformer
from ronna.objectives.base import Batch, Loss, Sample, last_states, predicted_states
from ronna.objectives.documents import Piece


class MLMConfig(Config):
    kind: Literal["mlm"] = "mlm"
    rate: float = Field(0.15, gt=0, lt=1)  # share of tokens to predict
    whole_word: bool = False
    nsp: bool = True


@dataclass(frozen=True)
class Vocabulary:
    """What masking must know of a tokenizer; the arrays are (V,) and boolean."""

    size: int
    cls: int
    sep: int
    mask: int
    special: np.ndarray
    continues_word: np.ndarray
    ends_sentence: np.ndarray

    @cached_property
    def ordinary(self) -> np.ndarray:
        """Ids that a random replacement may take."""
        return np.flatnonzero(~self.special)


@dataclass(frozen=True)
class MaskedLM:
    """A piece becomes [CLS] A [SEP], or with NSP [CLS] A [SEP] B [SEP] with B the sequel of A or, half of the time,
    as many tokens of another document."""

    config: MLMConfig
    vocabulary: Vocabulary
    documents: Shards | None = None  # to draw false sequels from; needed with NSP

    @property
    def overhead(self) -> int:
        return 3 if self.config.nsp else 2

    def samples(self, item: list[Piece], rng: np.random.Generator) -> list[Sample]:
        return [self.mask(self.pair(p, rng) if self.config.nsp else self.single(p), rng) for p in item]

    def single(self, piece: Piece) -> Sample:
        v = self.vocabulary
        tokens = np.concatenate([[v.cls], piece.tokens, [v.sep]])
        return Sample(tokens, segments=np.zeros_like(tokens))

    def pair(self, piece: Piece, rng: np.random.Generator) -> Sample:
        """Target 0: B follows A; 1: it does not (the labels that Hugging Face uses)."""
        v = self.vocabulary
        cut = self.cut(piece.tokens, rng)
        a, b = piece.tokens[:cut], piece.tokens[cut:]
        false = len(b) == 0 or rng.random() < 0.5
        if false:
            b = self.elsewhere(piece.document, max(1, len(b)), rng)
            a = a[: len(piece.tokens) - len(b)] if len(a) + len(b) > len(piece.tokens) and len(a) > 1 else a
        tokens = np.concatenate([[v.cls], a, [v.sep], b, [v.sep]])
        segments = np.zeros_like(tokens)
        segments[len(a) + 2 :] = 1
        return Sample(tokens, segments=segments, target=int(false))

    def cut(self, tokens: np.ndarray, rng: np.random.Generator) -> int:
        """Length of A: up to the end of a sentence, or of a word where the piece has one sentence only."""
        ends = np.flatnonzero(self.vocabulary.ends_sentence[tokens[:-1]]) + 1
        if len(ends) == 0:
            ends = np.flatnonzero(~self.vocabulary.continues_word[tokens[1:]]) + 1
        return int(rng.choice(ends)) if len(ends) else len(tokens)

    def elsewhere(self, document: int, length: int, rng: np.random.Generator) -> np.ndarray:
        """Tokens of another document, from the beginning of a sentence where one is near."""
        assert self.documents is not None
        lengths = self.documents.lengths
        other = int(rng.integers(len(lengths) - 1)) if len(lengths) > 1 else 0
        other += other >= document and len(lengths) > 1
        start = int(rng.integers(max(1, int(lengths[other]) - length)))
        span = self.documents.slice(other, start, min(int(lengths[other]), start + 2 * length)).astype(np.int64)
        ends = np.flatnonzero(self.vocabulary.ends_sentence[span[: max(0, len(span) - length)]])
        first = int(ends[0]) + 1 if len(ends) else 0
        return span[first : first + length]

    def mask(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """80% of the chosen tokens become [MASK], 10% a random token, 10% stay."""
        v, tokens = self.vocabulary, sample.tokens
        chosen = self.choose(tokens, rng)
        sample.predict, sample.labels = chosen, tokens[chosen]
        fate = rng.random(len(chosen))
        sample.tokens = tokens.copy()
        sample.tokens[chosen[fate < 0.8]] = v.mask
        swap = chosen[fate >= 0.9]
        sample.tokens[swap] = v.ordinary[rng.integers(len(v.ordinary), size=len(swap))]
        return sample

    def choose(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        v = self.vocabulary
        places = np.flatnonzero(~v.special[tokens])
        if len(places) == 0:
            return places
        want = max(1, round(self.config.rate * len(places)))
        if not self.config.whole_word:
            return np.sort(rng.permutation(places)[:want])
        word = np.cumsum(~v.continues_word[tokens[places]])
        _, word = np.unique(word, return_inverse=True)
        order = rng.permutation(word[-1] + 1)
        sizes = np.bincount(word)[order]
        picked = order[: max(1, int(np.searchsorted(np.cumsum(sizes), want, side="right")))]
        return places[np.isin(word, picked)]

    def counts(self, batch: Batch) -> dict[str, int]:
        assert batch.labels is not None
        counts = {"mlm": len(batch.labels)}
        return counts | {"nsp": len(batch.sequences)} if self.config.nsp else counts

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        assert model.head is not None and batch.labels is not None
        if not self.config.nsp:
            total, correct = vocabulary_loss(model.head, predicted_states(model, batch), batch.labels)
            return Loss({"mlm": total}, {} if correct is None else {"mlm_accuracy": correct})
        assert model.classifier is not None and batch.targets is not None and batch.predict is not None
        # Special tokens are never predicted, so no place is named twice.
        states = last_states(model, batch, torch.cat([batch.predict, batch.sequences.starts]))
        words, firsts = states.split([len(batch.predict), len(batch.sequences)])
        total, correct = vocabulary_loss(model.head, words, batch.labels)
        stats = {} if correct is None else {"mlm_accuracy": correct}
        scores = model.classifier(firsts, batch.sequences)
        nsp = F.cross_entropy(scores, batch.targets, reduction="sum")
        stats["nsp_accuracy"] = (scores.argmax(-1) == batch.targets).sum()
        return Loss({"mlm": total, "nsp": nsp}, stats)
