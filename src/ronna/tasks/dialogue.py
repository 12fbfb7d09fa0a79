"""Dialogues and instructions: a decoder learns what the assistant says, and nothing of what it reads.

The chat template is the folder's own; training, prediction and whoever loads the folder cut a conversation into the
same tokens. Conversations lie end to end in a batch and do not see each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from ronna.base.config import Config, build
from ronna.base.errors import RonnaError
from ronna.data.badrows import BadRow
from ronna.data.sources import Record
from ronna.decoding.sampling import GenerateConfig
from ronna.model.config import Model
from ronna.model.transformer import Transformer
from ronna.objectives.base import Sample
from ronna.tasks.conversation import Conversation, Messages, find_columns, read_conversation
from ronna.tasks.metrics import Scores, perplexity_scores
from ronna.tasks.schema import Columns
from ronna.tasks.truncation import CUT, UNFIT, keep_rows
from ronna.tasks.writing import Ends, Example, Writing, Written
from ronna.text.chat import CHATML, PLAIN, ChatTemplate, Part
from ronna.text.tokenizer import Tokenizer

PROBE = "\u2042"  # a sign that no template has, to see what comes after an answer


class DialogueConfig(Config):
    kind: Literal["dialogue"] = "dialogue"
    template: str | None = None  # file of a Jinja chat template; None: the folder's own, or one of ours
    system: str | None = None  # put in front of conversations without a system message
    turns: Literal["all", "last"] = "all"  # which of the assistant's messages are learnt
    truncation: Literal["cut", "drop", "refuse"] = "cut"  # of long ones the oldest turns; an answer is never cut
    decoding: GenerateConfig = GenerateConfig()


class Tokens(NamedTuple):
    """A conversation, or the beginning of one: ids (L,), and which of them the assistant says (L,)."""

    ids: np.ndarray
    said: np.ndarray


@dataclass(frozen=True)
class Dialogue(Writing):
    """The task as an objective, and its way back to answers."""

    config: DialogueConfig

    kind = "dialogue"
    monitor = "loss"

    @classmethod
    def columns(
        cls, record: Record, *, text: str | None, pair: str | None, label: str | None, labelled: bool = True
    ) -> Columns:
        return find_columns(record, text=text, pair=pair, label=label, labelled=labelled)

    @classmethod
    def row(cls, record: Record, columns: Columns) -> Conversation:
        return read_conversation(record, columns)

    def rows(self, texts: Sequence[Any], pairs: Sequence[str] | None) -> list[Conversation]:
        """Of what a user says, a text, or of whole conversations: lists of messages. Raises RonnaError."""
        made = []
        for i, text in enumerate(texts):
            record = Record({"messages": [text] if isinstance(text, str) else text}, Path(f"conversation {i}"), 0)
            try:
                made.append(read_conversation(record, Columns("messages", None, None)))
            except BadRow as error:
                fix = "give a text, or messages with role and content of which the last is the user's"
                raise RonnaError(str(error), where=str(record.path), fix=fix) from None
        return made

    @classmethod
    def learn(cls, config: DialogueConfig, rows: Sequence[Conversation], tokenizer: Tokenizer, length: int) -> Self:
        return cls(templated(tokenizer, config.template), length, config)

    @classmethod
    def restore(cls, config: Mapping[str, Any], tokenizer: Tokenizer, length: int) -> Self:
        said = (config.get("task_specific_params") or {}).get("dialogue") or {}
        own = build(DialogueConfig, said, where="config.json: task_specific_params.dialogue")
        return cls(templated(tokenizer, None), length, own)

    def on(self, model: Model, config: Mapping[str, Any]) -> Self:
        super().on(model, config)
        if model.encoder is not None:
            fix = "use a decoder such as GPT-2 or Llama, or --task seq2seq"
            raise RonnaError("an encoder-decoder has no conversation to continue", where="model.name", fix=fix)
        return self

    @property
    def title(self) -> str:
        return f"what the assistant says in {self.config.turns} of its turns"

    @property
    def folder_keys(self) -> dict[str, Any]:
        own = self.config.model_copy(update={"template": None})  # it is in the tokenizer's files
        return {"task_specific_params": {"dialogue": own.model_dump(mode="json")}}

    @property
    def decoding(self) -> GenerateConfig:
        return self.config.decoding

    # The template

    @cached_property
    def template(self) -> ChatTemplate:
        assert self.tokenizer.chat_template is not None
        return ChatTemplate(self.tokenizer.chat_template, self.tokenizer.special_tokens)

    @cached_property
    def ends(self) -> Ends:
        """The token behind what the assistant says. Raises RonnaError for a template without one, which would never
        teach a model to stop."""
        parts = self.template.parts([{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}])
        tail = "".join(part.text for part in parts if part.said).rpartition(PROBE)[2]
        special = [i for i in self.tokenizer.encode(tail).tolist() if self.tokenizer.is_special[i]]
        if not special:
            fix = "put a special token there, such as {{ eos_token }}"
            raise RonnaError("the chat template ends an answer with no special token", where="task.template", fix=fix)
        more = {self.tokenizer.eos_id} - {None, special[0]}
        return Ends(None, (special[0], *(i for i in more if i is not None)))

    def tokens(self, conversations: Sequence[list[Part]]) -> list[Tokens]:
        """Each conversation as one text, so that its tokens are those of whoever renders the template; only where a
        token would reach over the edge of an answer are the parts cut apart."""
        found = self.tokenizer.encode_with_offsets(["".join(p.text for p in c) for c in conversations], special=False)
        made = []
        for parts, e in zip(conversations, found, strict=True):
            edges = np.cumsum([0, *(len(part.text) for part in parts)])
            starts, ends = e.offsets[:, 0], e.offsets[:, 1]
            said = np.array([part.said for part in parts])
            if any(((starts < edge) & (ends > edge)).any() for edge in edges[1:-1]):
                pieces = self.tokenizer.encode_batch([part.text for part in parts])
                made.append(Tokens(np.concatenate(pieces), np.repeat(said, [len(p) for p in pieces])))
            else:
                owner = np.clip(np.searchsorted(edges, starts, side="right") - 1, 0, len(parts) - 1)
                made.append(Tokens(e.ids, said[owner]))
        return [self.ended(tokens) for tokens in made]

    def ended(self, tokens: Tokens) -> Tokens:
        """Nothing behind the token that ends an answer is the assistant's, such as a template's line break."""
        said = tokens.said.copy()
        ended = False
        for i in range(len(said)):
            ended = said[i] and (ended or (i > 0 and tokens.ids[i - 1] in self.ends.eos and tokens.said[i - 1]))
            said[i] &= not ended
        return Tokens(tokens.ids, said)

    def prompts(self, texts: Sequence[Any]) -> list[np.ndarray]:
        return [e.prompt for e in self.encode(self.rows(texts, None))]

    # From conversations to examples

    def encode(
        self, rows: Sequence[Conversation], accounts: dict[str, int] | None = None, *, training: bool = False
    ) -> list[Example]:
        """Tokenize. Of what is too long the oldest turns go; what is still too long is not learnt."""
        examples, long = self.fit(rows)
        return list(compress(examples, self.kept(long, accounts, training)))

    def kept(self, long: Mapping[str, list[bool]], accounts: dict[str, int] | None, training: bool) -> list[bool]:
        return keep_rows(self.config.truncation, long, self.length, accounts, training=training)

    def fit(self, rows: Sequence[Conversation]) -> tuple[list[Example], dict[str, list[bool]]]:
        """An example of each row; flags of rows that lose turns, and of those whose answer is too long to learn."""
        examples: list[Example] = []
        long: dict[str, list[bool]] = {CUT: [], UNFIT: []}
        for at in range(0, len(rows), 512):
            some = [self.with_system(row) for row in rows[at : at + 512]]
            for row, tokens in zip(some, self.tokens([self.parts(row) for row in some]), strict=True):
                _, fitted = self.fitted(row, tokens)
                long[CUT].append(len(fitted.ids) < len(tokens.ids))
                long[UNFIT].append(row.answered and len(fitted.ids) > self.length)
                examples.append(self.example(row, fitted))
        return examples, long

    def with_system(self, row: Conversation) -> Conversation:
        if self.config.system is None or row.messages[0]["role"] == "system":
            return row
        return row._replace(messages=({"role": "system", "content": self.config.system}, *row.messages))

    def parts(self, row: Conversation) -> list[Part]:
        return self.template.parts(row.messages) if row.answered else self.asked(row.messages)

    def asked(self, messages: Messages) -> list[Part]:
        """What is read before an answer, cut where a training text would be cut."""
        text, parts, done = self.template.render(messages, reply=True), [], 0
        for part in self.template.parts(messages) if any(m["role"] == "assistant" for m in messages) else []:
            if text[done : done + len(part.text)] != part.text:
                break
            parts.append(part._replace(said=False))
            done += len(part.text)
        return [*parts, Part(text[done:], False)]

    def fitted(self, row: Conversation, tokens: Tokens) -> tuple[Conversation, Tokens]:
        """Without as many of the oldest exchanges as it takes; the system's message and the last exchange stay."""
        messages = row.messages
        head = 1 if messages[0]["role"] == "system" else 0
        asked = [i for i, m in enumerate(messages) if m["role"] == "user" and i > head]
        while len(tokens.ids) > self.length and asked:
            row = row._replace(messages=messages[:head] + messages[asked.pop(0) :])
            tokens = self.tokens([self.parts(row)])[0]
        return row, tokens

    def example(self, row: Conversation, tokens: Tokens) -> Example:
        ids, said = tokens
        if not row.answered:
            return Example(ids, None, "")
        places = np.flatnonzero(said[1:])  # whose next token is the assistant's
        gaps = np.flatnonzero(np.diff(places) > 1)
        first = int(places[gaps[-1] + 1 if len(gaps) else 0]) if len(places) else len(ids) - 1  # of the last answer
        learnt = places if self.config.turns == "all" else places[places >= first]
        sample = None
        if len(learnt) and len(ids) <= self.length:
            sample = Sample(ids[: learnt[-1] + 1], learnt, ids[learnt + 1])
        return Example(ids[: first + 1], sample, row.label or "")

    # Measures

    def infer(self, model: Transformer, examples: Sequence[Example]) -> Written:
        """How well answers are predicted where they are known; an answer to each example where they are not."""
        nats, tokens = self.nats(model, examples)
        made = [] if tokens else self.answers(model, examples)
        return Written(made, nats, tokens)

    def measure(self, examples: Sequence[Example], scores: Written) -> Scores:
        """Loss and perplexity a token of the answers."""
        return perplexity_scores(scores.nats, scores.tokens)


def templated(tokenizer: Tokenizer, path: str | None) -> Tokenizer:
    """The tokenizer with a chat template: the user's file, its own, or one of ours."""
    if path is not None:
        try:
            return tokenizer.with_chat_template(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RonnaError(f"the chat template cannot be read: {error}", where=path, fix="name a text file") from None
    if tokenizer.chat_template is not None:
        return tokenizer
    marks = [tokenizer.token_to_id(mark) for mark in ("<|im_start|>", "<|im_end|>")]
    if all(i is not None and tokenizer.is_special[i] for i in marks):
        return tokenizer.with_chat_template(CHATML)
    return tokenizer.with_chat_template(PLAIN)
