"""Tensors that lie on disk and are in memory only while somebody looks at them."""

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ronna.base.errors import RonnaError

MADV_DONTNEED = 4  # mman.h
LEAST = 2**20  # bytes below which a tensor is not worth a file


class Shelf:
    """A folder whose files have no names: the system removes them with the process, however it ends.

    Linux. What lies on a file system that is itself in memory (tmpfs) saves nothing.
    """

    def __init__(self, folder: Path):
        """Raises RonnaError where there is no such shelf, or the folder cannot be written to."""
        if sys.platform != "linux":
            raise RonnaError("offloading to disk needs Linux", where="train.offload", fix="leave it out")
        self.folder, self.count = folder, 0
        self.madvise = ctypes.CDLL(None).madvise
        self.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.put(torch.zeros(1))

    def put(self, x: Tensor) -> Tensor:
        """A tensor of the same numbers in a file. Raises RonnaError where the disk is full."""
        self.count += 1
        path = self.folder / f".shelf-{os.getpid()}-{self.count}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:  # written to through memory, a full disk would kill the process
                os.posix_fallocate(file.fileno(), 0, max(1, x.numel() * x.element_size()))
            flat = torch.from_file(str(path), shared=True, size=x.numel(), dtype=x.dtype)
            os.unlink(path)
        except OSError as error:
            with suppress(OSError):
                os.unlink(path)
            fix = "make room on this disk, or leave out train.offload"
            raise RonnaError(f"cannot offload to disk: {error}", where=str(self.folder), fix=fix) from error
        found = flat.view(x.shape).copy_(x)
        self.release(found)
        return found

    def release(self, x: Tensor) -> None:
        """Let go of the memory of a tensor that `put` gave; it comes back from the file when it is looked at."""
        self.madvise(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes(), MADV_DONTNEED)


def away(shelf: Shelf | None) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """What `torch.autograd.graph.saved_tensors_hooks` is given so that activations wait for the backward pass on the
    shelf, or, on a GPU, in the host's memory. Parameters and what is small stay where they are."""

    def pack(x: Tensor) -> Any:
        if (x.is_leaf and x.requires_grad) or x.numel() * x.element_size() < LEAST:
            return x
        if x.is_cuda:
            return x.device, torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
        return x if shelf is None else shelf.put(x)

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, tuple):
            device, waiting = packed
            return waiting.to(device, non_blocking=True)
        return packed

    return pack, unpack
