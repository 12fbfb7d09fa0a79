"""What `finetune`, `evaluate` and `predict` ask of a task, and what tasks share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch

from ronna.data.badrows import BadRow, BadRows
from ronna.data.sources import Record
from ronna.decoding.among import SINGLE, Among, owned, turns
from ronna.model.config import Classifier, Model
from ronna.model.families import Family
from ronna.model.transformer import Transformer
from ronna.objectives.base import Batch, Loss, Sample
from ronna.tasks.metrics import Scores
from ronna.tasks.schema import Columns
from ronna.text.tokenizer import Tokenizer


class Row(Protocol):
    """A usable record."""

    @property
    def key(self) -> str:
        """What the model will read, as one string: rows of one key are twins."""
        ...

    @property
    def label(self) -> Any:
        """What it is to answer; None where nobody has said."""
        ...


class Task(ABC):
    """An objective that answers: rows -> examples -> scores -> answers and measures.

    The class knows how rows of its kind are read; an instance knows its labels and tokenizer too. Examples are the
    items of training; scores are in their order.
    """

    kind: ClassVar[str]  # as a run file calls it
    tokenizer: Tokenizer
    whole_batch: ClassVar[bool] = False  # whether its loss is of a batch as a whole: see `objectives.base.WholeBatch`
    together: ClassVar[int] = 1  # samples that an item becomes, of which the loss needs all at once
    writes: ClassVar[bool] = False  # whether its answers are text, for which a decoder needs its vocabulary head
    batch_tokens: int = 8192  # of a batch of inference; a run with little memory has less
    among: Among = SINGLE  # those that share such batches

    # From records to rows

    @classmethod
    @abstractmethod
    def columns(
        cls, record: Record, *, text: str | None, pair: str | None, label: str | None, labelled: bool = True
    ) -> Columns:
        """Which columns to read, by a first record and the user's names. Raises RonnaError."""

    @classmethod
    def unfold(cls, record: Record) -> Iterator[Record]:
        """The records that a record stands for."""
        yield record

    @classmethod
    @abstractmethod
    def row(cls, record: Record, columns: Columns) -> Any:
        """A `Row`. Raises BadRow for a record without a usable input or label."""

    @abstractmethod
    def rows(self, texts: Sequence[Any], pairs: Sequence[str] | None) -> list[Any]:
        """Unlabelled rows of what a caller has at hand."""

    def check_labels(self, rows: Sequence[Any], where: str) -> None:  # noqa: B027 - a score or a span is always one
        """Raises RonnaError for a label that the training data does not have."""

    # From training rows or a folder to a task, and back

    @classmethod
    @abstractmethod
    def learn(cls, config: Any, rows: Sequence[Any], tokenizer: Tokenizer, length: int) -> Self:
        """The task that the training rows set. Raises RonnaError."""

    @classmethod
    @abstractmethod
    def restore(cls, config: Mapping[str, Any], tokenizer: Tokenizer, length: int) -> Self:
        """The task of a folder, by its config.json. Raises RonnaError."""

    def on(self, model: Model, config: Mapping[str, Any]) -> Self:
        """The task for a model of this shape, whose folder has this config.json. Raises RonnaError."""
        return self

    def reading(self, batch_tokens: int) -> Self:
        """The same, with batches of inference of at most so many tokens."""
        return self.with_one(batch_tokens=batch_tokens)

    def shared(self, among: Among) -> Self:
        """The same, with batches of inference divided among several, all of whom get all answers."""
        return self.with_one(among=among)

    def with_one(self, **attribute: Any) -> Self:
        other = copy(self)
        for name, value in attribute.items():
            object.__setattr__(other, name, value)  # tasks are frozen
        return other

    @property
    @abstractmethod
    def title(self) -> str: ...

    @property
    def problem_type(self) -> str | None:
        """As config.json calls it, where transformers has a word for it."""
        return None

    @property
    def score_names(self) -> list[str] | None:
        """Of the classifier, for config.json; None where there is none."""
        return None

    @property
    def folder_keys(self) -> dict[str, Any]:
        """What else config.json is to say, for `restore`."""
        return {}

    def folder_files(self, model: Model) -> dict[str, str]:
        """Further files that a folder is to have, by name."""
        return {}

    @abstractmethod
    def classifier(self, family: Family, model: Model) -> Classifier | None:
        """The head it needs. Raises RonnaError where the family has none."""

    # An objective, as `ronna.objectives.base` asks for

    def items(self, example: Any) -> list[Any]:
        """A training example in the parts that may be learnt at different steps, such as the windows of a long text:
        a batch is so many items, and its memory should not depend on how long the texts around them are."""
        return [example]

    @abstractmethod
    def samples(self, item: Any, rng: np.random.Generator) -> list[Sample]: ...

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, int]: ...

    @abstractmethod
    def loss(self, model: Transformer, batch: Batch) -> Loss: ...

    # From rows to answers

    @property
    @abstractmethod
    def monitor(self) -> str:
        """The metric that early stopping and the choice of the best checkpoint look at: the higher the better, but for
        the loss."""

    @abstractmethod
    def encode(
        self, rows: Sequence[Any], accounts: dict[str, int] | None = None, *, training: bool = False
    ) -> list[Any]:
        """Examples in the order of the rows. What is done about those over the length is counted in `accounts`; only
        of training rows some may be left out. Raises RonnaError where the user wants none over the length."""

    def prepare(self, model: Transformer, examples: list[Any]) -> None:  # noqa: B027 - most need nothing of it
        """Ask the model, as it is before training and without any adapter, what the examples need to know of it."""

    def preview(self, examples: Sequence[Any]) -> list[tuple[str, bool]]:
        """An example as the model will see it, in pieces: text, and whether it is to be written. Nothing where the
        task writes no text."""
        return []

    @abstractmethod
    def infer(self, model: Transformer, examples: Sequence[Any]) -> Any: ...

    def each(
        self, model: Transformer, lengths: Sequence[int], compute: Callable[[list[int]], Iterable[np.ndarray]]
    ) -> list[np.ndarray]:
        """What `compute` says of every unit, of so many tokens, in batches of like length: of each unit an array, which
        may differ from others in its first dimension alone."""
        model.eval()
        batches = list(like_lengths(lengths, self.batch_tokens, model.ahead))
        found, said = list[np.ndarray](), list[np.ndarray]()
        with torch.inference_mode():
            for indices, own in turns(batches, self.among):
                said = list(compute(indices))
                found += said if own else []
        if not batches:
            return []
        rows = self.among.from_parts(torch.from_numpy(np.concatenate(found or [said[0][:0]])))
        sizes = self.among.from_parts(torch.tensor([len(some) for some in found], dtype=torch.int64))
        whole: list[np.ndarray] = [said[0]] * len(lengths)
        for part, (all_rows, each) in enumerate(zip(rows, sizes, strict=True)):
            indices = [i for batch in owned(batches, part, self.among) for i in batch]
            ends = np.cumsum(each.numpy())[:-1]
            for i, some in zip(indices, np.split(all_rows.numpy(), ends) if indices else [], strict=True):
                whole[i] = some
        return whole

    @abstractmethod
    def mean_loss(self, examples: Sequence[Any], scores: Any) -> float: ...

    @abstractmethod
    def measure(self, examples: Sequence[Any], scores: Any) -> Scores: ...

    def judge(self, model: Transformer, examples: Sequence[Any]) -> dict[str, float]:
        """What an evaluation during training says of held-out examples: metrics, the one to look at first, and loss."""
        scores = self.infer(model, examples)
        measured = self.measure(examples, scores).metrics
        values = {name: metric.value for name, metric in measured.items() if metric.value is not None}
        values = {"loss": self.mean_loss(examples, scores), **values}
        # Held-out data of another kind than the training data may have another measure: its first one counts.
        monitor = self.monitor if self.monitor in ("loss", *measured) else next(iter(measured))
        return {monitor: values.get(monitor, float("-inf")), **values}

    @abstractmethod
    def decode(self, rows: Sequence[Any], examples: Sequence[Any], scores: Any) -> list[dict[str, Any]]:
        """What `predict` says of each row."""


