"""Saving checkpoints behind the training steps."""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from ronna.base.errors import RonnaError
from ronna.parallel.world import ALONE, World
from ronna.train.checkpoint import settle_checkpoint, write_checkpoint


class Checkpointer:
    """Saves into one folder while training goes on: a step that saves pays for handing its numbers to the system, one
    tensor at a time and without a copy in memory; a thread sees them to the disk.

    Use it as a context manager, on every rank of a run. Rank 0's holds a lock on `root` (given up by the system
    even after a kill), so whatever others left half-written there is deleted at the start. A failed save is
    told to `report` and training goes on, with the older checkpoints as they were; leaving the context waits
    for the last save and raises its RonnaError if it failed. Errors that are not the disk's come out of `save`,
    or of the next `save` or `wait`.
    """

    def __init__(
        self,
        root: Path,
        *,
        hashes: dict[str, str],
        report: Callable[[str], None],
        keep: int = 2,
        world: World = ALONE,
    ):
        """Raises RonnaError when `root` cannot be written to, or when another live process saves there."""
        self.root = root
        self.latest: Path | None = None  # the newest checkpoint this run knows to be whole
        self._hashes, self._report, self._keep, self._world = hashes, report, keep, world
        self._pending: Future[Path] | None = None
        self._failure: RonnaError | None = None
        self._lock = None
        if world.main:
            self._lock = _lock(root)
            for leftover in root.glob("step-*.tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def save(
        self,
        step: int,
        *,
        tensors: Mapping[str, Mapping[str, Tensor]],
        model_files: Callable[[Path], None],
        state: dict[str, Any],
        protect: Collection[int] = (),
        written: Callable[[Tensor], object] = lambda tensor: None,
        finish: Callable[[Path], None] = lambda staging: None,
    ) -> None:
        """Wait for the save before, write everything (`write_checkpoint`), and settle it behind the training; `finish`,
        rank 0's, is called there (`settle_checkpoint`)."""
        self.wait()
        try:
            staging = write_checkpoint(
                self.root, step, tensors=tensors, model_files=model_files, state=state, written=written,
                world=self._world,
            )  # fmt: skip
        except RonnaError as failure:
            self._failed(failure)
            return
        if not self._world.main:  # rank 0 alone knows what becomes of it
            self._failure = None
            return
        job = partial(settle_checkpoint, staging, hashes=self._hashes, keep=self._keep, protect=frozenset(protect))
        self._pending = self._pool.submit(partial(job, finish=finish))

    def wait(self) -> None:
        """Until nothing is being saved; `latest` is then up to date."""
        if self._pending is None:
            return
        try:
            self.latest, self._failure = self._pending.result(), None
        except RonnaError as failure:
            self._failed(failure)
        finally:
            if self._pending.done():  # not so when Ctrl-C ended the wait
                self._pending = None

    def _failed(self, failure: RonnaError) -> None:
        self._failure = failure
        self._report(f"{failure}\n  training goes on")

    def close(self) -> None:
        """Wait for the last save and give up the lock. Raises RonnaError if that save failed."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None
        if self._failure:
            raise self._failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except RonnaError:  # already reported; what ended the training matters more
            if error is None:
                raise


def _lock(root: Path) -> int | None:
    """A record lock, which forked loader workers do not inherit: it ends with this process, killed or not."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        fix = "make the folder writable, or choose another output folder"
        raise RonnaError(f"cannot save checkpoints here: {error}", where=str(root), fix=fix) from error
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            os.close(descriptor)
            fix = "wait for it to end, stop it, or choose another output folder"
            raise RonnaError("another run is saving checkpoints here", where=str(root), fix=fix) from error
        # A file system without locks: two runs in one folder then go unnoticed, as they would without ours.
    return descriptor
