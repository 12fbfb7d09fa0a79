"""What a run on a CPU loses to holes in its heap, which keeps all that is freed (see `ronna.base.heap`).

glibc (2.36) looks for 96 bytes more than an aligned block needs. So a hole is never filled by a block like the one that
left it, only by smaller ones, and what nothing smaller fills stays empty up to the backward pass.
"""

from bisect import bisect_left, insort
from typing import Any

from ronna.plan.tape import Events, Tape, Value

SLACK = 96
# Over whole steps, more is lost than in their forward passes: small objects come to lie between the large blocks and
# keep holes apart. So much of `lost` for every block, and a share of all that comes and goes in a step besides; both
# measured on the fitted runs of benchmarks/plan_memory.py.
LOST, SPARE = 1.6, 0.24
REHEARSED = 1.172  # what a step takes by what it takes in a rehearsal
TIGHT, SMALL = 0.05, 20 * 2**20  # a share where large blocks are given back at once, and what small ones come to
LEAST = 2**14  # smaller blocks find a place
REPEATS = 2  # blocks until the holes of one are the same as those of the one before, and blocks to measure


class Heap:
    """Best fit, neighbours joined when they are freed; `high` is the highest end that there was."""

    def __init__(self) -> None:
        self.holes: list[tuple[int, int]] = []  # (size, start), in order
        self.starts: dict[int, int] = {}
        self.ends: dict[int, int] = {}
        self.top = self.high = 0

    def take(self, size: int) -> tuple[int, int]:
        """Start and size."""
        if size < LEAST:
            return 0, 0
        found = bisect_left(self.holes, (size + SLACK, 0))
        if found == len(self.holes):
            self.top += size
            self.high = max(self.high, self.top)
            return self.top - size, size
        room, start = self.holes[found]
        self.fill(start, room)
        self.free(start + size, room - size)
        return start, size

    def free(self, start: int, size: int) -> None:
        if not size:
            return
        if start in self.ends:
            before = self.ends[start]
            size += start - before
            self.fill(before, start - before)
            start = before
        if start + size in self.starts:
            behind = self.starts[start + size]
            self.fill(start + size, behind)
            size += behind
        if start + size == self.top:
            self.top = start
            return
        insort(self.holes, (size, start))
        self.starts[start], self.ends[start + size] = size, start

    def fill(self, start: int, size: int) -> None:
        self.holes.pop(bisect_left(self.holes, (size, start)))
        del self.starts[start], self.ends[start + size]

    def play(self, events: Events, at: dict[Any, tuple[int, int]]) -> None:
        """`at`: start and size of what is there, by name."""
        for name, size in events:
            if size:
                at[name] = self.take(size)
            else:
                self.free(*at.pop(name, (0, 0)))


def lost(halves: list[tuple[Tape, Value]]) -> int:
    """Bytes that the heap grows by, for one more block of these, beyond what the block keeps."""
    heap, highs = Heap(), [0]
    x = heap.take(halves[0][0].sizes[halves[0][0].start.storage])
    for _ in range(2 * REPEATS):
        for tape, out in halves:
            at = {tape.start.storage: x}
            heap.play(tape.forward((out,)), at)
            if tape.start.storage not in tape.lives((out,))[0]:
                heap.free(*at.pop(tape.start.storage))
            x = at[out.storage]
        highs.append(heap.high)
    held = sum(tape.profile(out).held for tape, out in halves)
    return max(0, (highs[-1] - highs[REPEATS]) // REPEATS - held)
