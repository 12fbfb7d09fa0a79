"""Relations: what two marked entities of a text are to each other.

The markers stand around the entities in what the model reads, and the states at the two opening ones are scored
together (entity start, Baldini Soares et al. 2019). Markers are rare tokens that the vocabulary has already, of which
Zhou and Chen (2021) found that they serve as well as new ones: nothing has to be added to model or tokenizer.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ronna.base.config import Config
from ronna.base.errors import RonnaError
from ronna.data.badrows import BadRow
from ronna.data.sources import Record
from ronna.model.config import Classifier, Model
from ronna.model.families import Family, classifier_for, label_names
from ronna.model.transformer import Transformer
from ronna.objectives.base import Batch, Loss, Sample, collate, encoded
from ronna.tasks.base import Task
from ronna.tasks.labels import check_known, label_name, usable_label
from ronna.tasks.losses import cross_entropy
from ronna.tasks.metrics import Scores, relation_scores
from ronna.tasks.schema import Columns, Usual, find_columns, usable_text
from ronna.tasks.truncation import CUT, keep_rows
from ronna.tasks.words import Extent
from ronna.text.tokenizer import EncodedWords, Tokenizer

USUAL = Usual(texts=("text", "sentence", "tokens", "content"), labels=("relation", "label", "labels", "class", "type"))
MARKED = re.compile(r"<(/?)e([12])>")
SPANS = (("e1", "e2"), ("head", "tail"), ("subject", "object"), ("h", "t"))  # fields of records with offsets
# Markers in the order of preference: each must be one token of its own.
CANDIDATES = ("@", "#", "$", "*", "^", "~", "|", "§", "¤", "%", "&", "=", "+")


class RelationConfig(Config):
    kind: Literal["relation"] = "relation"
    truncation: Literal["cut", "drop", "refuse"] = "cut"  # over train.length; cut is what is farthest from the entities


class Pair(NamedTuple):
    text: str
    first: Extent
    second: Extent
    label: Any

    @property
    def key(self) -> str:
        return f"{self.text}\0{self.first}{self.second}"


class Marked(NamedTuple):
    """What the model reads of a row, in pieces, and which of them open the first and the second entity."""

    text: str
    pieces: list[Extent]
    opening: list[int]


class Example(NamedTuple):
    tokens: np.ndarray  # (L,)
    places: np.ndarray  # (2,) the opening markers
    target: int | None


def read_pair(record: Record, columns: Columns) -> Pair:
    """Raises BadRow for a record without a text that has two marked entities."""
    text = usable_text(record, columns.text)
    label = usable_label(record.fields.get(columns.label), columns.label) if columns.label else None
    names = next((pair for pair in SPANS if all(name in record.fields for name in pair)), None)
    if names is not None:
        first, second = (place_of(record.fields[name], name, text) for name in names)
        return Pair(text, first, second, label)
    return unmarked(text)._replace(label=label)


def place_of(value: Any, name: str, text: str) -> Extent:
    """{"start", "end"}, {"pos": [start, end]} or [start, end], in characters."""
    if isinstance(value, Mapping):
        value = value.get("pos", [value.get("start"), value.get("end")])
    match value:
        case [int(start), int(end)]:
            if 0 <= start < end <= len(text) and text[start:end].strip():
                return start, end
            raise BadRow("entity outside its text", f"{name}: characters {start} to {end} of {len(text)}")
    raise BadRow("entity without start and end", f"{name} = {value!r}"[:200])


def unmarked(text: str) -> Pair:
    """The text without its <e1> and <e2> marks, of which each must open and close once, and where they were."""
    plain, at, places = "", 0, dict[str, int]()
    for mark in MARKED.finditer(text):
        piece = text[at : mark.start()]
        if plain.endswith(" ") or not plain:  # "a <e1> b": the two spaces around a mark were one
            piece = piece.removeprefix(" ")
        plain += piece
        name = mark[1] + mark[2]
        if name in places:
            raise BadRow("entity marked twice", mark[0])
        places[name] = len(plain.rstrip()) if mark[1] else len(plain)
        at = mark.end()
    rest = text[at:]
    plain += rest.removeprefix(" ") if plain.endswith(" ") else rest
    if places.keys() != {"1", "/1", "2", "/2"}:
        raise BadRow("not two marked entities", "each of <e1> </e1> <e2> </e2> is needed once")
    first, second = ((places[n], places[f"/{n}"]) for n in "12")
    if first[0] >= first[1] or second[0] >= second[1]:
        raise BadRow("an entity has no text", text[:200])
    return Pair(plain, first, second, None)


def choose_markers(tokenizer: Tokenizer) -> tuple[str, str]:
    """Two marks that are one known token each. Raises RonnaError for a vocabulary without them."""
    found = []
    for mark in CANDIDATES:
        [tokens] = tokenizer.encode_words([f"a {mark} b"], [[(0, 1), (2, 3), (4, 5)]])
        own = tokens.ids[tokens.word == 1]
        if len(own) == 1 and own[0] != tokenizer.unk_id:
            found.append(mark)
        if len(found) == 2:
            return found[0], found[1]
    raise RonnaError(f"the vocabulary has no two of {' '.join(CANDIDATES)} as tokens", fix="use another tokenizer")


@dataclass(frozen=True)
class Relation(Task):
    """The task as an objective, and its way back from scores to relations."""

    config: RelationConfig
    tokenizer: Tokenizer
    labels: list[str]
    length: int
    markers: tuple[str, str]

    kind = "relation"
    problem_type = "single_label_classification"
    monitor = "macro_f1"

    @classmethod
    def row(cls, record: Record, columns: Columns) -> Pair:
        return read_pair(record, columns)

    @classmethod
    def columns(
        cls, record: Record, *, text: str | None, pair: str | None, label: str | None, labelled: bool = True
    ) -> Columns:
        if pair is not None:
            raise RonnaError("both entities stand in one text", where="data.text_pair", fix="leave it out")
        return find_columns(record, text=text, pair=None, label=label, need_label=labelled, usual=USUAL)

    @classmethod
    def learn(cls, config: RelationConfig, rows: Sequence[Pair], tokenizer: Tokenizer, length: int) -> Self:
        labels = sorted({label_name(row.label) for row in rows})
        return cls(config, tokenizer, labels, length, choose_markers(tokenizer))

    @classmethod
    def restore(cls, config: Mapping[str, Any], tokenizer: Tokenizer, length: int) -> Self:
        marks = config.get("relation_markers")
        if not isinstance(marks, list) or len(marks) != 2 or not all(isinstance(m, str) and m for m in marks):
            fix = "use the folder as `ronna finetune` wrote it"
            raise RonnaError("no relation_markers", where="config.json", fix=fix)
        return cls(RelationConfig(), tokenizer, label_names(config), length, (marks[0], marks[1]))

    @property
    def score_names(self) -> list[str]:
        return self.labels

    @property
    def title(self) -> str:
        return f"{len(self.labels)} relations between two entities, marked {self.markers[0]} and {self.markers[1]}"

    @property
    def folder_keys(self) -> dict[str, Any]:
        return {"relation_markers": list(self.markers)}

    def classifier(self, family: Family, model: Model) -> Classifier:
        return classifier_for(family, model, len(self.labels), "pair")

    def rows(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Pair]:
        if pairs is not None:
            raise RonnaError("both entities stand in one text", fix="mark them: <e1>...</e1> ... <e2>...</e2>")
        try:
            return [unmarked(text) for text in texts]
        except BadRow as bad:
            raise RonnaError(str(bad), fix="mark both entities: <e1>...</e1> ... <e2>...</e2>") from None

    def check_labels(self, rows: Sequence[Pair], where: str) -> None:
        check_known((label_name(row.label) for row in rows), self.labels, where)

    # From rows to examples

    def encode(
        self, rows: Sequence[Pair], accounts: dict[str, int] | None = None, *, training: bool = False
    ) -> list[Example]:
        """Tokenize with markers; over the length, the tokens farthest from the markers are cut, or it is dropped or
        refused."""
        some = [self.marked(row) for row in rows]
        tokens: list[EncodedWords] = []
        for at in range(0, len(rows), 1024):
            part = some[at : at + 1024]
            tokens += self.tokenizer.encode_words([m.text for m in part], [m.pieces for m in part])
        before, after = self.tokenizer.around
        room = self.length - len(before) - len(after)
        long = {CUT: [len(t.ids) > room for t in tokens]}
        kept = keep_rows(self.config.truncation, long, self.length, accounts, training=training)
        known = {label: i for i, label in enumerate(self.labels)}
        examples = []
        for row, m, t in compress(zip(rows, some, tokens, strict=True), kept):
            ids, places = t.ids, np.searchsorted(t.word, m.opening)
            if len(ids) > room:
                ids, places = nearest(ids, places, room)
            target = None if row.label is None else known[label_name(row.label)]
            examples.append(Example(np.concatenate([before, ids, after]), places + len(before), target))
        return examples

    def marked(self, row: Pair) -> Marked:
        """The text with markers, cut into the pieces between them and the markers themselves."""
        sides = zip(self.markers, (row.first, row.second), strict=True)
        cuts = [(at, opens, mark) for mark, (a, b) in sides for at, opens in ((a, True), (b, False))]
        pieces: list[str] = []
        opening: dict[str, int] = {}
        at = 0
        for place, opens, mark in sorted(cuts):  # an entity that ends where another begins is closed first
            pieces += filter(None, [row.text[at:place].strip()])
            if opens:
                opening[mark] = len(pieces)
            pieces.append(mark)
            at = place
        pieces += filter(None, [row.text[at:].strip()])
        ends = np.cumsum([len(piece) + 1 for piece in pieces]) - 1
        extents = [(int(end) - len(piece), int(end)) for end, piece in zip(ends, pieces, strict=True)]
        return Marked(" ".join(pieces), extents, [opening[mark] for mark in self.markers])

    def samples(self, item: Example, rng: np.random.Generator) -> list[Sample]:
        return [Sample(item.tokens, predict=item.places, target=item.target)]

    # Loss, scores, answers

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"relation": len(batch.sequences)}

    def scores(self, model: Transformer, batch: Batch) -> Tensor:
        """(B, K) in fp32."""
        return model.scores(batch.tokens, batch.sequences, batch.segments, encoded(model, batch), at=batch.predict)

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        assert batch.targets is not None
        scores = self.scores(model, batch)
        right = (scores.argmax(-1) == batch.targets).sum()
        return Loss({"relation": cross_entropy(scores, batch.targets, None, 0.0)}, {"relation_accuracy": right})

    def mean_loss(self, examples: Sequence[Example], scores: np.ndarray) -> float:
        gold = torch.tensor([e.target for e in examples])
        return float(cross_entropy(torch.from_numpy(scores), gold, None, 0.0)) / len(examples)

    def infer(self, model: Transformer, examples: Sequence[Example]) -> np.ndarray:
        """Scores (N, K) in the order of the examples."""

        def scores_of(indices: list[int]) -> np.ndarray:
            samples = [Sample(examples[i].tokens, predict=examples[i].places) for i in indices]
            return self.scores(model, collate(self, samples, model.device))[:, None].cpu().numpy()

        none = np.zeros((0, len(self.labels)), np.float32)
        return np.concatenate([none, *self.each(model, [len(e.tokens) for e in examples], scores_of)])

    def measure(self, examples: Sequence[Example], scores: np.ndarray) -> Scores:
        return relation_scores(np.array([e.target for e in examples]), scores.argmax(-1), self.labels)

    def decode(self, rows: Sequence[Pair], examples: Sequence[Example], scores: np.ndarray) -> list[dict[str, Any]]:
        p = torch.from_numpy(scores).softmax(-1).numpy()
        return [self.answer(row, some) for row, some in zip(rows, p, strict=True)]

    def answer(self, row: Pair, p: np.ndarray) -> dict[str, Any]:
        best = int(p.argmax())
        (a, b), (c, d) = row.first, row.second
        return {
            "relation": self.labels[best],
            "probability": round(float(p[best]), 6),
            "e1": {"text": row.text[a:b], "start": a, "end": b},
            "e2": {"text": row.text[c:d], "start": c, "end": d},
        }


def nearest(ids: np.ndarray, places: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """The `room` tokens nearest to either place, in order, and where the places are among them."""
    distance = np.abs(np.arange(len(ids))[:, None] - places).min(1)
    kept = np.sort(np.argsort(distance, kind="stable")[:room])
    return ids[kept], np.searchsorted(kept, places)
