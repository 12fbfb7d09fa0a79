"""What tasks whose answers are text have in common: a prompt to read, a text to learn to write, and decoding.

Legend: L tokens, M predicted positions.
"""

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from ronna.base.errors import RonnaError
from ronna.decoding.among import turns
from ronna.decoding.decode import Generation, generate
from ronna.decoding.sampling import GenerateConfig
from ronna.model.config import Model
from ronna.model.families import Family
from ronna.model.loss import vocabulary_loss
from ronna.model.transformer import Transformer
from ronna.objectives.base import Batch, Loss, Sample, collate, predicted_states
from ronna.tasks.base import Task, like_lengths
from ronna.text.tokenizer import Tokenizer


class Ends(NamedTuple):
    """Tokens that a written text begins after and ends with."""

    start: int | None  # the decoder's first, of an encoder-decoder
    eos: tuple[int, ...]  # any of them ends a text; the first is the one to learn


class Example(NamedTuple):
    """A prompt, and what the training reads: `sample` is None where nobody has said what to write, or too much."""

    prompt: np.ndarray  # (L,) ids
    sample: Sample | None
    text: str  # what is to be written, "" where nobody has said
    references: tuple[str, ...] = ()


class Written(NamedTuple):
    """What a model wrote after each example's prompt (nothing, where it was not asked to), and how well it predicts
    the `tokens` that it was to write."""

    made: list[Generation]
    nats: float
    tokens: int


@dataclass(frozen=True)
class Writing(Task):
    """An objective on the tokens to write, and decoding after the prompt."""

    tokenizer: Tokenizer
    length: int

    writes = True

    @property
    @abstractmethod
    def ends(self) -> Ends: ...

    @property
    @abstractmethod
    def decoding(self) -> GenerateConfig:
        """How to write, where nobody says otherwise."""

    @abstractmethod
    def prompts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of what the model reads before it writes, for plain texts."""

    def on(self, model: Model, config: Mapping[str, Any]) -> Self:
        if model.decoder is None or model.head is None:
            fix = "fine-tune a GPT or T5 folder, or a preset such as transformer-tiny"
            raise RonnaError(f"the task {self.kind} needs a model with a decoder", where="model.name", fix=fix)
        if self.tokenizer.eos_id is None:
            fix = "use a tokenizer with one, such as `ronna tokenizer train --kind bpe`"
            raise RonnaError("the tokenizer has no token to end a text with", where="model", fix=fix)
        return self

    def classifier(self, family: Family, model: Model) -> None:
        """None: the vocabulary head is all it needs."""

    @property
    def folder_keys(self) -> dict[str, Any]:
        return {} if self.ends.start is None else {"decoder_start_token_id": self.ends.start}

    def folder_files(self, model: Model) -> dict[str, str]:
        """What transformers decodes with by itself."""
        own = self.decoding
        said: dict[str, Any] = {
            "num_beams": own.beams,
            "length_penalty": own.length_penalty,
            "no_repeat_ngram_size": own.no_repeat_ngram,
            "repetition_penalty": own.repetition_penalty,
            "early_stopping": own.early_stopping,
            "max_new_tokens": own.max_tokens,
            "eos_token_id": list(self.ends.eos),
            "pad_token_id": self.tokenizer.pad_id,
            "decoder_start_token_id": self.ends.start,
        }
        text = json.dumps({key: value for key, value in said.items() if value is not None}, indent=2) + "\n"
        return {"generation_config.json": text}

    # An objective

    def samples(self, item: Example, rng: np.random.Generator) -> list[Sample]:
        return [] if item.sample is None else [item.sample]

    def counts(self, batch: Batch) -> dict[str, int]:
        assert batch.labels is not None
        return {self.term: len(batch.labels)}

    @property
    def term(self) -> str:
        return self.kind.replace("_", "")

    @property
    def smoothing(self) -> float:
        return 0.0

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        assert model.head is not None and batch.labels is not None
        smoothing = self.smoothing if torch.is_grad_enabled() else 0.0
        total, _ = vocabulary_loss(model.head, predicted_states(model, batch), batch.labels, smoothing)
        return Loss({self.term: total})

    def preview(self, examples: Sequence[Example]) -> list[tuple[str, bool]]:
        sample = next((e.sample for e in examples if e.sample is not None), None)
        if sample is None or sample.predict is None or sample.labels is None:
            return []
        ids = np.append(sample.tokens, sample.labels[-1])
        learnt = np.zeros(len(ids), bool)
        learnt[sample.predict + 1] = True
        pieces = [] if sample.source is None else [(self.tokenizer.decode(sample.source, skip_special=False), False)]
        edges = np.flatnonzero(np.diff(learnt)) + 1
        for some, said in zip(np.split(ids, edges), np.split(learnt, edges), strict=True):
            pieces.append((self.tokenizer.decode(some, skip_special=False), bool(said[0])))
        return pieces

    # From prompts to texts

    def nats(self, model: Transformer, examples: Sequence[Example]) -> tuple[float, int]:
        """Summed negative log-likelihood of what is to be written, and over how many tokens."""
        samples = [e.sample for e in examples if e.sample is not None]
        sizes = [len(s.tokens) + (0 if s.source is None else len(s.source)) for s in samples]
        total, tokens = 0.0, 0
        model.eval()
        with torch.inference_mode():
            for indices, own in turns(list(like_lengths(sizes, self.batch_tokens)), self.among):
                batch = collate(self, [samples[i] for i in indices], model.device)
                nats = float(self.loss(model, batch).sums[self.term])
                total, tokens = (total + nats, tokens + batch.counts[self.term]) if own else (total, tokens)
        every = torch.cat(self.among.from_parts(torch.tensor([[total, tokens]], dtype=torch.float64)))
        return float(every[:, 0].sum()), int(every[:, 1].sum())

    def write(
        self, model: Transformer, prompts: Sequence[np.ndarray], config: GenerateConfig | None = None
    ) -> list[Generation]:
        """What the model writes after each prompt; what `config` says wins over the task's own decoding."""
        said = {} if config is None else config.model_dump(exclude_unset=True)
        return generate(
            model,
            [p.tolist() for p in prompts],
            GenerateConfig(**{**self.decoding.model_dump(), **said}),
            eos=self.ends.eos,
            start=self.ends.start,
            decode=self.tokenizer.decode,
            among=self.among,
        )

    def answers(
        self, model: Transformer, examples: Sequence[Example], config: GenerateConfig | None = None
    ) -> list[Generation]:
        """What the model writes for each; nothing where a prompt fills all its positions, or more: one row of many
        must not end an evaluation."""
        return self.write(model, [e.prompt[: model.max_length] for e in examples], config)

    def infer(self, model: Transformer, examples: Sequence[Example]) -> Written:
        nats, tokens = self.nats(model, examples)
        return Written(self.answers(model, examples), nats, tokens)

    def mean_loss(self, examples: Sequence[Example], scores: Written) -> float:
        return scores.nats / scores.tokens if scores.tokens else nan

    def decode(self, rows: Sequence[Any], examples: Sequence[Example], scores: Written) -> list[dict[str, Any]]:
        return [{"text": g.text, "finish": g.finish, "score": g.score} for g in scores.made]
