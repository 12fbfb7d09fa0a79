"""A stretch of a training step as a list of operations, and how much memory it holds at its fullest.

An operation makes storages and keeps some for the backward pass; a storage goes when the last that reads it is done,
unless it is kept. The backward pass takes the operations in reverse, which is autograd's order too.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

Events = Iterator[tuple[Any, int]]  # what is made, by name, and its bytes; 0 where it goes
PUT_AWAY = 2**20  # as in ronna.train.shelf


class Value(NamedTuple):
    """A tensor: `size` bytes of its own in a storage that it may share; `needs` a gradient of as many bytes."""

    key: int
    storage: int
    size: int
    needs: bool


class Op(NamedTuple):
    """`leaf` bytes are gradients of weights; `work` and `back` live within the pass forward and backward alone."""

    reads: tuple[int, ...]
    out: Value
    made: tuple[int, ...]
    kept: tuple[int, ...]
    into: tuple[tuple[Value, int], ...]  # operands that get a gradient, and its bytes; 0: the output's own
    leaf: int
    work: int
    back: int


@dataclass(frozen=True)
class Profile:
    """Of one stretch, in bytes beyond what was there before it. What it reads counts as its own, what waits elsewhere
    for the backward pass does not.

    forward: the most while it goes forward. kept: activations and `casts` of weights after that, up to its backward
    pass. backward: the most while it goes backward, what it has kept included. leaf: gradients of weights it leaves.
    """

    forward: int
    kept: int
    casts: int
    backward: int
    leaf: int
    start: int  # what it reads
    out: int  # what it gives to the next one
    keeps_start: bool

    @property
    def held(self) -> int:
        return self.kept + self.casts


class Tape:
    """Operations one after the other on what a stretch reads, which `start` gives."""

    def __init__(self, size: int, needs: bool):
        self.sizes: list[int] = []
        self.casts: set[int] = set()
        self.ops: list[Op] = []
        self.keys = 0
        self.start = self.value(size, needs)

    def store(self, size: int, cast: bool = False) -> int:
        self.sizes.append(size)
        if cast:
            self.casts.add(len(self.sizes) - 1)
        return len(self.sizes) - 1

    def value(self, size: int, needs: bool, storage: int | None = None, cast: bool = False) -> Value:
        self.keys += 1
        return Value(self.keys, self.store(size, cast) if storage is None else storage, size, needs)

    def memory(self, size: int) -> Value:
        """What other stretches hold too and account for, such as an encoder's states."""
        return self.value(0, True)._replace(size=size)

    def op(
        self,
        *reads: Value,
        size: int | None = None,
        view: bool = False,
        keeps: Iterable[Value] = (),
        extra: int = 0,
        through: bool = False,
        needs: bool | None = None,
        keep_out: bool = False,
        cast: bool = False,
        leaf: int = 0,
        work: int = 0,
        back: int = 0,
        grads: Iterable[int] | None = None,
    ) -> Value:
        """The output: of `size` bytes (None: as the first operand), in the first operand's storage if a `view`.

        Kept, where a gradient is needed at all, are the operands `keeps`, `extra` new bytes and, `keep_out`, the
        output. Each operand's gradient is new, or the output's own if it goes `through`; `grads` says the bytes of
        new ones where they are not as large as the operand. `needs` is None: as an operand does.
        """
        size = reads[0].size if size is None else size
        needs = any(r.needs for r in reads) if needs is None else needs
        out = self.value(size, needs, reads[0].storage if view else None, cast)
        made = () if view else (out.storage,)
        kept = tuple(k.storage for k in keeps) if needs else ()
        if needs and extra:
            kept, made = (*kept, self.store(extra)), (*made, len(self.sizes) - 1)
        elif extra:
            work += extra
        if needs and keep_out:
            kept = (*kept, out.storage)
        new = [0 if through or view else r.size for r in reads] if grads is None else grads
        into = tuple((r, n) for r, n in zip(reads, new, strict=True) if r.needs)
        self.ops.append(Op(tuple(r.storage for r in reads), out, made, kept, into, leaf if needs else 0, work, back))
        return out

    def hold(self, *values: Value) -> None:
        """A name still refers to these here."""
        last = self.ops[-1]
        self.ops[-1] = last._replace(reads=(*last.reads, *(v.storage for v in values)))

    def profile(self, *outs: Value, keep_leaves: bool = True, away: bool = False) -> Profile:
        """Unless leaves are kept, a weight's gradient is gone, or has been added to another, once it is there. `away`:
        what is kept is put elsewhere, but for what is small, and comes back for the operation that reads it."""
        kept, _ = self.lives(outs)
        here = {s for s in kept if self.sizes[s] < PUT_AWAY} if away else kept
        casts = sum(self.sizes[s] for s in here & self.casts)
        start = self.start
        given = {("gradient", i): out.size for i, out in enumerate(outs)}
        return Profile(
            most(self.forward(outs), {start.storage: start.size}),
            sum(self.sizes[s] for s in here) - casts,
            casts,
            most(self.backward(outs, keep_leaves, kept - here), {s: self.sizes[s] for s in here} | given),
            sum(op.leaf for op in self.ops),
            start.size,
            sum(out.size for out in outs),
            start.storage in here,
        )

    def lives(self, outs: tuple[Value, ...], graph: bool = True) -> tuple[set[int], list[list[int]]]:
        """The storages that are kept, and those that go with each operation; the last list is of the stretch's end.
        Without a graph nothing is kept."""
        kept = {s for op in self.ops for s in op.kept} if graph else set()
        last = {s: i for i, op in enumerate(self.ops) for s in (*op.reads, *op.made)}
        last |= dict.fromkeys((self.start.storage, *(out.storage for out in outs)), len(self.ops))
        going: list[list[int]] = [[] for _ in range(len(self.ops) + 1)]
        for s, i in last.items():
            if s not in kept:
                going[i].append(s)
        return kept, going

    def forward(self, outs: tuple[Value, ...], graph: bool = True) -> Events:
        """What it reads and what it gives are still there at the end."""
        for op, gone in zip(self.ops, self.lives(outs, graph)[1], strict=False):
            yield from ((s, self.sizes[s]) for s in op.made if self.sizes[s])
            if op.work:
                yield from (("work", op.work), ("work", 0))
            yield from ((s, 0) for s in gone if self.sizes[s])

    def backward(self, outs: tuple[Value, ...], keep_leaves: bool, away: Iterable[int] = ()) -> Events:
        """On what is kept and the gradients of `outs`, ("gradient", 0) and so on, which are there; that of what it
        reads stays."""
        going: list[list[int]] = [[] for _ in self.ops]
        for s, i in {s: i for i, op in reversed(list(enumerate(self.ops))) for s in op.kept}.items():
            going[i].append(s)
        gradient = {out.key: i for i, out in enumerate(outs)}  # number of the buffer that a value's gradient lies in
        users, elsewhere = [1] * len(outs), set(away)
        for number, op, gone in zip(range(len(self.ops)), reversed(self.ops), reversed(going), strict=True):
            yield from ((s, self.sizes[s]) for s in elsewhere.intersection(op.kept))
            elsewhere -= set(op.kept)
            buffer = gradient.pop(op.out.key, None)
            if buffer is not None and op.out.needs:
                passing: list[Any] = ["back"] * (op.back > 0)
                yield from (("back", op.back) for _ in passing)
                if op.leaf:
                    yield ("leaf", number), op.leaf
                    passing += [("leaf", number)] * (not keep_leaves)
                for operand, n in op.into:
                    if operand.key in gradient:  # added to what is there
                        if n:
                            yield ("added", operand.key), n
                            passing.append(("added", operand.key))
                    elif n:
                        gradient[operand.key] = len(users)
                        yield ("gradient", len(users)), n
                        users.append(1)
                    else:
                        gradient[operand.key] = buffer
                        users[buffer] += 1
                yield from ((name, 0) for name in passing)
                users[buffer] -= 1
                if not users[buffer]:
                    yield ("gradient", buffer), 0
            yield from ((s, 0) for s in gone if self.sizes[s])
        for key, buffer in gradient.items():
            users[buffer] -= key != self.start.key
            if not users[buffer]:
                yield ("gradient", buffer), 0


def most(events: Events, there: dict[Any, int]) -> int:
    """Bytes at the fullest moment, beginning with what is `there`."""
    live = peak = sum(there.values())
    for name, size in events:
        live += size if size else -there.pop(name)
        peak = max(peak, live)
        if size:
            there[name] = size
    return peak
