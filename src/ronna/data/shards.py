"""Tokenized documents on disk: written once, whole or not at all, then read through memory maps.

tokens-00000.bin   token ids, uint16 (uint32 for a vocabulary over 65,536), little endian
ends-00000.bin     int64: where each document of the shard ends, in tokens
manifest.json      written last; a folder without it is unfinished
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ronna.base.errors import RonnaError
from ronna.data.manifest import (
    MANIFEST,
    PROGRESS,
    RESTORE,
    Identity,
    Manifest,
    Shard,
    ends_name,
    load_manifest,
    read_progress,
    tokens_name,
    write_manifest,
    write_progress,
)
from ronna.data.shard_writer import ShardWriter

Ids = Sequence[int] | np.ndarray


def write_shards(
    out: str | Path,
    documents: Iterable[Ids],
    *,
    vocab_size: int,
    tokenizer_hash: str,
    source_hash: str,
    shard_tokens: int = 2**26,
    meta: dict[str, Any] | None = None,
    first: int = 0,
) -> Manifest:
    """Writes the token ids of each document, and the manifest when all are written.

    Killed at any moment and called again with the same arguments, it goes on after the last whole shard and
    leaves the same bytes. It skips documents that are written already; a caller that can start later passes
    `first`, the number of the first of `documents`, at most `documents_done(out)`. A document is never split:
    a shard is closed before the document that would take it over `shard_tokens`. Empty documents are kept.

    `meta` is any JSON, part of the folder's identity. Raises RonnaError for an id outside the vocabulary
    (with the document's number), no documents, a folder that holds something else, and a full disk.
    """
    out = Path(out)
    plain_meta = json.loads(json.dumps(meta or {}))  # as it will be read back: tuples become lists
    identity = Identity(vocab_size, tokenizer_hash, source_hash, shard_tokens, plain_meta)
    if (out / MANIFEST).exists():
        identity.check(load_manifest(out).identity, out)
        (out / PROGRESS).unlink(missing_ok=True)
        return Shards(out).manifest
    _make_folder(out)
    shards = _whole_shards(out, identity)
    done = sum(shard.documents for shard in shards)
    if first > done:
        raise RonnaError(
            f"documents {done} to {first - 1} are neither written nor given",
            where=str(out),
            fix="start at documents_done(out)",
        )
    rest = islice(documents, done - first, None)
    shards += _write_rest(out, rest, identity, shards, done)
    if not shards:
        raise RonnaError("no documents to write", where=str(out), fix="check the input and the filters before")
    manifest = Manifest(identity, tuple(shards))
    write_manifest(out, manifest)
    (out / PROGRESS).unlink(missing_ok=True)
    return manifest


def documents_done(out: str | Path) -> int:
    """How many documents are already written for good, of a folder finished or not (0 if there is none)."""
    out = Path(out)
    if (out / MANIFEST).exists():
        return load_manifest(out).documents
    progress = read_progress(out)
    return 0 if progress is None else sum(shard.documents for shard in _unharmed(out, *progress))


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RonnaError(
            error.strerror or str(error), where=str(out), fix="choose a folder that can be written"
        ) from None


def _whole_shards(out: Path, identity: Identity) -> list[Shard]:
    progress = read_progress(out)
    if progress is None:
        strange = sorted(path.name for path in out.iterdir() if not path.name.endswith(".tmp"))
        if strange:
            raise RonnaError(
                f"the folder is not empty ({strange[0]})", where=str(out), fix="choose another or empty it"
            )
        write_progress(out, identity, [])
        return []
    identity.check(progress[0], out)
    return _unharmed(out, *progress)


def _unharmed(out: Path, identity: Identity, shards: list[Shard]) -> list[Shard]:
    """The shards up to the first whose files are gone or of another size."""
    for number, shard in enumerate(shards):
        for name, size in shard.sizes(number, identity.dtype):
            if not (out / name).is_file() or (out / name).stat().st_size != size:
                return shards[:number]
    return shards


def _write_rest(
    out: Path, documents: Iterable[Ids], identity: Identity, before: list[Shard], number: int
) -> list[Shard]:
    shards: list[Shard] = []
    writer: ShardWriter | None = None

    def close(writer: ShardWriter) -> None:
        shards.append(writer.close())
        write_progress(out, identity, before + shards)

    for document in documents:
        ids = checked_ids(document, identity.vocab_size, number)
        number += 1
        if writer is not None and writer.tokens and writer.tokens + len(ids) > identity.shard_tokens:
            close(writer)
            writer = None
        if writer is None:
            writer = ShardWriter(out, len(before) + len(shards), identity.dtype)
        writer.add(ids)
    if writer is not None:
        close(writer)
    return shards


def checked_ids(document: Ids, vocab_size: int, number: int) -> np.ndarray:
    """Ids as an integer array (T,). Raises RonnaError, naming the document, for ids not in the vocabulary."""
    ids = np.asarray(document)
    if ids.size == 0:
        return np.empty(0, dtype=np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise RonnaError(
            f"not a list of token ids but {ids.dtype} of shape {ids.shape}",
            where=f"document {number}",
            fix="give the ids of one document at a time",
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise RonnaError(
            f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}",
            where=f"document {number}",
            fix="tokenize with the tokenizer of this model, or give its vocab_size",
        )
    return ids


class Shards:
    """Documents of a finished folder: `len(shards)`, `shards[i]`, `shards.lengths`, memory-mapped.

    Opening checks the manifest, every file's size and, if given, the tokenizer; `verify()` also the content.
    Raises RonnaError when something is not as written.
    """

    def __init__(self, folder: str | Path, *, expect_tokenizer: str | None = None):
        self.folder = Path(folder)
        self.manifest = load_manifest(self.folder)
        identity = self.manifest.identity
        if expect_tokenizer is not None and expect_tokenizer != identity.tokenizer_hash:
            raise RonnaError(
                f"tokenized with {identity.tokenizer_hash}, the model's tokenizer is {expect_tokenizer}",
                where=str(self.folder / MANIFEST),
                fix="prepare the data again with this tokenizer, or use the one it was prepared with",
            )
        self._check_sizes()
        self._tokens = [self._map(tokens_name(n), identity.dtype) for n in range(len(self.manifest.shards))]
        self._ends = [self._map(ends_name(n), "<i8") for n in range(len(self.manifest.shards))]
        self._first = np.cumsum([0] + [shard.documents for shard in self.manifest.shards])
        self.lengths = self._lengths()

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, document: int) -> np.ndarray:
        """Ids of one document (T,), a view of the file."""
        return self.slice(document, 0, None)

    def slice(self, document: int, start: int, stop: int | None) -> np.ndarray:
        """Ids [start, stop) of one document; stop None is its end. Raises IndexError for no such document."""
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        last = int(self._ends[shard][document - self._first[shard]])
        length = int(self.lengths[document])
        return self._tokens[shard][last - length : last][start:stop]

    def verify(self) -> None:
        """Reads every file again. Raises RonnaError naming the first whose bytes are not those written."""
        for number, shard in enumerate(self.manifest.shards):
            for name, expected in shard.hashes(number):
                with open(self.folder / name, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != expected:
                    raise RonnaError(
                        f"damaged: sha256 {found[:12]}..., written as {expected[:12]}...",
                        where=str(self.folder / name),
                        fix=RESTORE,
                    )

    def _check_sizes(self) -> None:
        for number, shard in enumerate(self.manifest.shards):
            for name, size in shard.sizes(number, self.manifest.identity.dtype):
                path = self.folder / name
                found = path.stat().st_size if path.is_file() else None
                if found != size:
                    state = "missing" if found is None else f"{found} bytes instead of {size}"
                    raise RonnaError(state, where=str(path), fix=RESTORE)

    def _map(self, name: str, dtype: str) -> np.ndarray:
        path = self.folder / name
        if path.stat().st_size == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype=dtype)
        return np.asarray(np.memmap(path, dtype=dtype, mode="r"))

    def _lengths(self) -> np.ndarray:
        """Tokens of every document, int64 (len,). Raises RonnaError when the ends do not fit the tokens."""
        lengths = [np.diff(ends, prepend=0) for ends in self._ends]
        for number, (found, shard) in enumerate(zip(lengths, self.manifest.shards, strict=True)):
            if found.sum() != shard.tokens or (found < 0).any():
                raise RonnaError(
                    "the ends of documents do not fit the tokens",
                    where=str(self.folder / ends_name(number)),
                    fix=RESTORE,
                )
        return np.concatenate(lengths)
