"""What a folder of shards says of itself: the manifest, and the journal while it is being written."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ronna.base.errors import RonnaError

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
FORMAT = 1
RESTORE = "restore it from a copy, or delete the folder and prepare the data again"


def tokens_name(number: int) -> str:
    return f"tokens-{number:05d}.bin"


def ends_name(number: int) -> str:
    return f"ends-{number:05d}.bin"


@dataclass(frozen=True)
class Identity:
    """What decides every byte of the shards; a folder is continued only under the same one."""

    vocab_size: int
    tokenizer_hash: str
    source_hash: str
    shard_tokens: int
    meta: dict[str, Any]

    @property
    def dtype(self) -> str:
        """NumPy's name of the ids on disk."""
        return "<u2" if self.vocab_size <= 2**16 else "<u4"

    def check(self, written: "Identity", folder: Path) -> None:
        """Raises RonnaError, naming what differs, when the folder was written under another identity."""
        mine, theirs = asdict(self), asdict(written)
        differing = [name for name in mine if mine[name] != theirs[name]]
        if differing:
            name = differing[0]
            raise RonnaError(
                f"the folder was written with {name} {theirs[name]!r}, now it is {mine[name]!r}",
                where=str(folder),
                fix="write to another folder, or delete this one",
            )


@dataclass(frozen=True)
class Shard:
    """Counts and sha256 of the two files of a shard."""

    documents: int
    tokens: int
    tokens_sha256: str
    ends_sha256: str

    def sizes(self, number: int, dtype: str) -> list[tuple[str, int]]:
        """(file name, bytes) of both files."""
        width = int(dtype[-1])
        return [(tokens_name(number), self.tokens * width), (ends_name(number), self.documents * 8)]

    def hashes(self, number: int) -> list[tuple[str, str]]:
        """(file name, sha256) of both files."""
        return [(tokens_name(number), self.tokens_sha256), (ends_name(number), self.ends_sha256)]


@dataclass(frozen=True)
class Manifest:
    """A finished folder: how it was made and what lies in it."""

    identity: Identity
    shards: tuple[Shard, ...]

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `manifest.json` durably and in one piece."""
    counts = {"documents": manifest.documents, "tokens": manifest.tokens, "dtype": manifest.identity.dtype}
    _write(folder / MANIFEST, counts | _content(manifest.identity, list(manifest.shards)))


def write_progress(folder: Path, identity: Identity, shards: list[Shard]) -> None:
    """Writes the journal of whole shards, replacing the one before in one piece."""
    _write(folder / PROGRESS, _content(identity, shards))


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a finished folder. Raises RonnaError for a missing, unfinished or unreadable one."""
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / PROGRESS).is_file():
            raise RonnaError(
                "the shards are unfinished", where=str(folder), fix="run the same prepare again: it goes on"
            )
        raise RonnaError(f"no {MANIFEST} here", where=str(folder), fix="name a folder that prepare has written")
    identity, shards = _read(path)
    return Manifest(identity, tuple(shards))


def read_progress(folder: Path) -> tuple[Identity, list[Shard]] | None:
    """The journal of an unfinished folder, or None."""
    path = folder / PROGRESS
    return _read(path) if path.is_file() else None


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turns a full or failing disk into a RonnaError that names the file."""
    try:
        yield
    except OSError as error:
        raise RonnaError(
            f"cannot write: {error.strerror or error}",
            where=str(path),
            fix="make room or mend the disk, then run the same again: it goes on after the last whole shard",
        ) from error


def fsync_folder(folder: Path) -> None:
    """Makes renames in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _content(identity: Identity, shards: list[Shard]) -> dict[str, Any]:
    return {"format": FORMAT, "identity": asdict(identity), "shards": [asdict(shard) for shard in shards]}


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with storage(path):
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)


def _read(path: Path) -> tuple[Identity, list[Shard]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
        return Identity(**content["identity"]), [Shard(**shard) for shard in content["shards"]]
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise RonnaError(f"not readable: {error}", where=str(path), fix=RESTORE) from None
