"""How glibc and the kernel are told to treat the memory of a run that computes on a CPU."""

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

from ronna.base.device import resident_bytes

# Address space by which the heap grows each time. Nothing of it is taken before it is used.
GROWTH = 2**30
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -3, -4, -8  # malloc.h
LARGE = 2**18  # bytes of a block that is mapped apart where memory goes before time
MADV_HUGEPAGE = 14  # mman.h
SELDOM = 32  # steps at least from one giving back of free memory to the next: what was given back is taken anew
AGAIN = 1.1  # growth over what steps take, until free memory is given back again
# oneDNN, and torch above it, keep what they have compiled and laid out for each product by its shape, 1,024 of them if
# nobody says otherwise, a good 100 KiB each. Batches of texts have another shape each time; a step needs some dozens.
KERNELS = "64"
CAPACITIES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")  # torch's, oneDNN's


class Heap:
    """A training step takes and frees the same large blocks over and over. By default each is mapped anew, zeroed
    by the kernel page by page, and found through page tables that no cache holds. Here what is freed is kept, and
    lies in pages of 2 MiB where the kernel has them: a tenth of the step of a small model. The price is memory that
    is rounded up, and not given back before the process ends: as holes that only smaller blocks fill, a step can come
    to hold twice what is alive.

    `tight` is for runs where memory goes before time: large blocks are given back to the system when they are freed,
    and mapped anew.

    Call it after each step: what the heap has grown by is then laid in large pages too, and where the process holds
    more than `most` bytes, what is free goes back to the system; seldom, unless it holds more than `limit`. Twenty
    microseconds if there is nothing to do.
    """

    def __init__(self, tight: bool = False, most: int | None = None, limit: int | None = None) -> None:
        """Does nothing where there is no glibc or the kernel has no such pages."""
        self.most, self.limit, self.given = most, limit, -SELDOM
        self.libc = glibc()
        if self.libc is None:
            return
        self.libc.sbrk.restype = self.libc.malloc.restype = ctypes.c_void_p
        self.libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.libc.malloc.argtypes, self.libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
        self.end = 0
        if tight:
            small = ((M_TRIM_THRESHOLD, 2**23), (M_TOP_PAD, 2**20))  # for what is not
            for option, value in ((M_MMAP_THRESHOLD, LARGE), (M_MMAP_MAX, 2**16), *small):
                self.libc.mallopt(option, value)
            release()  # large blocks would take what is free now, and be kept
            self.libc = None
            return
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, GROWTH)):
            self.libc.mallopt(option, value)
        self.libc.free(self.libc.malloc(2**26))  # more than is free at the top now: the heap grows before the run does
        self()

    def __call__(self, step: int = 0) -> None:
        if self.libc is None:
            return
        if self.most is not None and (held := resident_bytes()) > self.most:
            over = self.limit is not None and held > self.limit
            if step - self.given < SELDOM and not over:  # it did not help for long: the steps need so much
                self.most = int(AGAIN * held) if self.limit is None else min(int(AGAIN * held), self.limit)
            else:
                self.libc.malloc_trim(0)
                self.given = step
        if (end := self.libc.sbrk(0)) != self.end:
            self.end = end
            for start, stop in ranges():
                self.libc.madvise(start, stop - start, MADV_HUGEPAGE)


def keep_few_kernels() -> None:
    """To be called before torch computes anything; what the environment says already stays."""
    for name in CAPACITIES:
        os.environ.setdefault(name, KERNELS)


def share_one_heap() -> None:
    """Let all threads that begin from now on have the one heap. By default each gets a heap of its own, and gloo has
    two threads a group of ranks, which keep up to 13 MiB each of what they have freed. Does nothing where there is no
    glibc."""
    if libc := glibc():
        libc.mallopt(M_ARENA_MAX, 1)


def release() -> None:
    """Give what is free in the heap back to the system now. Does nothing where there is no glibc."""
    if libc := glibc():
        libc.malloc_trim(0)


def glibc() -> Any:
    """None where there is none."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") else None


def ranges() -> list[tuple[int, int]]:
    """Addresses (start, stop) of this process's heap, in the pieces in which the kernel keeps it."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in maps if line.endswith("[heap]")]
    return [(int(start, 16), int(stop, 16)) for start, stop in spans]
