"""Parsers: a file in, rows out. A row that cannot be used comes out as its `BadRow`, so nothing is lost."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from ronna.base.errors import RonnaError
from ronna.data.badrows import BadRow
from ronna.data.files import (
    BOM,
    MAX_ROW_BYTES,
    TAGGED,
    damaged,
    open_bytes,
    peek,
    read_errors,
    read_lines,
    refuse_length,
    refuse_utf16,
)

TextUnit = Literal["auto", "line", "paragraph", "file"]

MAX_DEPTH = 100
SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")


class Row(NamedTuple):
    """One row: the line it starts on, its fields or what is wrong with it, and then also its raw text."""

    line: int
    fields: dict[str, Any] | BadRow
    raw: str | bytes = ""


def parse_jsonl(path: Path) -> Iterator[Row]:
    """JSON Lines: an object a line; blank lines are not rows. Memory: at most four times the longest line."""
    yield from parse_json_lines((number, data) for number, _, data in read_lines(path))


def parse_json_lines(lines: Iterable[tuple[int, bytes]]) -> Iterator[Row]:
    """Numbered lines with their ends, of a file or a stream."""
    decoder = _decoder()
    for number, data in lines:
        if data.isspace():
            continue
        try:
            row = Row(number, _object(_decode_json(data, decoder)))
        except BadRow as bad:
            if bad.reason == "malformed JSON" and not data.endswith(b"\n"):
                bad = BadRow("truncated last line", bad.detail)
            row = Row(number, bad, data)
        yield row


def _decode_json(data: bytes, decoder: json.JSONDecoder) -> Any:
    """One JSON value from UTF-8 bytes. Raises BadRow, also where Python's reader is laxer than RFC 8259:

    it takes NaN, keeps the last of two equal keys, and gives lone surrogates that no file can hold.
    """
    text = decode(data)
    try:
        value = decoder.decode(text)
    except RecursionError:
        raise BadRow("nested too deep", f"over {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise BadRow("malformed JSON", str(error)) from None
    _refuse_deep(value, data.count(b"[") + data.count(b"{"))
    if SURROGATE_ESCAPE.search(data):
        _refuse_surrogates(value)
    return value


def decode(data: bytes) -> str:
    """Text from UTF-8 bytes. Raises BadRow for anything else and for NUL bytes."""
    if b"\0" in data:
        raise BadRow("raw NUL byte", f"byte {data.index(0)} of the row")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow("bad UTF-8", f"byte {error.start} of the row: {error.reason}") from None


def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise BadRow("duplicate key", next(key for key in keys if keys.count(key) > 1))
    return fields


def _constant(name: str) -> None:
    raise BadRow("malformed JSON", f"{name} is not JSON")


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRow("not an object", f"a row is {{...}}, found {type(value).__name__}")
    return value


def _refuse_deep(value: Any, brackets: int) -> None:
    if brackets <= MAX_DEPTH:
        return
    level, depth = [value], 0
    while level:
        children = (v.values() if isinstance(v, dict) else v for v in level)
        level = [child for inner in children for child in inner if isinstance(child, dict | list)]
        depth += 1
        if depth > MAX_DEPTH:
            raise BadRow("nested too deep", f"over {MAX_DEPTH} levels")


def _refuse_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("lone surrogate", f"\\u{ord(error.object[error.start]):04x} without its pair") from None


def parse_json(path: Path) -> Iterator[Row]:
    """A JSON file: an array of objects, or objects one after another. The file is held in memory.

    Raises RonnaError for malformed JSON: where one row cannot be read, nobody knows where the next begins.
    """
    text = _whole_text(path)
    at = _skip(text, 0)
    inside = text.startswith("[", at)
    at += inside
    line, counted, decoder = 1, 0, _decoder()
    while True:
        at = _skip(text, at)
        if at == len(text) or (inside and text[at] == "]"):
            break
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except (BadRow, RecursionError, ValueError) as error:
            _refuse_json(path, line, text, at, error)
        yield _json_row(line, value, text, at, end)
        at = _skip(text, end)
        if inside and text[at : at + 1] == ",":
            at += 1
        elif inside and text[at : at + 1] != "]":
            _refuse_json(path, line, text, at, ValueError("expected ',' or ']' after a row"))
    if inside and text[at:].rstrip() != "]":
        _refuse_json(path, line, text, at, ValueError("the array is not closed, or something follows it"))


def _json_row(line: int, value: Any, text: str, at: int, end: int) -> Row:
    try:
        _refuse_deep(value, text.count("[", at, end) + text.count("{", at, end))
        _refuse_surrogates(value)
        return Row(line, _object(value))
    except BadRow as bad:
        return Row(line, bad, text[at:end])


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _refuse_json(path: Path, line: int, text: str, at: int, error: Exception) -> NoReturn:
    byte = len(text[:at].encode("utf-8", "surrogatepass"))
    raise RonnaError(
        f"malformed JSON: {error}",
        where=f"{path}:{line}:{byte}",
        fix="mend the file, or convert it to JSON Lines, where one bad row can be set aside",
    ) from None


def _whole_text(path: Path) -> str:
    data = _whole(path)
    try:
        return decode(data)
    except BadRow as bad:
        raise RonnaError(str(bad), where=f"{path}:1:0", fix="save the file as UTF-8") from None


def _whole(path: Path) -> bytes:
    refuse_utf16(path)
    try:
        with open_bytes(path) as file:
            data = file.read(MAX_ROW_BYTES + 1)
    except read_errors() as error:
        raise damaged(path, 1, 0, error) from error
    if len(data) > MAX_ROW_BYTES:
        refuse_length(path, 1, 0)
    return data.removeprefix(BOM)


def parse_text(path: Path, unit: TextUnit) -> Iterator[Row]:
    """Plain text as `{"text": ...}`: a document is a line, a run of lines between blank ones, or the file.

    "auto" means paragraphs if the head of the file has a blank line, else lines (One Billion Word and most
    sentence corpora have none). Lines of a paragraph are joined by a newline; nothing else is touched.
    """
    if unit == "auto":
        unit = "paragraph" if BLANK_LINE.search(peek(path)) else "line"
    if unit == "file":
        data = _whole(path)
        if data and not data.isspace():
            yield _text_row(1, data)
        return
    first, start, lines, size = 1, 0, list[bytes](), 0
    for line in read_lines(path):
        content = not line.data.isspace()
        if content:
            if not lines:
                first, start, size = line.number, line.start, 0
            lines.append(line.data.rstrip(b"\r\n"))
            size += len(line.data)
            if size > MAX_ROW_BYTES:
                refuse_length(path, first, start)
        if lines and (unit == "line" or not content):
            yield _text_row(first, b"\n".join(lines))
            lines = []
    if lines:
        yield _text_row(first, b"\n".join(lines))


def _text_row(line: int, data: bytes) -> Row:
    try:
        return Row(line, {"text": decode(data)})
    except BadRow as bad:
        return Row(line, bad, data)


def parse_conll(path: Path) -> Iterator[Row]:
    """CoNLL columns as `{"tokens": [...], "tags": [...]}`: the first column and the last, a sentence a row.

    Blank lines part sentences; lines of -DOCSTART- and comments (# without a tag at the end) are not words. Without
    a second column there are no tags.
    """
    first, lines = 1, list[bytes]()
    size = 0
    for line in read_lines(path):
        if not line.data.isspace():
            if not lines:
                first, size = line.number, 0
            lines.append(line.data)
            size += len(line.data)
            if size > MAX_ROW_BYTES:
                refuse_length(path, first, line.start)
        elif lines:
            yield from _conll_row(first, lines)
            lines = []
    if lines:
        yield from _conll_row(first, lines)


def _conll_row(line: int, lines: list[bytes]) -> Iterator[Row]:
    raw = b"".join(lines)
    try:
        columns = [text.split() for text in decode(raw).split("\n") if text.strip() and not _is_remark(text)]
        if not columns:
            return
        if len({len(c) > 1 for c in columns}) > 1:
            bare = next(c[0] for c in columns if len(c) == 1)
            raise BadRow("a word without a tag", repr(bare))
        tags = {"tags": [c[-1] for c in columns]} if len(columns[0]) > 1 else {}
        yield Row(line, {"tokens": [c[0] for c in columns], **tags})
    except BadRow as bad:
        yield Row(line, bad, raw)


def _is_remark(line: str) -> bool:
    return line.startswith("-DOCSTART-") or (line.startswith("#") and not TAGGED.fullmatch(line.encode()))


def parse_parquet(path: Path) -> Iterator[Row]:
    """Parquet, a batch of rows at a time; the line is the row number from 1."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in range(batch.num_rows):
                    number += 1
                    yield _parquet_row(number, batch.slice(row, 1))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise RonnaError(
            f"cannot be read as Parquet: {error}", where=f"{path}:{number + 1}", fix="fetch or write it again"
        ) from None


def _parquet_row(number: int, batch: Any) -> Row:
    try:
        return Row(number, batch.to_pylist()[0])
    except UnicodeDecodeError as error:
        return Row(number, BadRow("bad UTF-8", error.reason))
