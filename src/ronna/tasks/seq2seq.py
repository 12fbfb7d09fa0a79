"""Translation, summarization and whatever else turns one text into another.

An encoder-decoder reads the source; a decoder reads it before what it is to write, and learns the latter alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field

from ronna.base.config import Config, build
from ronna.base.errors import RonnaError
from ronna.data.badrows import BadRow
from ronna.data.sources import Record
from ronna.decoding.sampling import GenerateConfig
from ronna.model.config import Model
from ronna.model.transformer import Transformer
from ronna.objectives.base import Sample
from ronna.tasks.metrics import Scores
from ronna.tasks.ngrams import Cut, cut_of, metric_names, text_scores
from ronna.tasks.schema import Columns, Usual, find_columns, usable_text
from ronna.tasks.truncation import CUT, UNFIT, keep_rows
from ronna.tasks.writing import Ends, Example, Writing, Written
from ronna.text.tokenizer import Tokenizer

USUAL = Usual(
    texts=("source", "src", "text", "document", "article", "dialogue", "input", "question"),
    labels=("target", "tgt", "summary", "highlights", "translation", "output", "title", "answer"),
    called="source",
)


class Seq2SeqConfig(Config):
    kind: Literal["seq2seq"] = "seq2seq"
    prefix: str = ""  # in front of every source, such as T5's "summarize: "
    separator: str = "\n\n"  # between source and target, of a decoder
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    target_length: int | None = Field(None, ge=1)  # most tokens; None: train.length, of a decoder a quarter of it
    truncation: Literal["cut", "drop", "refuse"] = "cut"  # of long sources; a target is never cut
    monitor: Literal["bleu", "chrf", "rouge1", "rouge2", "rougel", "loss"] = "loss"  # picks the best checkpoint
    sample: int = Field(200, ge=1)  # held-out rows to write, greedily, at each evaluation during training
    decoding: GenerateConfig = GenerateConfig(beams=4)  # max_tokens: None is target_length


class Pair(NamedTuple):
    text: str
    label: str | None
    references: tuple[str, ...]  # what people wrote; the first is the label

    @property
    def key(self) -> str:
        return self.text


def references(record: Record, column: str) -> tuple[str, ...]:
    """The texts of a column, and of a `references` or `refs_COLUMN` beside it. Raises BadRow where there is none."""
    value = record.fields.get(column)
    for name in ("references", f"refs_{column}"):
        beside = record.fields.get(name)
        if isinstance(beside, list) and beside and all(isinstance(r, str) and r.strip() for r in beside):
            return tuple(dict.fromkeys([value, *beside] if isinstance(value, str) and value.strip() else beside))
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(v, str) and v.strip() for v in values):
        raise BadRow("target is not a text", f"{column} = {value!r}"[:200])
    return tuple(values)


@dataclass(frozen=True)
class Seq2Seq(Writing):
    """The task as an objective, and its way back to texts."""

    config: Seq2SeqConfig
    cut: Cut  # of the texts to write, for BLEU
    reads: bool = True  # whether an encoder reads the source
    start: int | None = None  # the decoder's first token then

    kind = "seq2seq"

    @classmethod
    def columns(
        cls, record: Record, *, text: str | None, pair: str | None, label: str | None, labelled: bool = True
    ) -> Columns:
        found = find_columns(record, text=text, pair=pair, label=label, need_label=labelled, usual=USUAL)
        if found.text == found.label:
            raise RonnaError(
                f"{found.text} cannot be both source and target",
                where=str(record.path),
                fix="name both: --text COLUMN --label COLUMN",
            )
        return found

    @classmethod
    def unfold(cls, record: Record) -> Iterator[Record]:
        """A record such as {"translation": {"en": ..., "de": ...}} is the one inside."""
        inner = record.fields.get("translation")
        yield record._replace(fields=inner) if isinstance(inner, dict) else record

    @classmethod
    def row(cls, record: Record, columns: Columns) -> Pair:
        text = usable_text(record, columns.text)
        found = references(record, columns.label) if columns.label else ()
        return Pair(text, found[0] if found else None, found)

    def rows(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Pair]:
        return [Pair(text, None, ()) for text in texts]

    @classmethod
    def learn(cls, config: Seq2SeqConfig, rows: Sequence[Pair], tokenizer: Tokenizer, length: int) -> Self:
        return cls(tokenizer, length, config, cut_of([row.label or "" for row in rows]))

    @classmethod
    def restore(cls, config: Mapping[str, Any], tokenizer: Tokenizer, length: int) -> Self:
        """By what `folder_keys` wrote; any other encoder-decoder is taken as it is."""
        said = (config.get("task_specific_params") or {}).get("seq2seq") or {"decoding": {}}
        own = build(Seq2SeqConfig, said, where="config.json: task_specific_params.seq2seq")
        return cls(tokenizer, length, own, "13a")

    def on(self, model: Model, config: Mapping[str, Any]) -> Self:
        super().on(model, config)
        if model.encoder is None:
            return replace(self, reads=False, start=None)
        start = config.get("decoder_start_token_id", self.tokenizer.pad_id)
        if start is None:
            fix = "use a tokenizer with a padding token, such as `--set tokenizer.specials=t5` trains"
            raise RonnaError("the tokenizer has no token to start a decoder with", where="model", fix=fix)
        return replace(self, reads=True, start=start)

    @property
    def title(self) -> str:
        return "texts to texts" if self.reads else "texts to texts, by continuing them"

    @property
    def folder_keys(self) -> dict[str, Any]:
        own = self.config.model_copy(update={"decoding": self.decoding})
        return super().folder_keys | {"task_specific_params": {"seq2seq": own.model_dump(mode="json")}}

    @property
    def ends(self) -> Ends:
        assert self.tokenizer.eos_id is not None
        return Ends(self.start, (self.tokenizer.eos_id,))

    @property
    def decoding(self) -> GenerateConfig:
        own = self.config.decoding
        return own if own.max_tokens else own.model_copy(update={"max_tokens": self.target_length})

    @property
    def target_length(self) -> int:
        return self.config.target_length or (self.length if self.reads else self.length // 4)

    @property
    def smoothing(self) -> float:
        return self.config.label_smoothing

    # From rows to examples

    def prompts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Uncut. A source ends as the tokenizer ends texts; what a decoder is to continue stays open."""
        prefixed = [self.config.prefix + text for text in texts]
        if self.reads:
            return self.tokenizer.encode_batch(prefixed, add_special=True)
        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        between = self.tokenizer.encode(self.config.separator)
        return [np.concatenate([bos, ids, between]).astype(np.int32) for ids in self.tokenizer.encode_batch(prefixed)]

    def encode(
        self, rows: Sequence[Pair], accounts: dict[str, int] | None = None, *, training: bool = False
    ) -> list[Example]:
        """Tokenize. Long sources are cut, dropped or refused; a target is never cut, so rows with a long one are not
        learnt (and are counted)."""
        prompts = self.prompts([row.text for row in rows])
        targets = self.tokenizer.for_targets().encode_batch([row.label or "" for row in rows])
        tail = len(self.tokenizer.around[1]) if self.reads else len(self.tokenizer.encode(self.config.separator))
        room = self.length if self.reads else self.length - self.target_length
        if room <= tail:
            raise RonnaError(f"{self.length} tokens leave no room for a source", where="train.length", fix="raise it")
        unfit = [len(target) + 1 > self.target_length for target in targets]
        long = {CUT: [len(prompt) > room for prompt in prompts], UNFIT: unfit}
        kept = keep_rows(self.config.truncation, long, room, accounts, training=training)
        examples = []
        for row, prompt, target, unlearnt in compress(zip(rows, prompts, targets, unfit, strict=True), kept):
            if len(prompt) > room:
                prompt = np.concatenate([prompt[: room - tail], prompt[len(prompt) - tail :]])
            sample = None if row.label is None or unlearnt else self.sample(prompt, target)
            examples.append(Example(prompt, sample, row.label or "", row.references))
        return examples

    def sample(self, prompt: np.ndarray, target: np.ndarray) -> Sample:
        labels = np.append(target, self.ends.eos[0])
        if self.reads:
            return Sample(np.concatenate([[self.start], target]), np.arange(len(labels)), labels, source=prompt)
        return Sample(np.concatenate([prompt, target]), np.arange(len(labels)) + len(prompt) - 1, labels)

    # Measures

    @property
    def monitor(self) -> str:
        return "loss" if self.config.monitor == "loss" else metric_names(self.cut)[self.config.monitor]

    def judge(self, model: Transformer, examples: Sequence[Example]) -> dict[str, float]:
        """The loss of all, and what a greedy decoding of the first rows is worth."""
        nats, tokens = self.nats(model, examples)
        some = examples[: self.config.sample]
        made = self.answers(model, some, GenerateConfig(beams=1))
        measured = self.measure(some, Written(made, nats, tokens)).metrics
        values = {n: m.value for n, m in measured.items() if m.value is not None} | {"loss": nats / max(1, tokens)}
        return {self.monitor: values[self.monitor], **values}

    def measure(self, examples: Sequence[Example], scores: Written) -> Scores:
        said = [g.text or "" for g in scores.made]
        cut = cut_of([e.text for e in examples])
        return text_scores(said, [e.references or (e.text,) for e in examples], cut)
