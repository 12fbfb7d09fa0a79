"""Labelled records: which files are which split, their rows, and the account of what happened to them."""

import hashlib
from pathlib import Path
from typing import Any

from ronna.base.errors import RonnaError
from ronna.base.track import say
from ronna.data.badrows import BadRows
from ronna.data.sources import find_splits, read_records, resolve
from ronna.runfile import RecordsConfig
from ronna.tasks.base import Row, Task, read_rows, unfolded
from ronna.tasks.schema import overlap, peek


def resolve_splits(data: RecordsConfig) -> dict[str, list[Path]]:
    """Files by split; a folder given as `train` brings its validation and test along."""
    found: dict[str, list[Path]] = {}
    if Path(data.train).is_dir():
        found = find_splits(data.train)
    else:
        found["train"] = resolve(data.train)
    if data.validation:
        found["validation"] = resolve(data.validation)
    if data.test:
        found["test"] = resolve(data.test)
    if not found.get("train"):
        raise RonnaError("no training split", where=data.train, fix="name the files train.*, validation.*, test.*")
    return found


def read_splits(
    task: type[Task], splits: dict[str, list[Path]], data: RecordsConfig, out: Path
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """The task's rows of every split, and the account of what happened to them."""
    rows: dict[str, list[Any]] = {}
    account: dict[str, Any] = {}
    for name, paths in splits.items():
        quarantine = out / f"quarantine-{name}.jsonl"
        bad = BadRows(limit=data.max_bad_rows, quarantine_file=quarantine)
        first, records = peek(unfolded(task, read_records(paths, bad=bad), bad))
        assert first is not None  # an empty file has been refused
        columns = task.columns(first, text=data.text, pair=data.text_pair, label=data.label)
        if name == "train":
            say(f"columns: {columns}")
        rows[name] = list(read_rows(task, records, columns, bad))
        account[name] = bad.summary()
    if "validation" not in rows:
        every = rows["train"]
        rows["train"], rows["validation"] = hold_out(every)
        if every and not (rows["train"] and rows["validation"]):
            what = f"{len(every)} rows, or rows of one text, are too few to hold a tenth out of"
            raise RonnaError(what, where=data.train, fix="name a file to validate with: --validation FILE")
    if data.limit:
        rows["train"] = rows["train"][: data.limit]
    for name, some in rows.items():
        if not some:
            raise RonnaError(f"the {name} split has no usable row", fix="look at the quarantine file in the out folder")
    shared = overlap({n: (r.key for r in some) for n, some in rows.items()})
    shared = {pair: n for pair, n in shared.items() if pair.startswith("train/")}
    if shared and not data.allow_overlap:
        raise RonnaError(
            "training texts stand in held-out data: " + ", ".join(f"{n} in {pair}" for pair, n in shared.items()),
            where=data.train,
            fix="remove them from one side, or accept it with --allow-overlap",
        )
    return rows, {**account["train"], "overlap": shared, "splits": account}


def hold_out(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Nine tenths and one tenth, by a hash of the first text, so that twins stay on one side."""
    firsts = [row.key.partition("\0")[0] for row in rows]
    held = [hashlib.blake2b(text.encode(), digest_size=2).digest() < b"\x19\x99" for text in firsts]
    return [r for r, h in zip(rows, held, strict=True) if not h], [r for r, h in zip(rows, held, strict=True) if h]
