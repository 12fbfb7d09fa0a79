"""Broken files by the thousand: does a reader ever end in anything but rows, quarantined rows or a RonnaError?

    python tests/fuzz.py [FORMAT ...] [--seconds 600] [--seed 0]

Each try takes a sound file of a format, damages it in a few places and reads it. An uncaught exception, or rows
in that are not rows kept and quarantined, is printed with the seed that makes the file again, and the exit code
is 1. The seconds are of processor time, for each format.
"""

import argparse
import csv
import gzip
import io
import itertools
import json
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from ronna.base.errors import RonnaError
from ronna.data.sources import BadRows, read_records

TABLE: list[dict[str, Any]] = [
    {"text": 'He said "no", twice', "label": "1", "id": "7"},
    {"text": "一行中文,逗号", "label": "0", "id": "8"},
    {"text": "line\nbreak\tand tab \U0001f469\u200d\U0001f680", "label": "-3.5e7", "id": ""},
    {"text": "plain words " * 9, "label": "NA", "id": "007"},
]
# What parsers stumble over: ends of things, half characters, other encodings' marks, numbers without end.
SNAGS = [
    b'"', b'""', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r", b"\r\n", b"\t", b";", b"|", b"\0", b" ",
    b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\xed\xa0\x80", b"\\ud83d", b"\\u0000", b"\xc3", b"\xf0\x9f", b"\x85",
    b"\xe2\x80\xa8", b"NaN", b"Infinity", b"-", b"1" * 400, b"1e999", b"null", b"true", b"[" * 200, b'{"a":' * 120,
    b'"text"', b"text,label\n", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1", b"\x1a", b"\x0b\x0c\x1c\x1e",
]  # fmt: skip


def lines() -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TABLE).encode()


def table(delimiter: str) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(TABLE[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(TABLE)
    return out.getvalue().encode()


def parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(TABLE), out)
    return out.getvalue()


def columns() -> bytes:
    words = [
        "EU NNP B-ORG",
        "rejects VBZ O",
        "",
        "# a remark",
        "北京 NR B-LOC",
        "\U0001f469\u200d\U0001f680 SYM O",
        "-DOCSTART- O",
        "",
    ]
    return "\n".join([*words, "Peter NNP I-PER"]).encode()


FORMATS = {
    "a.jsonl": lines,
    "a.json": lambda: json.dumps(TABLE, ensure_ascii=False, indent=1).encode(),
    "a.csv": lambda: table(","),
    "a.tsv": lambda: table("\t"),
    "a.txt": lambda: "\n\n".join(row["text"] for row in TABLE).encode(),
    "a.parquet": parquet,
    "a.jsonl.gz": lambda: gzip.compress(lines(), mtime=0),
    "a.jsonl.zst": lambda: zstandard.ZstdCompressor().compress(lines()),
    "a.conll": columns,
    "a": lines,
}


def damaged(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        length = min(rng.choice((1, 1, 2, 5, 40)), len(data) - at)
        piece = data[at : at + length]
        new = rng.choice((
            b"", piece + piece, piece[::-1], rng.choice(SNAGS), rng.choice(SNAGS) + piece, rng.randbytes(length),
            bytes(b ^ (1 << rng.randrange(8)) for b in piece), data[: rng.randrange(80)],
        ))  # fmt: skip
        data = data[:at] + new + data[at + length :]
    return data[: rng.randrange(len(data) + 1)] if rng.random() < 0.1 else data


def attempt(path: Path) -> str:
    """What reading came to: `rows`, `refused`, or what was wrong with it."""
    bad = BadRows(limit=10**6)
    try:
        kept = sum(1 for _ in read_records(path, bad=bad))
    except RonnaError:
        return "refused"
    except Exception:
        return traceback.format_exc()
    whole = kept == bad.kept and bad.rows_in == kept + bad.quarantined
    return "rows" if whole else f"{bad.rows_in} rows in, {kept} kept ({bad.kept} counted), {bad.quarantined} aside"


def fuzz(name: str, seconds: float, seed: int, folder: Path) -> Counter[str]:
    sound, path = FORMATS[name](), folder / name

    def once(rng: random.Random) -> str:
        path.write_bytes(damaged(sound, rng))
        return attempt(path)

    return tries(once, name, seconds, seed, expected={"rows", "refused"})


def tries(
    once: Callable[[random.Random], str], name: str, seconds: float, seed: int, expected: set[str]
) -> Counter[str]:
    """Outcomes of as many tries as fit; any but the expected ones is printed, and counted as wrong."""
    outcomes, end = Counter[str](), time.process_time() + seconds
    for i in itertools.count():
        if time.process_time() > end:
            return outcomes
        outcome = once(random.Random(f"{name}/{seed}/{i}"))
        if outcome not in expected:
            print(f"{name}, seed {seed}, try {i}:\n{outcome}", flush=True)
            outcome = "wrong"
        outcomes[outcome] += 1
    raise AssertionError


def command(what: str, names: Collection[str], fuzz: Callable[[str, float, int, Path], Counter[str]]) -> int:
    """Fuzzes those that the command line names, or all; the exit code."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*names, []], metavar="NAME", help=", ".join(names))
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in a.names or names:
            outcomes = fuzz(name, a.seconds, a.seed, Path(folder))
            print(f"{name}: {dict(outcomes)}", flush=True)
            wrong += outcomes["wrong"]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(command(str(__doc__), FORMATS, fuzz))
