"""What the heap's advice does, seen from outside: in a process of its own, since it cannot be taken back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
