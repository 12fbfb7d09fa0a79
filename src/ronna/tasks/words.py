"""Sentences as words with tags: what records of named entities look like, and where their words stand.

A record has words and tags side by side, or a text and the characters that each entity covers.
"""

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from ronna.base.errors import RonnaError
from ronna.data.badrows import BadRow
from ronna.data.sources import Record
from ronna.tasks.schema import Columns
from ronna.tasks.tags import Span, spans_of

# Scripts that write no spaces; each character of theirs is a word.
UNSPACED = re.compile(r"[\u2e80-\u312f\u31a0-\u31bf\u31f0-\ua4cf\uf900-\ufaff\U00020000-\U0003ffff]")
PIECE = re.compile(rf"{UNSPACED.pattern}|(?:(?!{UNSPACED.pattern})\S)+")

Extent = tuple[int, int]  # characters [start, end)


class Sentence(NamedTuple):
    """A row of the task. `given` says that the words came as words, not as a text."""

    text: str
    words: tuple[Extent, ...]
    label: tuple[Span, ...] | None
    given: bool
    repaired: int = 0  # entities that began with I

    @property
    def key(self) -> str:
        return self.text


def words_of(text: str) -> Iterator[Extent]:
    """Words of a plain text: what spaces part, without the punctuation at its ends, which stands alone."""
    for piece in PIECE.finditer(text):
        start, end = piece.span()
        while start < end and not is_wordlike(text[start]):
            yield start, start + 1
            start += 1
        tail = end
        while tail > start and not is_wordlike(text[tail - 1]):
            tail -= 1
        if tail > start:
            yield start, tail
        yield from ((i, i + 1) for i in range(tail, end))


def is_wordlike(char: str) -> bool:
    """Letters, digits, marks that sit on them, and currency and other symbols: all but punctuation."""
    return not unicodedata.category(char).startswith("P")


def joined(words: Sequence[str]) -> Sentence:
    """Unlabelled words as one text: run together if most are of a script without spaces."""
    unspaced = sum(bool(UNSPACED.match(w)) for w in words)
    between = "" if 2 * unspaced > len(words) else " "
    extents, at = [], 0
    for word in words:
        extents.append((at, at + len(word)))
        at += len(word) + len(between)
    return Sentence(between.join(words), tuple(extents), None, True)


def read_sentence(record: Record, columns: Columns) -> Sentence:
    """Raises BadRow for a record that is not one; RonnaError for tags of no scheme."""
    value = record.fields.get(columns.text)
    answer = record.fields.get(columns.label) if columns.label else None
    if columns.label and answer is None:
        raise BadRow("no label", f"{columns.label} is empty")
    if isinstance(value, str) and isinstance(answer, str):  # of a table: both in one cell
        value, answer = value.split(), answer.split()
    if isinstance(value, list):
        sentence = joined([usable_word(word, columns.text) for word in value])
        return sentence if answer is None else tagged(sentence, answer, columns, record)
    if not isinstance(value, str):
        raise BadRow("neither words nor a text", f"{columns.text} = {value!r}"[:200])
    if not value.strip():
        raise BadRow("empty text", columns.text)
    if answer is None:
        return Sentence(value, tuple(words_of(value)), None, False)
    return covered(value, list(entities(answer, value)))


def usable_word(word: Any, column: str) -> str:
    if not isinstance(word, str) or not word.strip():
        raise BadRow("a word is empty or not a string", f"{word!r} in {column}"[:200])
    return word


def tagged(sentence: Sentence, tags: Any, columns: Columns, record: Record) -> Sentence:
    if not isinstance(tags, list) or len(tags) != len(sentence.words):
        count = f"{len(tags)} tags" if isinstance(tags, list) else "no list of tags"
        raise BadRow("words and tags differ in number", f"{len(sentence.words)} words, {count}")
    try:
        spans, repaired = spans_of([str(tag) for tag in tags])
    except ValueError as error:
        raise RonnaError(
            str(error),
            where=f"{record.path}:{record.line}",
            fix=f"write {columns.label} as BIO, BIOES, BMES or BILOU tags by name",
        ) from None
    return sentence._replace(label=tuple(spans), repaired=repaired)


class Covered(NamedTuple):
    """An entity as its characters [start, end)."""

    start: int
    end: int
    type: str


def entities(answer: Any, text: str) -> Iterator[Covered]:
    """[{"start", "end", "label"}, ...], [[start, end, label], ...] or {label: {surface: [[first, last], ...]}}.

    The last is CLUENER's, whose ends are inclusive.
    """
    if isinstance(answer, Mapping):
        for kind, surfaces in answer.items():
            for surface, places in surfaces.items() if isinstance(surfaces, Mapping) else bad_span(surfaces):
                for place in places if isinstance(places, list) else bad_span(places):
                    match place:
                        case [int(first), int(last)]:
                            yield usable_span([first, last + 1, kind], text, surface)
                        case _:
                            bad_span(place)
        return
    if not isinstance(answer, list):
        bad_span(answer)
    for entity in answer:
        if isinstance(entity, Mapping):
            kind = next((entity[name] for name in ("label", "type", "entity", "tag") if name in entity), None)
            yield usable_span([entity.get("start"), entity.get("end"), kind], text, entity.get("text"))
        else:
            yield usable_span(entity, text, None)


def bad_span(value: Any) -> Any:
    raise BadRow("entity without start, end and label", f"{value!r}"[:200])


def usable_span(values: Any, text: str, surface: Any) -> Covered:
    match values:
        case [int(start), int(end), str(kind)] if kind:
            if not 0 <= start < end <= len(text):
                raise BadRow("entity outside its text", f"characters {start} to {end} of {len(text)}")
            if isinstance(surface, str) and text[start:end] != surface:
                raise BadRow("entity is not what its place says", f"{surface!r}, there it is {text[start:end]!r}"[:200])
            return Covered(start, end, kind)
    return bad_span(values)


def covered(text: str, found: Iterable[Covered]) -> Sentence:
    """Words of a text, cut also where entities begin and end, and the spans of words that these cover."""
    entities = sorted(found)
    for before, after in pairwise(entities):
        if after.start < before.end:
            raise BadRow("entities overlap", f"{before} and {after}"[:200])
    cuts = sorted({edge for entity in entities for edge in entity[:2]})
    words: list[Extent] = []
    for start, end in words_of(text):
        edges = [start, *cuts[bisect_right(cuts, start) : bisect_left(cuts, end)], end]
        words += pairwise(edges)
    starts, ends = [a for a, _ in words], [b for _, b in words]
    spans = []
    for entity in entities:
        first, last = bisect_left(starts, entity.start), bisect_right(ends, entity.end)
        if first >= last:
            raise BadRow("entity without a word", f"{text[entity.start : entity.end]!r}")
        spans.append(Span(first, last, entity.type))
    return Sentence(text, tuple(words), tuple(spans), False)
