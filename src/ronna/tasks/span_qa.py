"""Extractive question answering: which run of a context's tokens answers a question, or that none does.

Legend: M places of a batch that may be a start or an end, B windows, n places of one window.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, islice
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from scipy.special import logsumexp
from torch import Tensor

from ronna.base.config import Config
from ronna.base.errors import RonnaError
from ronna.data.badrows import BadRow
from ronna.data.sources import Record
from ronna.model.config import Classifier, Model
from ronna.model.families import Family, classifier_for
from ronna.model.transformer import Transformer
from ronna.objectives.base import Batch, Loss, Sample, collate, encoded
from ronna.tasks.answers import best_of, counting_of
from ronna.tasks.base import Task
from ronna.tasks.metrics import Scores, mean_scores
from ronna.tasks.schema import Columns, Usual, find_columns, usable_text
from ronna.tasks.truncation import CUT, UNFIT, WINDOWED, count, keep_rows
from ronna.text.tokenizer import Encoded, Tokenizer

USUAL = Usual(
    texts=("question", "query"),
    pairs=("context", "passage", "paragraph", "document"),
    labels=("answers", "answer"),
    called="question",
)


class SpanQAConfig(Config):
    kind: Literal["span_qa"] = "span_qa"
    overlap: int = Field(128, ge=0)  # tokens that a window of a long context shares with the next, half of it at most
    question: int = Field(64, ge=1)  # tokens of a question that are read
    answer: int = Field(30, ge=1)  # tokens of an answer at most
    truncation: Literal["window", "drop", "refuse"] = "window"  # of contexts with no room beside their question; a long
    # question is cut, dropped or refused


Found = list[list[np.ndarray]]  # of every example, of every window: scores (n, 2)


class Answer(NamedTuple):
    text: str
    start: int  # character of the context


class Question(NamedTuple):
    text: str
    context: str
    label: tuple[Answer, ...] | None  # none at all: the context does not answer it

    @property
    def key(self) -> str:
        return f"{self.context}\0{self.text}"


class Window(NamedTuple):
    """What the model reads, where an answer may begin and end, and the characters of these places.

    The first place is the window's first token, which stands for "no answer here".
    """

    tokens: np.ndarray  # (L,)
    segments: np.ndarray  # (L,)
    places: np.ndarray  # (n,)
    offsets: np.ndarray  # (n, 2)
    target: tuple[int, int] | None  # indices among the places


class Example(NamedTuple):
    question: Question
    windows: list[Window]

    @property
    def unfit(self) -> bool:
        """Whether there is an answer, and no window has it whole."""
        return bool(self.question.label) and all(w.target == (0, 0) for w in self.windows)


def unfold(record: Record) -> Iterator[Record]:
    """Questions, each with its context, out of a SQuAD file, one of its articles or one of its paragraphs."""
    fields = record.fields
    for inner, alone in (("data", "paragraphs"), ("paragraphs", "context"), ("qas", "question")):
        if isinstance(fields.get(inner), list):
            rest = {name: value for name, value in fields.items() if name != inner}
            for part in fields[inner]:  # what is no object is left for the reader of rows to refuse
                yield from unfold(record._replace(fields=rest | (part if isinstance(part, dict) else {alone: part})))
            return
    yield record


def read_question(record: Record, columns: Columns) -> Question:
    """Raises BadRow for a record without question and context, and for answers that the context does not have."""
    question, context = usable_text(record, columns.text), usable_text(record, columns.pair or "context")
    if columns.label is None:
        return Question(question, context, None)
    if columns.label not in record.fields:
        raise BadRow("no label", f"{columns.label} is missing")
    found = () if record.fields.get("is_impossible") is True else answers(record.fields[columns.label])
    return Question(question, context, tuple(placed(text, start, context) for text, start in found))


def answers(value: Any) -> list[tuple[Any, Any]]:
    """Text and start of each: SQuAD's list of objects, the lists side by side of `datasets`, or a text alone."""
    match value:
        case None | "" | []:
            return []
        case str():
            return [(value, None)]
        case {"text": list(texts)}:
            starts = value.get("answer_start", [None] * len(texts))
            if not isinstance(starts, list) or len(starts) != len(texts):
                raise BadRow("answers and their starts differ in number", f"{value!r}"[:200])
            return list(zip(texts, starts, strict=True))
        case {"text": str(text)}:
            return [(text, value.get("answer_start", value.get("start")))]
        case list():
            return [pair for one in value for pair in answers(one)]
    raise BadRow("answer is not a text", f"{value!r}"[:200])


def placed(text: Any, start: Any, context: str) -> Answer:
    if not isinstance(text, str) or not text.strip():
        raise BadRow("answer is not a text", repr(text)[:200])
    if not isinstance(start, int) or start < 0:
        start = context.find(text)
        if start < 0:
            raise BadRow("answer not in the context", text[:200])
    if context[start : start + len(text)] != text:
        raise BadRow("wrong answer_start", f"{text!r}, there it is {context[start : start + len(text)]!r}"[:200])
    return Answer(text, start)


