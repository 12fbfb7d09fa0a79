"""Preferences: a model learns to find the chosen of two answers likelier than the rejected (DPO, Rafailov et al. 2023).

With r the model as it was before training, loss = -log sigmoid(beta (log p(chosen) / r(chosen) - log p(rejected) /
r(rejected))). What r says of each answer is worked out once, so no second model is held.

Legend: B sequences, two for each of P pairs; M predicted positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, Literal, NamedTuple

import numpy as np
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ronna.base.errors import RonnaError
from ronna.data.badrows import BadRow
from ronna.data.sources import Record
from ronna.model.loss import token_log_probs
from ronna.model.transformer import Transformer
from ronna.objectives.base import Batch, Loss, Sample, collate, predicted_states
from ronna.tasks.conversation import ASKED, LISTS, Conversation, read_conversation
from ronna.tasks.dialogue import Dialogue, DialogueConfig
from ronna.tasks.metrics import Scores, mean_scores
from ronna.tasks.schema import Columns, choose
from ronna.tasks.truncation import CUT, UNFIT
from ronna.tasks.writing import Example

PAIRS = (("chosen", "rejected"), ("preferred", "dispreferred"), ("better", "worse"))


class PreferenceConfig(DialogueConfig):
    kind: Literal["dpo"] = "dpo"  # type: ignore[assignment]
    beta: float = Field(0.1, gt=0)  # how dear it is to move away from the reference
    turns: Literal["last"] = "last"


class Choice(NamedTuple):
    """One conversation with two last answers."""

    chosen: Conversation
    rejected: Conversation

    @property
    def key(self) -> str:
        return self.chosen.key

    @property
    def label(self) -> str | None:
        return self.chosen.label


class Pair(NamedTuple):
    """Both answers as the model sees them, and their log-probabilities (nats) under the reference; zeros before it was
    asked."""

    chosen: Example
    rejected: Example
    reference: tuple[float, float] = (0.0, 0.0)

    @property
    def whole(self) -> bool:
        return self.chosen.sample is not None and self.rejected.sample is not None


class Margins(NamedTuple):
    """By how many nats each pair's chosen answer is likelier than its rejected one: (P,), and under the reference."""

    model: np.ndarray
    reference: np.ndarray


