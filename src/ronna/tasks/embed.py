"""Embeddings: one vector a text, near for texts that belong together (Reimers and Gurevych 2019; Gao et al. 2021).

Trained on pairs and triples against the other texts of a batch, or on pairs with scores by their order.

Legend: B texts, C channels, n anchors, m candidates.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress, islice
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ronna.base.config import Config
from ronna.base.errors import RonnaError
from ronna.data.badrows import BadRow
from ronna.data.sources import Record
from ronna.model.config import Model
from ronna.model.families import Family
from ronna.model.transformer import Transformer
from ronna.objectives.base import Batch, Loss, Sample, collate
from ronna.tasks.base import Task
from ronna.tasks.encoding import encode_inputs
from ronna.tasks.labels import number
from ronna.tasks.metrics import Scores, mean_scores, regression_scores
from ronna.tasks.schema import Columns, Usual, find_columns, usable_text
from ronna.tasks.truncation import CUT, keep_rows
from ronna.text.tokenizer import Tokenizer

USUAL = Usual(
    texts=("anchor", "query", "text_a", "sentence1", "premise", "question", "text", "sentence"),
    pairs=("positive", "text_b", "sentence2", "hypothesis", "document", "answer"),
    labels=("score", "similarity", "label_name", "label"),
)
NEGATIVES = ("negative", "hard_negative")
# Labels of inference data: what follows belongs together, what contradicts is the hardest to keep apart.
FOLLOWS, CONTRADICTS = ("entailment", "0"), ("contradiction", "2")
ANCHOR, POSITIVE, NEGATIVE = 0, 1, 2
TOP = (1, 5, 10)
GAINS = 1 / np.log2(np.arange(2, 12))


class EmbedConfig(Config):
    kind: Literal["embed"] = "embed"
    pool: Literal["mean", "first", "last"] = "mean"
    temperature: float = Field(0.05, gt=0)  # similarities are divided by it
    truncation: Literal["cut", "drop", "refuse"] = "cut"  # of texts longer than train.length


class Group(NamedTuple):
    """A text and, as far as they are known, one that belongs to it, one that does not, and how near the first is."""

    text: str
    positive: str | None
    negative: str | None
    label: Any  # a score, or None

    @property
    def key(self) -> str:
        return f"{self.text}\0{self.positive or ''}\0{self.negative or ''}"


class Example(NamedTuple):
    texts: list[np.ndarray]  # tokens of the anchor, the positive and the negative, as far as they are there
    roles: list[int]
    group: int  # of anchors with the same text
    score: float | None


def read_group(record: Record, columns: Columns) -> Group:
    """Raises BadRow for a record without usable texts, or with a label that is neither a score nor of inference."""
    negative = next((name for name in NEGATIVES if name in record.fields), None)
    anchor = usable_text(record, columns.text)
    if columns.pair is None:  # a text alone, whatever it was not to be near to
        return Group(anchor, None, None, None)
    other, wrong = (usable_text(record, column) if column else None for column in (columns.pair, negative))
    if columns.label is None:
        return Group(anchor, other, wrong, None)
    label = record.fields.get(columns.label)
    if columns.label in ("score", "similarity"):
        score = number(label)
        if score is None:
            raise BadRow("score is not a number", f"{columns.label} = {label!r}"[:200])
        return Group(anchor, other, wrong, score)
    name = str(label)
    if name in FOLLOWS:
        return Group(anchor, other, wrong, None)
    return Group(anchor, None, other if name in CONTRADICTS else None, None)


@dataclass(frozen=True)
class Embed(Task):
    """The task as an objective, and its vectors."""

    config: EmbedConfig
    tokenizer: Tokenizer
    length: int

    kind = "embed"
    monitor = "spearman"
    whole_batch = True

    @classmethod
    def row(cls, record: Record, columns: Columns) -> Group:
        return read_group(record, columns)

    @classmethod
    def columns(
        cls, record: Record, *, text: str | None, pair: str | None, label: str | None, labelled: bool = True
    ) -> Columns:
        """`labelled`: there must be a second text; a label there may be."""
        columns = find_columns(record, text=text, pair=pair, label=label, need_label=False, usual=USUAL)
        if labelled and columns.pair is None:
            what = f"no column looks like a second text; the columns are {', '.join(record.fields)}"
            raise RonnaError(what, where=str(record.path), fix="name it: --set data.text_pair=COLUMN")
        return columns

    @classmethod
    def learn(cls, config: EmbedConfig, rows: Sequence[Group], tokenizer: Tokenizer, length: int) -> Self:
        if not any(row.positive for row in rows):
            raise RonnaError("no two texts of the training data belong together", where="data.train")
        return cls(config, tokenizer, length)

    @classmethod
    def restore(cls, config: Mapping[str, Any], tokenizer: Tokenizer, length: int) -> Self:
        return cls(EmbedConfig(pool=config["embedding_pooling"]), tokenizer, length)

    @property
    def title(self) -> str:
        return f"embeddings, pooled by {self.config.pool}"

    @property
    def folder_keys(self) -> dict[str, Any]:
        return {"embedding_pooling": self.config.pool}

    def folder_files(self, model: Model) -> dict[str, str]:
        """What `sentence-transformers` reads beside the model."""
        kinds = {"mean": "mean_tokens", "first": "cls_token", "last": "lasttoken"}
        pooling = {f"pooling_mode_{name}": name == kinds[self.config.pool] for name in kinds.values()}
        parts = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
            for i, (path, name) in enumerate(parts)
        ]
        files = {
            "modules.json": modules,
            "1_Pooling/config.json": {"word_embedding_dimension": model.dim, **pooling},
            "sentence_bert_config.json": {"max_seq_length": self.length, "do_lower_case": False},
        }
        return {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}

    def classifier(self, family: Family, model: Model) -> None:
        """None: the body of the model is all it needs."""

    def rows(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Group]:
        others = pairs if pairs is not None else [None] * len(texts)
        return [Group(text, other, None, None) for text, other in zip(texts, others, strict=True)]

    # From rows to examples

    def encode(
        self, rows: Sequence[Group], accounts: dict[str, int] | None = None, *, training: bool = False
    ) -> list[Example]:
        """Tokenize. A contradiction becomes the negative of its premise's pairs; texts over the length are cut, or
        their rows dropped or refused."""
        wrong = {row.text: row.negative for row in rows if row.negative and not row.positive}
        if wrong:
            rows = [r._replace(negative=r.negative or wrong.get(r.text)) for r in rows if r.positive]
        flat = [text for row in rows for text in row[:3] if text is not None]
        encoded = iter(encode_inputs(self.tokenizer, flat, None, self.length))
        groups: dict[str, int] = {}
        examples, long = [], []
        for row in rows:
            roles = [role for role, text in enumerate(row[:3]) if text is not None]
            texts = [next(encoded) for _ in roles]
            long.append(any(t.truncated for t in texts))
            group = groups.setdefault(row.text, len(groups))
            examples.append(Example([t.ids for t in texts], roles, group, row.label))
        kept = keep_rows(self.config.truncation, {CUT: long}, self.length, accounts, training=training)
        return list(compress(examples, kept))

    def samples(self, item: Example, rng: np.random.Generator) -> list[Sample]:
        """Of the texts; none of an anchor that has no positive, which the loss has no place for."""
        if POSITIVE not in item.roles:
            return []
        score = np.nan if item.score is None else item.score
        return [
            Sample(tokens, target=np.array([role, item.group, score]))
            for tokens, role in zip(item.texts, item.roles, strict=True)
        ]

    # Loss and vectors

    def counts(self, batch: Batch) -> dict[str, int]:
        assert batch.targets is not None
        return {"embed": int((batch.targets[:, 0] == POSITIVE).sum())}

    def vectors(self, model: Transformer, batch: Batch) -> Tensor:
        """(B, C) of length 1, in fp32."""
        states = model.pooled(batch.tokens, batch.sequences, self.config.pool)
        return F.normalize(states.to(torch.promote_types(states.dtype, torch.float32)), dim=-1)

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        return self.loss_of(self.vectors(model, batch), [batch])

    def loss_of(self, vectors: Tensor, batches: Sequence[Batch]) -> Loss:
        """Every anchor against the positives and negatives of all batches, or all their pairs by order."""
        roles, groups, scores = torch.cat([b.targets for b in batches if b.targets is not None]).T
        anchors, positives = vectors[roles == ANCHOR], vectors[roles == POSITIVE]
        if not scores[0].isnan():
            near = (anchors * positives).sum(-1) / self.config.temperature
            return Loss({"embed": by_order(near, scores[roles == ANCHOR]) * len(near)})
        owners = groups[roles == ANCHOR]
        candidates = torch.cat([positives, vectors[roles == NEGATIVE]])
        near = anchors @ candidates.T / self.config.temperature
        # Another positive of the same anchor is no wrong answer.
        same = owners[:, None] == owners[None, :]
        same.fill_diagonal_(False)
        near[:, : len(owners)] = near[:, : len(owners)].masked_fill(same, -torch.inf)
        gold = torch.arange(len(anchors), device=near.device)
        right = (near.argmax(-1) == gold).sum()
        return Loss({"embed": F.cross_entropy(near, gold, reduction="sum")}, {"embed_accuracy": right})

    def infer(self, model: Transformer, examples: Sequence[Example]) -> list[np.ndarray]:
        """Vectors (texts, C) of each example, of length 1."""
        flat = [tokens for e in examples for tokens in e.texts]

        def vectors_of(indices: list[int]) -> np.ndarray:
            batch = collate(self.bare, [Sample(flat[i]) for i in indices], model.device)
            return self.vectors(model, batch)[:, None].cpu().numpy()

        found = iter(self.each(model, [len(tokens) for tokens in flat], vectors_of))
        return [np.concatenate(list(islice(found, len(e.texts)))) for e in examples]

    @property
    def bare(self) -> Any:
        return Bare()

    def mean_loss(self, examples: Sequence[Example], scores: Sequence[np.ndarray]) -> float:
        """Mean distance, 1 - cosine, of the pairs that belong together: the loss itself depends on the batch."""
        pairs = [1 - float(v[0] @ v[1]) for e, v in zip(examples, scores, strict=True) if POSITIVE in e.roles]
        return float(np.mean(pairs)) if pairs else 0.0

    def measure(self, examples: Sequence[Example], scores: Sequence[np.ndarray]) -> Scores:
        """Correlation of similarities with scores, or, without scores, how well anchors find their positives."""
        both = [(e, v) for e, v in zip(examples, scores, strict=True) if POSITIVE in e.roles]
        if both and both[0][0].score is not None:
            gold = np.array([e.score for e, _ in both], np.float64)
            found = regression_scores(gold, np.array([float(v[0] @ v[1]) for _, v in both]))
            kept = {name: found.metrics[name] for name in ("spearman", "pearson")}  # a cosine has no unit in common
            return replace(found, metrics=kept)
        return mean_scores(retrieval([e.group for e, _ in both], [v for _, v in both]))

    def decode(
        self, rows: Sequence[Group], examples: Sequence[Example], scores: Sequence[np.ndarray]
    ) -> list[dict[str, Any]]:
        """The vector of a text, or the similarity of two."""
        return [
            {"embedding": [round(x, 6) for x in v[0].tolist()]}
            if len(v) == 1
            else {"similarity": round(float(v[0] @ v[1]), 6)}
            for v in scores
        ]


class Bare:
    """What `collate` needs of an objective where nothing is counted."""

    def counts(self, batch: Batch) -> dict[str, int]:
        return {}


def by_order(near: Tensor, scores: Tensor) -> Tensor:
    """log(1 + sum of exp(near_j - near_i) over pairs with score_i > score_j): CoSENT (Su 2022)."""
    gaps = (near[None, :] - near[:, None])[scores[:, None] > scores[None, :]]
    return torch.logsumexp(torch.cat([gaps.new_zeros(1), gaps]), dim=0)


def retrieval(groups: Sequence[int], vectors: Sequence[np.ndarray], chunk: int = 1024) -> dict[str, np.ndarray]:
    """Of each anchor, its positives among all positives: MRR, recall at 1, 5 and 10, NDCG at 10."""
    owners = np.array(groups)
    candidates = np.stack([v[1] for v in vectors])
    first = {group: i for i, group in reversed(list(enumerate(groups)))}  # each anchor asks once
    names = ("mrr", *(f"recall_at_{k}" for k in TOP), "ndcg_at_10")
    found: dict[str, list[float]] = {name: [] for name in names}
    asked = sorted(first.values())
    for at in range(0, len(asked), chunk):
        some = asked[at : at + chunk]
        order = np.argsort(-np.stack([vectors[i][0] for i in some]) @ candidates.T, axis=1, kind="stable")
        for i, ranking in zip(some, order, strict=True):
            right = owners[ranking] == owners[i]
            total = int(right.sum())
            found["mrr"].append(1 / (int(right.argmax()) + 1))
            for k in TOP:
                found[f"recall_at_{k}"].append(float(right[:k].sum()) / min(k, total))
            top = right[:10]
            found["ndcg_at_10"].append(float(GAINS[: len(top)][top].sum() / GAINS[: min(10, total)].sum()))
    return {name: np.array(values) for name, values in found.items()}