def read_rows(task: type[Task], records: Iterable[Record], columns: Columns, bad: BadRows) -> Iterator[Any]:
    """Usable rows; others are set aside with their place."""
    labels: dict[Any, Any] = {}

    def convert(record: Record) -> Row:
        row = task.row(record, columns)
        key = record.fields.get("id")
        if isinstance(key, str | int) and labels.setdefault(key, row.label) != row.label:
            raise BadRow("same id, two labels", f"id {key!r} was {labels[key]!r} before, now {row.label!r}")
        return row

    return bad.sift(records, convert)


def unfolded(task: type[Task], records: Iterable[Record], bad: BadRows) -> Iterator[Record]:
    """Records as the task wants them, each a row of the account."""
    for record in records:
        bad.rows_in -= 1
        for part in task.unfold(record):
            bad.rows_in += 1
            yield part


def like_lengths(lengths: Sequence[int], batch_tokens: int, ahead: int = 0) -> Iterator[list[int]]:
    """Indices in batches of similar length whose tokens stay below `batch_tokens`, those `ahead` of each counted."""
    batch: list[int] = []
    total = 0
    for i in np.argsort(lengths, kind="stable")[::-1].tolist():
        if batch and total + lengths[i] + ahead > batch_tokens:
            yield batch
            batch, total = [], 0
        batch.append(i)
        total += lengths[i] + ahead
    if batch:
        yield batch
