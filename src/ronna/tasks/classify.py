"""Text classification: one label, any number of labels, or a score, for one text or a pair of texts.

Legend: B sequences, K labels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ronna.base.config import Config, build
from ronna.base.errors import RonnaError
from ronna.data.sources import Record
from ronna.model.config import Classifier, Model
from ronna.model.families import Family, classifier_for, label_names
from ronna.model.folder_config import refuse_untrue
from ronna.model.transformer import Transformer
from ronna.objectives.base import Batch, Loss, Sample, collate, encoded
from ronna.tasks.base import Task
from ronna.tasks.encoding import encode_inputs
from ronna.tasks.labels import INTEGER, check_known, label_name, names_of, number, usable_label
from ronna.tasks.losses import balanced_weights, binary_cross_entropy, cross_entropy
from ronna.tasks.metrics import Scores, classification_scores, multilabel_scores, regression_scores
from ronna.tasks.schema import Columns, find_columns, usable_text
from ronna.tasks.truncation import CUT, keep_rows
from ronna.text.tokenizer import Tokenizer

Problem = Literal["single", "multi", "regression"]
PROBLEM_TYPES: dict[Problem, str] = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}


class ClassifyConfig(Config):
    kind: Literal["classify"] = "classify"
    problem: Literal["auto", "single", "multi", "regression"] = "auto"
    pool: Literal["auto", "first", "last", "mean"] = "auto"  # the states to score; auto: as the folder says
    truncation: Literal["cut", "drop", "refuse"] = "cut"  # of texts longer than train.length; the longer one of a pair
    threshold: float = Field(0.5, gt=0, lt=1)  # probability above which a label of a multi-label problem is given
    class_weights: Literal["none", "balanced"] = "none"  # balanced: rare classes weigh more in the loss
    focal: float = Field(0.0, ge=0)  # gamma of the focal loss: rows that are right already weigh less


class Row(NamedTuple):
    text: str
    pair: str | None
    label: Any

    @property
    def key(self) -> str:
        return f"{self.text}\0{self.pair or ''}"


class Example(NamedTuple):
    """A tokenized row; `target` is a class id, a score or flags (K,), None where unlabelled."""

    tokens: np.ndarray
    segments: np.ndarray
    target: Any


def usable_row(record: Record, columns: Columns) -> Row:
    """Raises BadRow where the text or the label is not one."""
    text = usable_text(record, columns.text)
    pair = usable_text(record, columns.pair) if columns.pair else None
    label = usable_label(record.fields.get(columns.label), columns.label) if columns.label else None
    return Row(text, pair, label)


def detect_problem(labels: Sequence[Any]) -> Problem:
    if any(isinstance(x, list) for x in labels):
        return "multi"
    if any(isinstance(x, float) and not x.is_integer() for x in labels):
        return "regression"
    return "single"


def collect_labels(labels: Sequence[Any], problem: Problem) -> list[str]:
    """Label names in a stable order: by number where all are numbers, else by name."""
    if problem == "regression":
        return ["score"]
    names = {name for label in labels for name in names_of(label)}
    numeric = all(INTEGER.fullmatch(n) for n in names)
    return sorted(names, key=int) if numeric else sorted(names)


@dataclass(frozen=True)
class Classify(Task):
    """The task as an objective, and its way back from scores to labels."""

    config: ClassifyConfig
    tokenizer: Tokenizer
    problem: Problem
    labels: list[str]
    length: int
    weights: Tensor | None = None  # (K,), of the loss

    kind = "classify"

    @classmethod
    def row(cls, record: Record, columns: Columns) -> Row:
        return usable_row(record, columns)

    @classmethod
    def columns(
        cls, record: Record, *, text: str | None, pair: str | None, label: str | None, labelled: bool = True
    ) -> Columns:
        return find_columns(record, text=text, pair=pair, label=label, need_label=labelled)

    @classmethod
    def learn(cls, config: ClassifyConfig, rows: Sequence[Row], tokenizer: Tokenizer, length: int) -> Self:
        """Problem, labels and, if they are asked for, class weights as the rows have them."""
        seen = [row.label for row in rows]
        problem = detect_problem(seen) if config.problem == "auto" else config.problem
        task = cls(config, tokenizer, problem, collect_labels(seen, problem), length)
        if not task.labels:
            raise RonnaError("no training row has a label", where="data.train", fix="an empty list is no label at all")
        if problem == "regression" and (config.class_weights != "none" or config.focal):
            raise RonnaError("a regression has no classes to weigh", where="task.class_weights, task.focal")
        if config.class_weights == "none":
            return task
        task.check_labels(rows, "data.train")
        return replace(task, weights=balanced_weights([task.target(label) for label in seen], len(task.labels)))

    @classmethod
    def restore(cls, config: Mapping[str, Any], tokenizer: Tokenizer, length: int) -> Self:
        known: dict[str, Problem] = {t: p for p, t in PROBLEM_TYPES.items()}
        problem = known.get(config.get("problem_type") or "", "single")
        said = {"threshold": config["threshold"]} if "threshold" in config else {}
        own = build(ClassifyConfig, {"problem": problem, **said}, where="config.json")
        return cls(own, tokenizer, problem, label_names(config), length)

    @property
    def score_names(self) -> list[str]:
        return self.labels

    @property
    def title(self) -> str:
        return (
            "regression"
            if self.problem == "regression"
            else f"{self.problem} classification, {len(self.labels)} labels"
        )

    @property
    def problem_type(self) -> str:
        return PROBLEM_TYPES[self.problem]

    @property
    def folder_keys(self) -> dict[str, Any]:
        return {"threshold": self.config.threshold} if self.problem == "multi" else {}

    def classifier(self, family: Family, model: Model) -> Classifier:
        """The family's, pooled as the config says. Raises RonnaError where a folder could not say so."""
        classifier = classifier_for(family, model, len(self.labels))
        if self.config.pool == "auto":
            return classifier
        pooled = replace(model, head=None, classifier=replace(classifier, pool=self.config.pool))
        try:  # before the training, not after it
            refuse_untrue(family, pooled, family.to_hf(pooled))
        except RonnaError as error:
            fix = "leave it at auto; modernbert folders can say first or mean"
            raise RonnaError(error.what, where="task.pool", fix=fix) from None
        return replace(classifier, pool=self.config.pool)

    def rows(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Row]:
        seconds = pairs if pairs is not None else [None] * len(texts)
        return [Row(text, pair, None) for text, pair in zip(texts, seconds, strict=True)]

    def check_labels(self, rows: Sequence[Row], where: str) -> None:
        """Raises RonnaError for a label that the training data does not have, or of another kind of problem."""
        for row in rows:
            if self.problem == "regression" and number(row.label) is None:
                raise RonnaError(f"score {row.label!r} is not a number", where=where, fix="or set task.problem=single")
            if self.problem == "single" and isinstance(row.label, list):
                fix = "labels by the list are learnt with task.problem=multi"
                raise RonnaError(f"{row.label!r} where one label is asked for", where=where, fix=fix)
        if self.problem != "regression":
            check_known((name for row in rows for name in names_of(row.label)), self.labels, where)

    def target(self, label: Any) -> Any:
        if label is None:
            return None
        match self.problem:
            case "regression":
                return np.float32(number(label))
            case "single":
                return self.labels.index(label_name(label))
        given = names_of(label)
        return np.array([name in given for name in self.labels], dtype=np.float32)

    def encode(
        self, rows: Sequence[Row], accounts: dict[str, int] | None = None, *, training: bool = False
    ) -> list[Example]:
        """Tokenize; texts over the length are cut (the longer of a pair first), dropped or refused."""
        pairs = [r.pair for r in rows] if rows and rows[0].pair is not None else None
        encoded = encode_inputs(self.tokenizer, [r.text for r in rows], pairs, self.length)  # type: ignore[arg-type]
        long = {CUT: [e.truncated for e in encoded]}
        kept = keep_rows(self.config.truncation, long, self.length, accounts, training=training)
        pairs_kept = compress(zip(encoded, rows, strict=True), kept)
        return [Example(e.ids, e.segments, self.target(row.label)) for e, row in pairs_kept]

    def samples(self, item: Example, rng: np.random.Generator) -> list[Sample]:
        return [Sample(item.tokens, segments=item.segments, target=item.target)]

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"classify": len(batch.sequences)}

    def scores(self, model: Transformer, batch: Batch) -> Tensor:
        """(B, K) in fp32."""
        return model.scores(batch.tokens, batch.sequences, batch.segments, encoded(model, batch))

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        assert batch.targets is not None
        scores = self.scores(model, batch)
        stats = {}
        if self.problem == "single":
            stats["classify_accuracy"] = (scores.argmax(-1) == batch.targets).sum()
        return Loss({"classify": self.criterion(scores, batch.targets)}, stats)

    def criterion(self, scores: Tensor, gold: Tensor) -> Tensor:
        """Summed over rows: cross entropy, mean binary cross entropy over the labels, or squared error."""
        match self.problem:
            case "regression":
                return F.mse_loss(scores[:, 0], gold.float(), reduction="sum")
            case "multi":
                return binary_cross_entropy(scores, gold, self.weights, self.config.focal)
        return cross_entropy(scores, gold, self.weights, self.config.focal)

    def mean_loss(self, examples: Sequence[Example], scores: np.ndarray) -> float:
        gold = torch.from_numpy(np.asarray([e.target for e in examples]))
        return float(self.criterion(torch.from_numpy(scores), gold)) / len(examples)

    def infer(self, model: Transformer, examples: Sequence[Example]) -> np.ndarray:
        """Scores (N, K) in the order of the examples."""

        def scores_of(indices: list[int]) -> np.ndarray:
            samples = [Sample(examples[i].tokens, segments=examples[i].segments) for i in indices]
            return self.scores(model, collate(self, samples, model.device))[:, None].cpu().numpy()

        none = np.zeros((0, len(self.labels)), np.float32)
        return np.concatenate([none, *self.each(model, [len(e.tokens) for e in examples], scores_of)])

    def decode(self, rows: Sequence[Row], examples: Sequence[Example], scores: np.ndarray) -> list[dict[str, Any]]:
        """A label with probabilities, labels, or a score."""
        if self.problem == "regression":
            return [{"score": round(float(s), 6)} for s in scores[:, 0]]
        if self.problem == "multi":
            p = 1 / (1 + np.exp(-scores))
            given = [[n for n, x in zip(self.labels, row, strict=True) if x >= self.config.threshold] for row in p]
            return [{"labels": g, "probabilities": self.named(row)} for g, row in zip(given, p, strict=True)]
        p = torch.from_numpy(scores).softmax(-1).numpy()
        best = p.argmax(-1)
        return [
            {
                "label": self.labels[b],
                "probability": round(float(row[b]), 6),
                "probabilities": self.named(row),
            }
            for b, row in zip(best, p, strict=True)
        ]

    def named(self, row: np.ndarray) -> dict[str, float]:
        return {name: round(float(x), 6) for name, x in zip(self.labels, row, strict=True)}

    def measure(self, examples: Sequence[Example], scores: np.ndarray) -> Scores:
        gold = np.array([e.target for e in examples])
        match self.problem:
            case "regression":
                return regression_scores(gold, scores[:, 0])
            case "multi":
                return multilabel_scores(gold.astype(int), (scores >= self.logit).astype(int), self.labels)
        return classification_scores(gold, scores.argmax(-1), self.labels)

    @property
    def logit(self) -> float:
        t = self.config.threshold
        return math.log(t / (1 - t))

    @property
    def monitor(self) -> str:
        return {"single": "accuracy", "multi": "micro_f1", "regression": "spearman"}[self.problem]
