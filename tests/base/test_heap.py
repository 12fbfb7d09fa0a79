"""What the heap's advice does, seen from outside: in a process of its own, since it cannot be taken back."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ronna.base.heap import CAPACITIES

CODE = """
import ctypes
from pathlib import Path
from ronna.base.heap import Heap, ranges

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
heap = Heap()

def take(size):
    block = libc.malloc(size)
    assert any(start <= block < stop for start, stop in ranges()), "not in the heap"
    ctypes.memset(block, 1, size)
    return block

block = take(2**28)
libc.free(block)
assert take(2**28) == block, "freed memory was not kept"
take(2**30)  # more than the heap had
end = heap.end
heap()
assert heap.end > end
in_heap, advised = False, []
for line in Path("/proc/self/smaps").read_text().splitlines():
    if "-" in line.split()[0]:
        in_heap = line.endswith("[heap]")
    elif in_heap and line.startswith("VmFlags:"):
        advised.append("hg" in line.split())
assert advised and all(advised), advised
print("ok")
"""


LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


@pytest.mark.skipif(not LARGE_PAGES.exists(), reason="needs a kernel with large pages")
def test_what_is_freed_is_kept_and_all_of_the_heap_lies_in_large_pages() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment)
    assert done.stdout == "ok\n", done.stderr


THREADS = """
import ctypes, sys, threading
from ronna.base.heap import ranges, share_one_heap

if "share" in sys.argv:
    share_one_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]

def look():
    block = libc.malloc(1000)
    print(any(start <= block < stop for start, stop in ranges()))

thread = threading.Thread(target=look)
thread.start()
thread.join()
"""
MOST = """
import ctypes
from ronna.base.device import resident_bytes
from ronna.base.heap import SELDOM, Heap

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
heap = Heap()

def freed():
    block = libc.malloc(2**28)
    ctypes.memset(block, 1, 2**28)
    libc.free(block)
    return resident_bytes()

def given_back(before):
    return before - resident_bytes() > 2**27

before = heap.most = freed()
heap(0)
assert not given_back(before), "as much as it may hold"
heap.most = before - 1
heap(0)
assert given_back(before), "more than it may hold"
before, heap.most = freed(), 1
heap(SELDOM - 1)
assert not given_back(before), "it is tried at every step"
assert 1.09 * before < heap.most < 1.11 * before
heap.most = 1
heap(SELDOM)
assert given_back(before), "it is not tried again"
before = freed()
heap.most, heap.limit = 1, before + 2**20
heap(SELDOM + 1)
assert not given_back(before), "there is room still"
assert heap.most == heap.limit, "it will pass the limit"
heap.limit = before - 2**20
heap.most = 1
heap(SELDOM + 2)
assert given_back(before), "the limit is passed, and nothing goes back"
print("ok")
"""
TIGHT = """
import ctypes
from ronna.base.device import resident_bytes
from ronna.base.heap import M_MMAP_MAX, Heap

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.mallopt(M_MMAP_MAX, 0)
blocks = [libc.malloc(2**20) for _ in range(64)]
for block in blocks:
    ctypes.memset(block, 1, 2**20)
for block in blocks[:-1]:  # the last one stays behind them
    libc.free(block)
before = resident_bytes()
Heap(tight=True)
print((before - resident_bytes()) / 2**20)
"""


def told(code: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.strip()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_threads_that_begin_later_have_the_one_heap() -> None:
    assert (told(THREADS), told(THREADS, "share")) == ("False", "True")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_what_is_free_is_given_back_above_a_limit_but_not_at_every_step() -> None:
    assert told(MOST) == "ok"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_what_was_free_before_is_given_back_where_memory_goes_before_time() -> None:
    assert float(told(TIGHT)) > 60


PRODUCTS = """
import ctypes
import torch
from ronna.base.heap import keep_few_kernels

class Info(ctypes.Structure):
    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]

def used():
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Info
    return libc.mallinfo2().field7

keep_few_kernels()
weight = torch.randn(64, 64, dtype=torch.bfloat16)
with torch.inference_mode():
    for rows in range(64, 256):  # more than are kept
        torch.randn(rows, 64, dtype=torch.bfloat16) @ weight
    before = used()
    for rows in range(256, 480):
        torch.randn(rows, 64, dtype=torch.bfloat16) @ weight
print(used() - before)
"""


def grown(**environment: str) -> int:
    """Bytes that a process holds more of after products of 224 shapes."""
    clean = {name: value for name, value in os.environ.items() if name not in CAPACITIES}
    clean |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", PRODUCTS], capture_output=True, text=True, env=clean, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_kernels_of_other_shapes_go() -> None:
    all_kept = grown(**dict.fromkeys(CAPACITIES, "1024"))  # what the environment says stays
    if all_kept < 2**22:
        pytest.skip("torch keeps no kernels by shape here")
    assert grown() < all_kept / 8