@dataclass(frozen=True)
class Preference(Dialogue):
    """The task as an objective; what it leaves behind is a folder of a dialogue."""

    config: PreferenceConfig

    kind = "dpo"
    together = 2

    @classmethod
    def columns(
        cls, record: Record, *, text: str | None, pair: str | None, label: str | None, labelled: bool = True
    ) -> Columns:
        """`label` is the column of the chosen answer, `pair` that of the rejected one."""
        fields, where = list(record.fields), str(record.path)
        known = next((names for names in PAIRS if all(n in fields for n in names)), (None, None))
        chosen, rejected = (
            choose(role, name, [usual] if usual else [], fields, where)
            for role, name, usual in zip(("label", "text_pair"), (label, pair), known, strict=True)
        )
        if chosen is None or rejected is None:
            what = f"no columns look like a chosen and a rejected answer; the columns are {', '.join(fields)}"
            raise RonnaError(what, where=where, fix="name them: --label CHOSEN --text-pair REJECTED")
        asked = choose("text", text, [n for n in (*LISTS, *ASKED) if n not in (chosen, rejected)], fields, where)
        return Columns(asked or chosen, rejected, chosen)

    @classmethod
    def row(cls, record: Record, columns: Columns) -> Any:
        """Raises BadRow for a record without two answers to one question."""
        sides = []
        for answer in (columns.label, columns.pair):
            # Where there is no prompt, both sides are whole conversations.
            asked = answer if columns.text == columns.label else columns.text
            if asked == answer and not isinstance(record.fields.get(asked or ""), list):
                raise BadRow("no prompt", f"{answer} is a text without a question before it")
            sides.append(read_conversation(record, Columns(asked or "", None, answer)))
        choice = Choice(*sides)
        if choice.chosen.key != choice.rejected.key:
            raise BadRow("two conversations", "the answers are not to the same messages")
        if choice.chosen.label == choice.rejected.label:
            raise BadRow("no preference", "both answers are the same")
        return choice

    @property
    def title(self) -> str:
        return "which of two answers is better"

    @property
    def folder_keys(self) -> dict[str, Any]:
        said = self.config.model_dump(mode="json", exclude={"beta", "kind", "turns", "template"})
        return {"task_specific_params": {"dialogue": said}}

    # Examples

    def encode(
        self, rows: Sequence[Any], accounts: dict[str, int] | None = None, *, training: bool = False
    ) -> list[Any]:
        fitting = [self.alike(row) for row in rows]
        (chosen, long), (rejected, more) = (self.fit([row[i] for row in fitting]) for i in (0, 1))
        unfit = [a or b for a, b in zip(long[UNFIT], more[UNFIT], strict=True)]
        cut = [row is not before for row, before in zip(fitting, rows, strict=True)]
        kept = self.kept({CUT: cut, UNFIT: unfit}, accounts, training)
        return [Pair(*pair) for pair in compress(zip(chosen, rejected, strict=True), kept)]

    def alike(self, choice: Choice) -> Choice:
        """Both answers after as much of the conversation as the longer of them leaves room for."""
        sides = [self.with_system(side) for side in choice]
        found = self.tokens([self.parts(side) for side in sides])
        longer = max((0, 1), key=lambda i: len(found[i].ids))
        kept, _ = self.fitted(sides[longer], found[longer])
        gone = len(sides[longer].messages) - len(kept.messages)
        if not gone:
            return choice
        head = kept.messages[0]["role"] == "system"
        return Choice(*(s._replace(messages=s.messages[:head] + s.messages[head + gone :]) for s in sides))

    def prepare(self, model: Transformer, examples: list[Any]) -> None:
        """Ask the reference, which is the model as it stands."""
        found = self.log_probs(model, examples)
        examples[:] = [
            pair._replace(reference=(float(a), float(b))) for pair, (a, b) in zip(examples, found, strict=True)
        ]

    def samples(self, item: Any, rng: np.random.Generator) -> list[Sample]:
        if item.chosen.sample is None or item.rejected.sample is None:
            return []
        sides = zip((item.chosen.sample, item.rejected.sample), item.reference, strict=True)
        return [Sample(s.tokens, s.predict, s.labels, target=reference) for s, reference in sides]

    def preview(self, examples: Sequence[Any]) -> list[tuple[str, bool]]:
        return super().preview([side for pair in examples[:8] if pair.whole for side in (pair.chosen, pair.rejected)])

    # Loss and measures

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"dpo": len(batch.sequences) // 2}

    def sequence_log_probs(self, model: Transformer, batch: Batch) -> Tensor:
        """(B,) of what each sequence is to say."""
        assert model.head is not None and batch.predict is not None and batch.labels is not None
        each = token_log_probs(model.head, predicted_states(model, batch), batch.labels)
        return each.new_zeros(len(batch.sequences)).index_add(0, batch.sequences.owner[batch.predict], each)

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        assert batch.targets is not None
        gained = (self.sequence_log_probs(model, batch) - batch.targets.float()).view(-1, 2)
        margins = gained[:, 0] - gained[:, 1]
        stats = {"dpo_accuracy": (margins > 0).float().sum(), "dpo_margin": margins.detach().sum() * self.config.beta}
        return Loss({"dpo": -F.logsigmoid(self.config.beta * margins).sum()}, stats)

    def log_probs(self, model: Transformer, pairs: Sequence[Pair]) -> np.ndarray:
        """(P, 2) of the chosen and the rejected answers, zeros where one of them is too long to be read."""
        samples = [self.samples(pair, np.random.default_rng(0)) for pair in pairs]
        there = [i for i, some in enumerate(samples) if some]

        def of_both(indices: list[int]) -> np.ndarray:
            batch = collate(self, [s for i in indices for s in samples[there[i]]], model.device)
            return self.sequence_log_probs(model, batch).view(-1, 1, 2).cpu().numpy()

        found = np.zeros((len(pairs), 2))
        each = self.each(model, [sum(len(s.tokens) for s in samples[i]) for i in there], of_both)
        found[there] = np.concatenate([np.zeros((0, 2)), *each])
        return found

    def infer(self, model: Transformer, examples: Sequence[Any]) -> Any:
        pairs = [pair for pair in examples if pair.whole]
        found, reference = self.log_probs(model, pairs), np.array([pair.reference for pair in pairs]).reshape(-1, 2)
        return Margins(found[:, 0] - found[:, 1], reference[:, 0] - reference[:, 1])

    def mean_loss(self, examples: Sequence[Any], scores: Any) -> float:
        return float(np.logaddexp(0, -self.config.beta * (scores.model - scores.reference)).mean())

    def measure(self, examples: Sequence[Any], scores: Any) -> Scores:
        """accuracy: how often training has moved towards the chosen answer; likelier: how often that is the likelier
        one; margin: the difference of the rewards beta (log p - log r)."""
        gained = scores.model - scores.reference
        values = {"accuracy": gained > 0, "likelier": scores.model > 0, "margin": self.config.beta * gained}
        return mean_scores({name: value.astype(np.float64) for name, value in values.items()})
