"""A step played on a model of the heap, for what no sum of components tells.

What a block makes that is computed again in the backward pass comes to lie in what is free by then, between gradients
that stay: the next block finds less room than this one had, although it needs no more.
"""

from collections.abc import Iterable
from typing import Any

from ronna.plan.heap import Heap
from ronna.plan.stretches import Stretch

STEPS, MICRO_BATCHES = 3, 2  # after which the heap no longer grows
Block = tuple[int, int]  # where it starts, and its size
There = dict[Any, Block]  # by the names that a tape gives
NOWHERE: Block = (0, 0)


class Rehearsal:
    """Steps of these stretches. loss: what the vocabulary loss makes and lets go; there stay its gradients, that of
    the `states` it reads and that of the head. states: what the first optimizer step makes and keeps, one by one.
    scratch: what each takes."""

    def __init__(self, stretches: list[Stretch], loss: list[tuple[str, int]], states: Iterable[int], scratch: int):
        self.stretches, self.loss, self.states, self.scratch = stretches, loss, list(states), scratch
        self.heap = Heap()

    def high(self, micro_batches: int) -> int:
        """Bytes that the heap grows to; weights lie elsewhere."""
        for step in range(STEPS):
            gradients: list[Block] = []
            for micro in range(min(micro_batches, MICRO_BATCHES)):
                (held, out), found = self.forward(), There()
                self.heap.play(iter(self.loss), found)
                into = [found.pop("states")] if found else []
                made = [*found.values(), *self.backward(held, into, keep=micro == 0)]
                self.free([out])
                if micro == 0:
                    gradients = made
                else:  # added to those of the first
                    self.free(made)
            for size in self.states if step == 0 else ():
                self.heap.take(size)
            self.free([self.heap.take(self.scratch), *gradients])
        return self.heap.high

    def forward(self) -> tuple[list[list[There]], Block]:
        """What is there of each part of each stretch, a stretch's output with the next, and the last one's."""
        x, held = NOWHERE, []
        for s in self.stretches:
            parts, x = self.through(s, x, graph=not s.again)
            if s.gives:  # for others than the next
                parts[-1]["given"] = x
            held.append(parts)
        return held, x

    def through(self, s: Stretch, x: Block, graph: bool) -> tuple[list[There], Block]:
        """One stretch forward from x: what is there of its parts, and where its (first) output lies."""
        found = []
        for number, (tape, outs) in enumerate(s.parts):
            start = tape.start
            at: There = {start.storage: x if start.size else NOWHERE}
            self.heap.play(tape.forward(outs, graph), at)
            x = at.pop(outs[0].storage)
            waits = s.again and number == 0  # what a stretch is computed from again
            if not waits and start.storage not in tape.lives(outs, graph)[0]:
                self.free([at.pop(start.storage, NOWHERE)])
            found.append(at)
        return found, x

    def backward(self, held: list[list[There]], into: list[Block], keep: bool) -> list[Block]:
        """From the gradients of the last outputs; those of weights, if they are to be kept."""
        made: list[Block] = []
        for s, parts in zip(reversed(self.stretches), reversed(held), strict=True):
            if s.again:
                parts, out = self.through(s, parts[0].pop(s.parts[0][0].start.storage), graph=True)
                self.free([out])
            if s.gives:  # the gradient of the encoder's states, which every block of the decoder has added to
                into = [self.heap.take(s.gives)]
            for (tape, outs), at in zip(reversed(s.parts), reversed(parts), strict=True):
                into += [self.heap.take(out.size) for out in outs[len(into) :]]
                at.update({("gradient", i): block for i, block in enumerate(into)})
                self.heap.play(tape.backward(outs, keep), at)
                named = {name: at.pop(name) for name in list(at) if isinstance(name, tuple)}
                made += [block for name, block in named.items() if name[0] == "leaf"]
                into = [block for name, block in named.items() if name[0] == "gradient"]
                self.free(at.values())
            if s.rows:
                made.append(self.heap.take(s.rows))
        self.free(into)
        return made

    def free(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            self.heap.free(*block)
