"""Conversations in the layouts people have them in: alpaca, sharegpt, OpenAI's messages, prompts and completions."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ronna.base.errors import RonnaError
from ronna.data.badrows import BadRow
from ronna.data.sources import Record
from ronna.tasks.schema import Columns, choose

LISTS = ("messages", "conversations", "conversation", "dialog", "dialogue", "turns")
ASKED = ("instruction", "prompt", "question", "query", "input")
MORE = ("input", "context")
ANSWERED = ("output", "completion", "response", "answer", "chosen")
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "agent"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}

Messages = tuple[dict[str, str], ...]


class Conversation(NamedTuple):
    """Messages with role and content. `answered`: whether the last is an assistant's, to be learnt or measured."""

    messages: Messages
    answered: bool

    @property
    def label(self) -> str | None:
        return self.messages[-1]["content"] if self.answered else None

    @property
    def key(self) -> str:
        """All that comes before the last answer."""
        asked = self.messages[:-1] if self.answered else self.messages
        return "\n".join(f"{m['role']}: {m['content']}" for m in asked)


def find_columns(record: Record, *, text: str | None, pair: str | None, label: str | None, labelled: bool) -> Columns:
    """A column with a list of messages, or columns of what is asked, of more to it and of the answer."""
    fields, where = list(record.fields), str(record.path)
    lists = [name for name in LISTS if isinstance(record.fields.get(name), list)]
    asked = choose("text", text, [*lists, *ASKED], fields, where)
    if asked is None:
        what = f"no column looks like a conversation or a prompt; the columns are {', '.join(fields)}"
        raise RonnaError(what, where=where, fix="name it: --text COLUMN")
    more = choose("text_pair", pair, [name for name in MORE if name != asked], fields, where)
    answer = choose("label", label, () if asked in lists else ANSWERED, fields, where)
    if isinstance(record.fields.get(asked), list) and answer is None:
        return Columns(asked, None, asked)
    if answer is None and labelled:
        what = f"no column looks like an answer; the columns are {', '.join(fields)}"
        raise RonnaError(what, where=where, fix="name it: --label COLUMN")
    return Columns(asked, more, answer)


def read_conversation(record: Record, columns: Columns) -> Conversation:
    """Up to the last answer or, where no label is read, up to what is to be answered. Raises BadRow."""
    messages, answered = read_messages(record, columns), columns.label is not None
    while messages and (messages[-1]["role"] == "assistant") != answered:
        messages = messages[:-1]
    if not messages:
        raise BadRow("no assistant turn" if answered else "nothing to answer", columns.text)
    return Conversation(messages, answered)


def read_messages(record: Record, columns: Columns) -> Messages:
    value = record.fields.get(columns.text)
    messages = list(messages_of(value)) if isinstance(value, list) else [message("user", prompt(record, columns))]
    system = record.fields.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, message("system", system))
    if columns.label not in (None, columns.text):
        messages = followed(messages, record.fields.get(columns.label))
    return tuple(messages)


def followed(messages: list[dict[str, str]], answer: Any) -> list[dict[str, str]]:
    """A conversation with its answer: a text, messages, or messages that begin with the conversation."""
    if not isinstance(answer, list):
        return [*messages, message("assistant", answer)]
    answers = messages_of(answer)
    return answers if answers[: len(messages)] == messages else [*messages, *answers]


def prompt(record: Record, columns: Columns) -> str:
    asked = record.fields.get(columns.text)
    if not isinstance(asked, str) or not asked.strip():
        raise BadRow("prompt is not a text", f"{columns.text} = {asked!r}"[:200])
    more = record.fields.get(columns.pair) if columns.pair else None
    return f"{asked}\n\n{more}" if isinstance(more, str) and more.strip() else asked


def messages_of(values: Sequence[Any]) -> list[dict[str, str]]:
    """Of objects with role and content (or from and value), or of plain texts in turn, the user's first."""
    if not values:
        raise BadRow("no message", "the conversation is empty")
    if all(isinstance(value, str) for value in values):
        return [message("assistant" if i % 2 else "user", value) for i, value in enumerate(values)]
    made = []
    for value in values:
        if not isinstance(value, Mapping):
            raise BadRow("message is not an object", f"{value!r}"[:200])
        role = value.get("role", value.get("from"))
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise BadRow("unknown role", f"{role!r}; roles are {', '.join(dict.fromkeys(ROLES.values()))}"[:200])
        made.append(message(ROLES[role.lower()], value.get("content", value.get("value"))))
    return made


def message(role: str, content: Any) -> dict[str, str]:
    if isinstance(content, list):  # OpenAI's parts: a picture among them is nothing we could read
        parts = [c.get("text") if isinstance(c, Mapping) and c.get("type") == "text" else None for c in content]
        content = "".join(p for p in parts if isinstance(p, str)) if parts and None not in parts else None
    if not isinstance(content, str):
        raise BadRow("message is not a text", f"{role}: {content!r}"[:200])
    if not content.strip():
        raise BadRow("empty message", role)
    return {"role": role, "content": content}