@dataclass(frozen=True)
class SpanQA(Task):
    """The task as an objective, and its way back from scores to answers."""

    config: SpanQAConfig
    tokenizer: Tokenizer
    length: int
    optional: bool  # whether a question may have no answer

    kind = "span_qa"
    monitor = "f1"

    @classmethod
    def unfold(cls, record: Record) -> Iterator[Record]:
        return unfold(record)

    @classmethod
    def row(cls, record: Record, columns: Columns) -> Question:
        return read_question(record, columns)

    @classmethod
    def columns(
        cls, record: Record, *, text: str | None, pair: str | None, label: str | None, labelled: bool = True
    ) -> Columns:
        columns = find_columns(record, text=text, pair=pair, label=label, need_label=labelled, usual=USUAL)
        if columns.pair is None:
            what = f"no column looks like a context; the columns are {', '.join(record.fields)}"
            raise RonnaError(what, where=str(record.path), fix="name it: --set data.text_pair=COLUMN")
        return columns

    @classmethod
    def learn(cls, config: SpanQAConfig, rows: Sequence[Question], tokenizer: Tokenizer, length: int) -> Self:
        return cls(config, tokenizer, length, any(row.label == () for row in rows))

    @classmethod
    def restore(cls, config: Mapping[str, Any], tokenizer: Tokenizer, length: int) -> Self:
        return cls(SpanQAConfig(), tokenizer, length, config.get("no_answer") is True)

    @property
    def score_names(self) -> list[str]:
        return ["start", "end"]

    @property
    def title(self) -> str:
        return "answers in a context" + (", or none" if self.optional else "")

    @property
    def folder_keys(self) -> dict[str, Any]:
        return {"no_answer": self.optional}

    def classifier(self, family: Family, model: Model) -> Classifier:
        return classifier_for(family, model, 2, "spans")

    def rows(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Question]:
        if pairs is None:
            raise RonnaError("a question needs its context", fix="give the contexts as the second texts")
        return [Question(text, context, None) for text, context in zip(texts, pairs, strict=True)]

    # From rows to examples

    def encode(
        self, rows: Sequence[Question], accounts: dict[str, int] | None = None, *, training: bool = False
    ) -> list[Example]:
        """Tokenize; a long context becomes windows, or is dropped or refused. An answer that no window holds whole is
        counted, and not learnt."""
        examples: list[Example] = []
        cut: list[bool] = []
        for at in range(0, len(rows), 512):
            some = rows[at : at + 512]
            found = self.tokenizer.encode_with_offsets([r.text for r in some], [r.context for r in some])
            examples += [Example(row, list(self.windows(row, e))) for row, e in zip(some, found, strict=True)]
            cut += [int((e.text_index == 0).sum()) > self.config.question for e in found]
        long = {WINDOWED: [len(e.windows) > 1 for e in examples], CUT: cut}
        kept = keep_rows(self.config.truncation, long, self.length, accounts, training=training)
        examples = list(compress(examples, kept))
        count(accounts, {UNFIT: [e.unfit for e in examples]})
        return examples

    def windows(self, row: Question, e: Encoded) -> Iterator[Window]:
        asked, read = np.flatnonzero(e.text_index == 0), np.flatnonzero(e.text_index == 1)
        if not len(read):
            return
        kept = np.ones(len(e.ids), dtype=bool)
        kept[asked[self.config.question :]] = False
        head, tail = kept[: read[0]].nonzero()[0], np.arange(read[-1] + 1, len(e.ids))
        room = self.length - len(head) - len(tail)
        if room < 2:
            raise RonnaError(
                f"{self.length} tokens have no room for a context beside its question",
                where="train.length",
                fix="raise it, or lower task.question",
            )
        step = room - min(self.config.overlap, room // 2)
        for start in range(0, max(1, len(read) - room + step), step):
            part = read[start : start + room]
            places = np.concatenate([[0], len(head) + np.arange(len(part))])
            offsets = np.concatenate([[[0, 0]], e.offsets[part]])
            order = np.concatenate([head, part, tail])
            target = None if row.label is None else self.target(row.label, offsets)
            yield Window(e.ids[order], e.segments[order], places, offsets, target)

    def target(self, label: Sequence[Answer], offsets: np.ndarray) -> tuple[int, int]:
        """Where the first given answer begins and ends among the places; 0, 0 where it is not whole in the window."""
        if label:
            start, end = label[0].start, label[0].start + len(label[0].text)
            inside = (offsets[:, 1] > start) & (offsets[:, 0] < end)
            inside[0] = False
            found = np.flatnonzero(inside)
            if len(found) and offsets[found[0], 0] <= start and offsets[found[-1], 1] >= end:
                return int(found[0]), int(found[-1])
        return 0, 0

    def items(self, example: Example) -> list[Example]:
        return [] if example.unfit else [example._replace(windows=[w]) for w in example.windows]

    def samples(self, item: Example, rng: np.random.Generator) -> list[Sample]:
        return [Sample(w.tokens, predict=w.places, segments=w.segments, target=w.target) for w in item.windows]

    # Loss, scores, answers

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"span": len(batch.sequences)}

    def scores(self, model: Transformer, batch: Batch) -> tuple[Tensor, list[int]]:
        """(M, 2) in fp32, of a start and an end at each place, and how many places each window has."""
        assert batch.predict is not None
        scores = model.scores(batch.tokens, batch.sequences, batch.segments, encoded(model, batch), at=batch.predict)
        places = torch.bincount(batch.sequences.owner[batch.predict], minlength=len(batch.sequences))
        return scores, places.tolist()

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        """Mean of the two cross entropies of start and end, over the places of each window."""
        assert batch.targets is not None
        scores, places = self.scores(model, batch)
        rows = torch.nn.utils.rnn.pad_sequence(list(scores.split(places)), batch_first=True, padding_value=-1e9)
        both = F.cross_entropy(rows.transpose(1, 2).flatten(0, 1), batch.targets.flatten(), reduction="sum")
        return Loss({"span": both / 2})

    def infer(self, model: Transformer, examples: Sequence[Example]) -> Found:
        """Scores (n, 2) of every window of every example."""
        windows = [window for e in examples for window in e.windows]

        def scores_of(indices: list[int]) -> list[np.ndarray]:
            some = [windows[i] for i in indices]
            samples = [Sample(w.tokens, predict=w.places, segments=w.segments) for w in some]
            scores, places = self.scores(model, collate(self, samples, model.device))
            return [part.numpy() for part in scores.cpu().split(places)]

        found = iter(self.each(model, [len(w.tokens) for w in windows], scores_of))
        return [list(islice(found, len(e.windows))) for e in examples]

    def mean_loss(self, examples: Sequence[Example], scores: Found) -> float:
        """Over the windows that training would see."""
        total, count = 0.0, 0
        for example, windows in zip(examples, scores, strict=True):
            if example.unfit:
                continue
            for window, s in zip(example.windows, windows, strict=True):
                assert window.target is not None
                total += float(sum(logsumexp(s[:, k]) - s[window.target[k], k] for k in (0, 1))) / 2
                count += 1
        return total / max(1, count)

    def measure(self, examples: Sequence[Example], scores: Found) -> Scores:
        counting = counting_of([e.question.context for e in examples])
        pairs = []
        for example, windows in zip(examples, scores, strict=True):
            said = self.best(example, windows)["answer"]
            pairs.append(best_of(said, [a.text for a in example.question.label or ()], counting))
        how = {"squad": "words, as SQuAD counts them", "cmrc": "characters, as CMRC 2018 counts them"}[counting]
        values = np.array(pairs)
        return mean_scores({"exact_match": values[:, 0], "f1": values[:, 1]}, notes=(f"over {how}",))

    def decode(self, rows: Sequence[Question], examples: Sequence[Example], scores: Found) -> list[dict[str, Any]]:
        """The answer with its place in the context, empty where there is none."""
        return [self.best(example, s) for example, s in zip(examples, scores, strict=True)]

    def best(self, example: Example, scores: Sequence[np.ndarray]) -> dict[str, Any]:
        """The best span over all windows; `probability` is its share among all spans, and no answer if that may be."""
        every: list[np.ndarray] = []
        top, place = -np.inf, (0, 0, 0)
        for w, s in enumerate(scores):
            starts, ends = s[1:, 0], s[1:, 1]
            for d in range(min(self.config.answer, len(starts))):
                sums = starts[: len(starts) - d] + ends[d:]
                every.append(sums)
                i = int(sums.argmax())
                if sums[i] > top:
                    top, place = float(sums[i]), (w, i + 1, i + 1 + d)
        if self.optional:
            none = min((float(s[0].sum()) for s in scores), default=0.0)  # sure of nothing in every window
            every.append(np.array([none]))
            top, place = (none, (0, 0, 0)) if none >= top else (top, place)
        if not every:
            return {"answer": "", "probability": 0.0}
        probability = round(float(np.exp(top - logsumexp(np.concatenate(every)))), 6)
        w, first, last = place
        if first == 0:
            return {"answer": "", "probability": probability}
        start, end = int(example.windows[w].offsets[first, 0]), int(example.windows[w].offsets[last, 1])
        text = example.question.context[start:end]
        start += len(text) - len(text.lstrip())
        text = text.strip()
        return {"answer": text, "start": start, "end": start + len(text), "probability": probability}
