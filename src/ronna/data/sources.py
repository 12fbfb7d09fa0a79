"""Records out of files: text, JSON Lines, JSON, CSV, TSV and Parquet, each bad row accounted for.

Policy: reading changes no character. Text is never normalised here (NFC and NFKC belong to cleaning);
rows whose text a normal form would change are kept as written and counted in `BadRows.policies`.
"""

import difflib
import math
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO, get_args

from ronna.base.errors import RonnaError
from ronna.data.badrows import BadRow, BadRows, Record
from ronna.data.files import find_splits, recognise, resolve
from ronna.data.formats import (
    Row,
    TextUnit,
    parse_conll,
    parse_json,
    parse_json_lines,
    parse_jsonl,
    parse_parquet,
    parse_text,
)
from ronna.data.tables import parse_csv, refuse_other_delimiter

__all__ = ["BadRow", "BadRows", "Record", "find_splits", "read_json_stream", "read_records", "require", "resolve"]

INTEGER = re.compile(r"[-+]?[0-9]+")
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


def read_records(
    paths: str | Path | Sequence[str | Path],
    *,
    bad: BadRows,
    fmt: str = "auto",
    columns: Mapping[str, str] | None = None,
    text_unit: TextUnit = "auto",
    delimiter: str | None = None,
    header: bool | None = None,
    quoted: bool = True,
) -> Iterator[Record]:
    """Records of files, folders and globs in order, streaming; bad rows go to `bad`.

    `columns` {"text": "review"} gives the file's `review` as `text`. `text_unit` is for plain text;
    `delimiter`, `header` and `quoted` for CSV and TSV. Raises RonnaError with path:line:byte for a file that
    cannot be read at all (empty, UTF-16, wrong delimiter, unclosed quote, damaged compression), and with
    path:line for the first bad row over `bad.limit`.
    """
    for path in resolve(paths):
        found = recognise(path, fmt)
        typed = found not in ("csv", "tsv")
        before = bad.rows_in
        for row in _rows(path, found, text_unit, delimiter, header, quoted):
            bad.rows_in += 1
            fields = _rename(row.fields, columns)
            if isinstance(fields, BadRow):
                bad.quarantine(path, row.line, fields, row.raw)
                continue
            _count_policies(fields, bad)
            yield Record(fields, path, row.line, typed)
        if bad.rows_in == before:
            raise RonnaError("the file holds no row", where=f"{path}:1:0", fix="remove it or write it again")


def read_json_stream(stream: BinaryIO, name: str, *, bad: BadRows) -> Iterator[Record]:
    """Records of JSON Lines that arrive on a pipe, each as soon as its line has come; bad rows go to `bad`."""
    for row in parse_json_lines(enumerate(stream, 1)):
        bad.rows_in += 1
        if isinstance(row.fields, BadRow):
            bad.quarantine(Path(name), row.line, row.fields, row.raw)
        else:
            yield Record(row.fields, Path(name), row.line)


def _rows(
    path: Path, fmt: str, text_unit: TextUnit, delimiter: str | None, header: bool | None, quoted: bool
) -> Iterator[Row]:
    match fmt:
        case "jsonl":
            return parse_jsonl(path)
        case "json":
            return parse_json(path)
        case "parquet":
            return parse_parquet(path)
        case "text":
            return parse_text(path, text_unit)
        case "conll":
            return parse_conll(path)
        case _:
            if delimiter is None:
                delimiter = "\t" if fmt == "tsv" else ","
                refuse_other_delimiter(path, delimiter)
            return parse_csv(path, delimiter=delimiter, header=header, quoted=quoted)


def _rename(fields: dict[str, Any] | BadRow, columns: Mapping[str, str] | None) -> dict[str, Any] | BadRow:
    if isinstance(fields, BadRow) or not columns:
        return fields
    for theirs in columns.values():
        if theirs not in fields:
            return _missing(theirs, fields)
    others = {name: value for name, value in fields.items() if name not in columns.values()}
    return others | {ours: fields[theirs] for ours, theirs in columns.items()}


def _missing(name: str, fields: Collection[str]) -> BadRow:
    near = difflib.get_close_matches(name, fields, n=1)
    there = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(map(repr, fields)) or 'none'}"
    return BadRow(f"missing field {name!r}", there)


def _count_policies(fields: dict[str, Any], bad: BadRows) -> None:
    texts = [value for value in fields.values() if isinstance(value, str) and not value.isascii()]
    if not all(unicodedata.is_normalized("NFC", text) for text in texts):
        bad.policies["not NFC, kept as written"] += 1
    if not all(unicodedata.is_normalized("NFKC", text) for text in texts):
        bad.policies["not NFKC, kept as written"] += 1


def require(
    record: Record, fields: Mapping[str, type | UnionType], *, others: Collection[str] | None = ()
) -> dict[str, Any]:
    """The named fields of a record, checked. Raises BadRow for a missing, null, mistyped or extra field.

    {"text": str, "label": int | None}: a union with None allows null. `others` are names a record may also
    carry; None allows any. A whole number passes for float, a bool never for a number, NaN and infinity for
    nothing. In CSV and TSV, `int` and `float` read the cell, and a blank cell is null.
    """
    if others is not None:
        extra = record.fields.keys() - fields.keys() - set(others)
        if extra:
            raise BadRow("extra field", ", ".join(sorted(extra)))
    return {name: _checked(record, name, kind) for name, kind in fields.items()}


def _checked(record: Record, name: str, kind: type | UnionType) -> Any:
    if name not in record.fields:
        raise _missing(name, record.fields)
    value = record.fields[name]
    kinds = get_args(kind) or (kind,)
    if value is None:
        if type(None) in kinds:
            return None
        raise BadRow(f"null field {name!r}")
    if not record.typed and str not in kinds:
        value = _number(value, kinds)
    elif float in kinds and type(value) is int:
        value = float(value)
    wrong_bool = isinstance(value, bool) and bool not in kinds
    if wrong_bool or not isinstance(value, kinds):
        wanted = " or ".join(k.__name__ for k in kinds)
        raise BadRow(f"wrong type of field {name!r}", f"wanted {wanted}, found {_shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"field {name!r} is not finite", str(value))
    return value


def _number(cell: str, kinds: tuple[type, ...]) -> Any:
    """A cell as a number of one of `kinds`, or as it was. (int() alone would also take '1_000' and ' 1'.)"""
    if int in kinds and INTEGER.fullmatch(cell):
        return int(cell)
    if float in kinds and NUMBER.fullmatch(cell):
        return float(cell)
    return cell


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
