"""Named entities: a tag for every word, read at the word's first token, and the entities that the tags mean.

Legend: W words, K tags, M words of a batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import log_softmax
from torch import Tensor

from ronna.base.config import Config
from ronna.base.errors import RonnaError
from ronna.data.sources import Record
from ronna.model.config import Classifier, Model
from ronna.model.families import Family, classifier_for, label_names
from ronna.model.transformer import Transformer
from ronna.objectives.base import Batch, Loss, Sample, collate, encoded
from ronna.tasks.base import Task, like_lengths
from ronna.tasks.metrics import Scores, span_scores
from ronna.tasks.schema import Columns, Usual, find_columns
from ronna.tasks.tags import Rules, Scheme, Span, best_tags, rules_of, spans_of, tag_names, tags_of
from ronna.tasks.truncation import WINDOWED, count, keep_rows
from ronna.tasks.words import Sentence, joined, read_sentence, words_of
from ronna.text.tokenizer import EncodedWords, Tokenizer

USUAL = Usual(
    texts=("tokens", "words", "text", "sentence", "content"),
    labels=("tags", "ner_tags", "entities", "spans", "labels", "label", "ner"),
)
OVERLAP = 4  # a window shares this part of its tokens with the next


class TagConfig(Config):
    kind: Literal["tag"] = "tag"
    scheme: Scheme = "bio"  # the tags that are learnt; data may have others
    truncation: Literal["window", "drop", "refuse"] = "window"  # of sentences longer than train.length


class Piece(NamedTuple):
    """A window of a sentence: what the model reads, and at which places it tags which words."""

    tokens: np.ndarray  # (L,)
    places: np.ndarray  # (n,)
    words: np.ndarray  # (n,)


class Example(NamedTuple):
    pieces: list[Piece]
    words: int  # W; a word without a token is in no piece
    target: np.ndarray | None  # (W,) tag ids
    spans: tuple[Span, ...] | None


@dataclass(frozen=True)
class Tag(Task):
    """The task as an objective, and its way back from scores to entities."""

    config: TagConfig
    tokenizer: Tokenizer
    labels: list[str]
    length: int

    kind = "tag"
    monitor = "f1"

    @classmethod
    def row(cls, record: Record, columns: Columns) -> Sentence:
        return read_sentence(record, columns)

    @classmethod
    def columns(
        cls, record: Record, *, text: str | None, pair: str | None, label: str | None, labelled: bool = True
    ) -> Columns:
        if pair is not None:
            raise RonnaError("entities are found in one text", where="data.text_pair", fix="leave it out")
        return find_columns(record, text=text, pair=None, label=label, need_label=labelled, usual=USUAL)

    @classmethod
    def learn(cls, config: TagConfig, rows: Sequence[Sentence], tokenizer: Tokenizer, length: int) -> Self:
        types = sorted({span.type for row in rows for span in row.label or ()})
        if not types:
            raise RonnaError("the training data has no entity", where="data.train", fix="look at its tags")
        return cls(config, tokenizer, tag_names(types, config.scheme), length)

    @classmethod
    def restore(cls, config: Mapping[str, Any], tokenizer: Tokenizer, length: int) -> Self:
        labels = label_names(config)
        try:
            rules_of(labels)
            labels.index("O")
        except ValueError as error:
            fix = "give a folder whose id2label has BIO, BIOES, BMES or BILOU tags"
            raise RonnaError(str(error), where="config.json: id2label", fix=fix) from None
        return cls(TagConfig(), tokenizer, labels, length)

    @property
    def score_names(self) -> list[str]:
        return self.labels

    @property
    def title(self) -> str:
        return f"entities of {len(self.types)} types ({', '.join(self.types[:12])}{', ...' * (len(self.types) > 12)})"

    @property
    def types(self) -> list[str]:
        return list(dict.fromkeys(label[2:] for label in self.labels if label != "O"))

    @property
    def rules(self) -> Rules:
        return rules_of(self.labels)

    def classifier(self, family: Family, model: Model) -> Classifier:
        return classifier_for(family, model, len(self.labels), "tokens")

    def rows(self, texts: Sequence[str | Sequence[str]], pairs: Sequence[str] | None) -> list[Sentence]:
        if pairs is not None:
            raise RonnaError("entities are found in one text", fix="give no second texts")
        return [Sentence(t, tuple(words_of(t)), None, False) if isinstance(t, str) else joined(t) for t in texts]

    def check_labels(self, rows: Sequence[Sentence], where: str) -> None:
        known = set(self.types)
        for row in rows:
            for span in row.label or ():
                if span.type not in known:
                    raise RonnaError(
                        f"entity type {span.type!r} is not among those of the training data ({', '.join(self.types)})",
                        where=where,
                        fix="correct it, or add training rows that have it",
                    )

    # From rows to examples

    def encode(
        self, rows: Sequence[Sentence], accounts: dict[str, int] | None = None, *, training: bool = False
    ) -> list[Example]:
        """Tokenize by words; a sentence over the length becomes windows that overlap, or is dropped or refused."""
        examples = []
        for at in range(0, len(rows), 1024):
            some = rows[at : at + 1024]
            tokens = self.tokenizer.encode_words([r.text for r in some], [r.words for r in some])
            examples += [self.example(row, t) for row, t in zip(some, tokens, strict=True)]
        long = {WINDOWED: [len(example.pieces) > 1 for example in examples]}
        kept = keep_rows(self.config.truncation, long, self.length, accounts, training=training)
        count(accounts, {"entities that began with I": [row.repaired for row in rows]})
        return list(compress(examples, kept))

    def example(self, row: Sentence, tokens: EncodedWords) -> Example:
        target = None
        if row.label is not None:
            tags = tags_of(row.label, len(row.words), self.scheme)
            known = {label: i for i, label in enumerate(self.labels)}
            if known.keys() >= set(tags):  # not so where a folder brings labels of a scheme of its own
                target = np.array([known[tag] for tag in tags], dtype=np.int64)
        return Example(list(self.pieces(tokens)), len(row.words), target, row.label)

    @property
    def scheme(self) -> Scheme:
        return "bioes" if any(label[0] in "ESLU" for label in self.labels if label != "O") else "bio"

    def pieces(self, tokens: EncodedWords) -> Iterator[Piece]:
        before, after = self.tokenizer.around
        room = self.length - len(before) - len(after)
        ids, word = tokens.ids, tokens.word
        first = np.flatnonzero(np.diff(word, prepend=-1))  # the first token of each word
        for start, end, own in windows(first, len(ids), room):
            places = first[own] - start + len(before)
            yield Piece(np.concatenate([before, ids[start:end], after]), places, word[first[own]])

    def samples(self, item: Example, rng: np.random.Generator) -> list[Sample]:
        assert item.target is not None
        return [Sample(p.tokens, predict=p.places, labels=item.target[p.words]) for p in item.pieces]

    # Loss, scores, answers

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"tag": 0 if batch.predict is None else len(batch.predict)}

    def scores(self, model: Transformer, batch: Batch) -> Tensor:
        """(M, K) in fp32."""
        return model.scores(batch.tokens, batch.sequences, batch.segments, encoded(model, batch), at=batch.predict)

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        assert batch.labels is not None
        return Loss({"tag": F.cross_entropy(self.scores(model, batch), batch.labels, reduction="sum")})

    @torch.inference_mode()
    def infer(self, model: Transformer, examples: Sequence[Example], batch_tokens: int = 8192) -> list[np.ndarray]:
        """Log probabilities (W, K) of each example, zeros for a word without a token."""
        model.eval()
        scores = [np.zeros((e.words, len(self.labels)), np.float32) for e in examples]
        pieces = [(i, piece) for i, e in enumerate(examples) for piece in e.pieces]
        for indices in like_lengths([len(p.tokens) for _, p in pieces], batch_tokens):
            some = [pieces[i] for i in indices]
            batch = collate(self, [Sample(p.tokens, predict=p.places) for _, p in some], model.device)
            found = log_softmax(self.scores(model, batch).cpu().numpy(), axis=-1)
            ends = np.cumsum([len(p.places) for _, p in some])
            for (i, p), rows in zip(some, np.split(found, ends[:-1]), strict=True):
                scores[i][p.words] = rows
        return scores

    def mean_loss(self, examples: Sequence[Example], scores: Sequence[np.ndarray]) -> float:
        total = sum(s[np.arange(len(s)), e.target].sum() for e, s in zip(examples, scores, strict=True))
        return -float(total) / max(1, sum(e.words for e in examples))

    def measure(self, examples: Sequence[Example], scores: Sequence[np.ndarray]) -> Scores:
        paths = best_tags(scores, self.rules)
        found = [spans_of([self.labels[i] for i in path])[0] for path in paths]
        return span_scores([e.spans or () for e in examples], found, self.types)

    def decode(
        self, rows: Sequence[Sentence], examples: Sequence[Example], scores: Sequence[np.ndarray]
    ) -> list[dict[str, Any]]:
        """The entities: by characters of a text, or by words where words were given, then with all tags too."""
        answers = []
        for row, s, path in zip(rows, scores, best_tags(scores, self.rules), strict=True):
            tags = [self.labels[i] for i in path]
            sure = s[np.arange(len(path)), path]
            entities = [self.entity(row, span, sure) for span in spans_of(tags)[0]]
            answers.append({"entities": entities} | ({"tags": tags} if row.given else {}))
        return answers

    def entity(self, row: Sentence, span: Span, sure: np.ndarray) -> dict[str, Any]:
        """`probability` is the geometric mean over its words, and so of one scale for short and long ones."""
        start, end = row.words[span.start][0], row.words[span.end - 1][1]
        place = {"words": [span.start, span.end]} if row.given else {"start": start, "end": end}
        probability = round(float(np.exp(sure[span.start : span.end].mean())), 6)
        return {"type": span.type, "text": row.text[start:end], **place, "probability": probability}


def windows(first: np.ndarray, tokens: int, room: int) -> Iterator[tuple[int, int, slice]]:
    """Cut `tokens` into windows [start, end) of at most `room` at the beginnings of words, each with its own words.

    Neighbours overlap by a quarter, and a word there belongs to the window that shows more around it. A word of more
    than `room` tokens shows its first ones.
    """
    ends = np.append(first[1:], tokens)
    at = own = 0  # the window's first word, and the first word that no window has
    while own < len(first):
        limit = first[at] + room
        last = max(at + 1, int(np.searchsorted(ends, limit, side="right")))  # behind the window's last word
        end = int(min(ends[last - 1], limit))
        if last == len(first):
            yield int(first[at]), end, slice(own, last)
            return
        following = max(at + 1, int(np.searchsorted(first, end - room // OVERLAP)))
        middle = (following + last + 1) // 2
        yield int(first[at]), end, slice(own, middle)
        at, own = following, middle
