"""Delimited tables (CSV, TSV) into rows."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from ronna.base.errors import RonnaError
from ronna.data.badrows import BadRow
from ronna.data.files import MAX_ROW_BYTES, peek, read_lines
from ronna.data.formats import Row


def parse_csv(path: Path, *, delimiter: str, header: bool | None, quoted: bool) -> Iterator[Row]:
    """Delimited values (RFC 4180), every cell a string as it stands, a blank cell None.

    `header` None: the first row is a header when its cells are short and no numbers; without a header the
    columns are named "0", "1", ... Raises RonnaError for an unclosed quote and for two columns of
    one name.
    """
    # The csv module's limit of 128 KiB a cell would refuse long documents; ours is on the row.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    names: list[str] | None = None
    for line, cells in _cells(path, delimiter, quoted):
        if isinstance(cells, BadRow):
            yield Row(line, cells)
            continue
        if names is None:
            has_header = _looks_like_header(cells) if header is None else header
            names = cells if has_header else [str(i) for i in range(len(cells))]
            if has_header:
                _check_header(path, line, cells)
                continue
        yield _csv_row(line, cells, names, delimiter)


class _Decoded:
    """Lines for the csv module, which asks for one more as long as a quote is open; tells how far it got."""

    def __init__(self, path: Path):
        self.lines, self.number, self.end, self.exhausted = read_lines(path), 0, 0, False

    def __iter__(self) -> Iterator[str]:
        for number, start, data in self.lines:
            self.number, self.end = number, start + len(data)
            # Bad bytes become lone surrogates, so that they can be pinned on their own row.
            yield data.decode("utf-8", "surrogateescape")
        self.exhausted = True


def _cells(path: Path, delimiter: str, quoted: bool) -> Iterator[tuple[int, list[str] | BadRow]]:
    lines = _Decoded(path)
    rows = csv.reader(
        iter(lines),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,
    )
    while True:
        first, start = lines.number + 1, lines.end
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            # A quote that ran over the end of its line has swallowed rows: no later row can be trusted.
            if lines.exhausted or lines.number > first:
                raise RonnaError(
                    f"unclosed quote: {error}",
                    where=f"{path}:{first}:{start}",
                    fix='close the quote, or read with quoted=false if " is an ordinary character here',
                ) from None
            yield first, BadRow("malformed CSV", str(error))
            continue
        if cells:
            yield first, cells


def _csv_row(line: int, cells: list[str], names: list[str], delimiter: str) -> Row:
    raw = delimiter.join(cells)
    if len(cells) > len(names):
        return Row(line, BadRow("extra column", f"{len(cells)} cells, {len(names)} columns"), raw)
    if len(cells) < len(names):
        return Row(line, BadRow("short row", f"{len(cells)} cells, {len(names)} columns"), raw)
    if "\0" in raw:
        return Row(line, BadRow("raw NUL byte"), raw)
    try:
        raw.encode("utf-8")
    except UnicodeEncodeError:
        return Row(line, BadRow("bad UTF-8"), raw.encode("utf-8", "surrogateescape"))
    return Row(line, {name: cell or None for name, cell in zip(names, cells, strict=True)})


def _looks_like_header(cells: list[str]) -> bool:
    number = re.compile(r"[-+]?\d+([.,]\d+)*")
    return all(cell.strip() and len(cell) <= 64 and not number.fullmatch(cell.strip()) for cell in cells)


def _check_header(path: Path, line: int, cells: list[str]) -> None:
    twice = sorted({cell for cell in cells if cells.count(cell) > 1})
    if twice:
        raise RonnaError(
            f"two columns are named {twice[0]!r}", where=f"{path}:{line}:0", fix="rename one in the header"
        )


def refuse_other_delimiter(path: Path, delimiter: str) -> None:
    """Raises RonnaError when `delimiter` finds one column where another character finds several."""
    lines = [line for line in peek(path).decode("utf-8", "replace").splitlines()[:2] if line.strip()]
    if any(delimiter in line for line in lines):
        return
    for other in ",\t;|":
        columns = {line.count(other) + 1 for line in lines}
        if len(columns) == 1 and columns != {1}:
            raise RonnaError(
                f"wrong delimiter: {delimiter!r} gives 1 column, {other!r} gives {columns.pop()}",
                where=f"{path}:1:0",
                fix=f"read with delimiter={other!r}",
            )
