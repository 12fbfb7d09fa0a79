"""One shard being written: under a temporary name until every byte is safe on the disk."""

import hashlib
import os
from array import array
from pathlib import Path

import numpy as np

from ronna.data.manifest import Shard, ends_name, fsync_folder, storage, tokens_name

BUFFER_BYTES = 2**20


class ShardWriter:
    """Takes documents, then `close()` makes both files durable and gives their hashes."""

    def __init__(self, folder: Path, number: int, dtype: str):
        self.folder, self.number, self.dtype = folder, number, dtype
        self.tokens = 0
        self._ends = array("q")
        self._hash = hashlib.sha256()
        self._path = folder / f"{tokens_name(number)}.tmp"
        with storage(self._path):
            self._file = open(self._path, "wb", buffering=BUFFER_BYTES)  # noqa: SIM115 - open across calls

    def add(self, ids: np.ndarray) -> None:
        """Appends one document (T,)."""
        data = ids.astype(self.dtype).tobytes()
        with storage(self._path):
            self._file.write(data)
        self._hash.update(data)
        self.tokens += len(ids)
        self._ends.append(self.tokens)

    def close(self) -> Shard:
        """Both files on disk under their names; the shard exists only once the journal says so."""
        ends = np.asarray(self._ends, dtype="<i8").tobytes()
        ends_path = self.folder / f"{ends_name(self.number)}.tmp"
        with storage(self._path):
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
            with open(ends_path, "wb") as file:
                file.write(ends)
                file.flush()
                os.fsync(file.fileno())
            os.replace(self._path, self.folder / tokens_name(self.number))
            os.replace(ends_path, self.folder / ends_name(self.number))
            fsync_folder(self.folder)
        hashes = self._hash.hexdigest(), hashlib.sha256(ends).hexdigest()
        return Shard(len(self._ends), self.tokens, *hashes)
