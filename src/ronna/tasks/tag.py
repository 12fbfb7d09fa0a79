"""Named entities: a tag for every word, read at the word's first token, and the entities that the tags mean.

Legend: W words, K tags, M words of a batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from ronna.model.sequences import Sequences
from ronna.model.transformer import Transformer
from ronna.objectives.base import Batch, Loss, Sample, collate, encoded
from ronna.tasks.base import Task
from ronna.tasks.crf import Chains, Steps, batched, marginals, negative_log_likelihood
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
    crf: bool = False  # learn which tags follow which, and score a sentence's tags as a whole


class Piece(NamedTuple):
    """A window of a sentence: what the model reads, and at which places it tags which words."""

    tokens: np.ndarray  # (L,)
    places: np.ndarray  # (n,)
    words: np.ndarray  # (n,)
    ends: tuple[bool, bool]  # whether the sentence begins in it, and ends


class Example(NamedTuple):
    pieces: list[Piece]
    words: int  # W; a word without a token is in no piece
    target: np.ndarray | None  # (W,) tag ids; those of the words with tokens are a legal sequence
    spans: tuple[Span, ...] | None

    @property
    def seen(self) -> np.ndarray:
        """The words with tokens, in order."""
        return np.concatenate([p.words for p in self.pieces]) if self.pieces else np.zeros(0, np.int64)


class WordScores(NamedTuple):
    """What the model says of N sentences."""

    words: list[np.ndarray]  # log probabilities (W, K) of each, zeros for a word without a token
    transitions: np.ndarray | None = None  # (K + 2, K) of a conditional random field


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
        return cls(TagConfig(crf=bool(config.get("tag_transitions"))), tokenizer, labels, length)

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
        return replace(classifier_for(family, model, len(self.labels), "tokens"), transitions=self.config.crf)

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
            seen = np.unique(tokens.word)
            if len(seen) < len(tags):  # an entity then begins and ends at words that the model sees
                kept = tags_of(spans_of([tags[i] for i in seen])[0], len(seen), self.scheme)
                legal = dict(zip(seen.tolist(), kept, strict=True))
                tags = [legal.get(i, "O") for i in range(len(tags))]
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
            ends = (own.start == 0, own.stop == len(first))
            yield Piece(np.concatenate([before, ids[start:end], after]), places, word[first[own]], ends)

    def items(self, example: Example) -> list[Example]:
        return [example._replace(pieces=[piece]) for piece in example.pieces]

    def samples(self, item: Example, rng: np.random.Generator) -> list[Sample]:
        assert item.target is not None
        return [
            Sample(p.tokens, predict=p.places, labels=item.target[p.words], target=p.ends if self.config.crf else None)
            for p in item.pieces
        ]

    # Loss, scores, answers

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"tag": 0 if batch.predict is None else len(batch.predict)}

    def scores(self, model: Transformer, batch: Batch) -> Tensor:
        """(M, K) in fp32."""
        return model.scores(batch.tokens, batch.sequences, batch.segments, encoded(model, batch), at=batch.predict)

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        assert batch.labels is not None
        scores = self.scores(model, batch)
        transitions = None if model.classifier is None else model.classifier.transitions
        if transitions is None or not len(scores):
            return Loss({"tag": F.cross_entropy(scores, batch.labels, reduction="sum")})
        steps = Steps.of(transitions, self.rules)
        return Loss({"tag": negative_log_likelihood(scores, batch.labels, chains(batch), steps).sum()})

    def infer(self, model: Transformer, examples: Sequence[Example]) -> WordScores:
        scores = [np.zeros((e.words, len(self.labels)), np.float32) for e in examples]
        pieces = [(i, piece) for i, e in enumerate(examples) for piece in e.pieces]

        def scores_of(indices: list[int]) -> list[np.ndarray]:
            some = [pieces[i][1] for i in indices]
            batch = collate(self, [Sample(p.tokens, predict=p.places) for p in some], model.device)
            found = log_softmax(self.scores(model, batch).cpu().numpy(), axis=-1)
            return np.split(found, np.cumsum([len(p.places) for p in some])[:-1])

        found = self.each(model, [len(p.tokens) for _, p in pieces], scores_of)
        for (i, piece), rows in zip(pieces, found, strict=True):
            scores[i][piece.words] = rows
        transitions = None if model.classifier is None else model.classifier.transitions
        # A copy: what numpy has looked at cannot be let go of by a model in shards.
        return WordScores(scores, None if transitions is None else transitions.detach().float().cpu().clone().numpy())

    def mean_loss(self, examples: Sequence[Example], scores: WordScores) -> float:
        words = max(1, sum(e.words for e in examples))
        if scores.transitions is None:
            found = zip(examples, scores.words, strict=True)
            return -float(sum(s[np.arange(len(s)), e.target].sum() for e, s in found)) / words
        seen = [e.seen for e in examples]
        total = 0.0
        for some, rows, of in batched([s[w] for s, w in zip(scores.words, seen, strict=True)]):
            tags = np.concatenate([examples[i].target[seen[i]] for i in some])  # type: ignore[index]
            steps = Steps.of(torch.from_numpy(scores.transitions), self.rules)
            total += float(negative_log_likelihood(rows, torch.from_numpy(tags), of, steps).sum())
        return total / words

    def sure(self, scores: WordScores) -> list[np.ndarray]:
        """The log probability of each tag at each word (W, K)."""
        found = list(scores.words)
        if scores.transitions is not None:
            steps = Steps.of(torch.from_numpy(scores.transitions), self.rules)
            for some, rows, of in batched(found):
                p = marginals(rows, of, steps).clamp_min(torch.finfo(torch.float32).tiny).log()
                for i, own in zip(some, p.split(of.words.lengths.tolist()), strict=True):
                    found[i] = own.numpy()
        return found

    def measure(self, examples: Sequence[Example], scores: WordScores) -> Scores:
        paths = best_tags(scores.words, self.rules, scores.transitions)
        found = [spans_of([self.labels[i] for i in path])[0] for path in paths]
        return span_scores([e.spans or () for e in examples], found, self.types)

    def decode(self, rows: Sequence[Sentence], examples: Sequence[Example], scores: WordScores) -> list[dict[str, Any]]:
        """The entities: by characters of a text, or by words where words were given, then with all tags too."""
        answers = []
        paths = best_tags(scores.words, self.rules, scores.transitions)
        for row, s, path in zip(rows, self.sure(scores), paths, strict=True):
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


def chains(batch: Batch) -> Chains:
    """The words of a batch by its sentences and windows; a window may have none."""
    assert batch.predict is not None and batch.targets is not None
    lengths = torch.bincount(batch.sequences.owner[batch.predict], minlength=len(batch.sequences)).cpu()
    return Chains(Sequences(lengths[lengths > 0], device=batch.predict.device), batch.targets[lengths > 0])


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
