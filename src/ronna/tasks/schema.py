"""Which columns of a user's records a task reads: guessed from their names, said, or named by the user."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from ronna.base.errors import RonnaError
from ronna.data.badrows import BadRow
from ronna.data.sources import Record

TEXTS = (
    "text",
    "sentence",
    "text_a",
    "sentence1",
    "premise",
    "question1",
    "query",
    "review",
    "content",
    "title",
)
PAIRS = ("text_b", "text_pair", "sentence2", "hypothesis", "question2", "document", "answer")
LABELS = ("label", "labels", "score", "class", "category", "intent", "sentiment", "target", "topic", "rating")


class Usual(NamedTuple):
    """The names that columns of a task usually have, the likeliest first."""

    texts: Sequence[str]
    pairs: Sequence[str] = ()
    labels: Sequence[str] = ()
    called: str = "text"  # what the first text is to the task


CLASSIFIED = Usual(TEXTS, PAIRS, LABELS)


class Columns(NamedTuple):
    text: str
    pair: str | None
    label: str | None

    def __str__(self) -> str:
        return ", ".join(f"{role}={name}" for role, name in self._asdict().items() if name)


def choose(role: str, named: str | None, candidates: Sequence[str], fields: Sequence[str], where: str) -> str | None:
    """The user's column, which must exist, or the first candidate that does."""
    if named is None:
        return next((c for c in candidates if c in fields), None)
    if named in fields:
        return named
    near = difflib.get_close_matches(named, fields, n=1)
    raise RonnaError(
        f"no column {named!r} for data.{role}" + (f"; did you mean {near[0]!r}?" if near else ""),
        where=where,
        fix=f"the columns are {', '.join(fields)}",
    )


def find_columns(
    record: Record,
    *,
    text: str | None,
    pair: str | None,
    label: str | None,
    need_label: bool = True,
    usual: Usual = CLASSIFIED,
) -> Columns:
    """Columns by the user's names, else by the usual ones. Raises RonnaError when none fits."""
    fields, where = list(record.fields), str(record.path)
    text_column = choose("text", text, usual.texts, fields, where)
    # A guessed second text must look like one: a first text named by the user stands alone.
    pairs = () if text is not None else usual.pairs
    pair_column = choose("text_pair", pair, [p for p in pairs if isinstance(record.fields.get(p), str)], fields, where)
    label_column = choose("label", label, usual.labels, fields, where)
    for role, column, needed in (("text", text_column, True), ("label", label_column, need_label)):
        if column is None and needed:
            called = usual.called if role == "text" else role
            raise RonnaError(
                f"no column looks like a {called}; the columns are {', '.join(fields)}",
                where=where,
                fix=f"name it: --set data.{role}=COLUMN",
            )
    assert text_column is not None
    return Columns(text_column, pair_column, label_column)


def usable_text(record: Record, column: str) -> str:
    """Raises BadRow for what is not a string, or is an empty one."""
    value = record.fields.get(column)
    if not isinstance(value, str):
        raise BadRow("text is not a string", f"{column} = {value!r}"[:200])
    if not value.strip():
        raise BadRow("empty text", column)
    return value


def peek(records: Iterable[Record]) -> tuple[Record | None, Iterable[Record]]:
    """The first record without losing it."""
    stream = iter(records)
    first = next(stream, None)
    return first, stream if first is None else chain([first], stream)


def overlap(left: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """How many distinct texts two splits share, by "a/b" for every pair of splits."""
    sets = {name: set(texts) for name, texts in left.items()}
    names = list(sets)
    return {
        f"{a}/{b}": len(sets[a] & sets[b]) for i, a in enumerate(names) for b in names[i + 1 :] if sets[a] & sets[b]
    }
