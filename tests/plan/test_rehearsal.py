"""A step on a model of the heap: all that it takes goes again, and what it needs at once it has."""

import pytest

from ronna.model.families import preset
from ronna.plan.heap import LEAST, Heap
from ronna.plan.memory import estimate
from ronna.plan.rehearsal import Rehearsal
from ronna.plan.shapes import Adapter, Lengths
from ronna.plan.stretches import Step, Stretch, Table, forward_pass, loss_parts
from ronna.plan.tape import Tape, Value
from ronna.plan.weights import Optimizer, pieces, weights

MODELS = ["bert-mini", "gpt2-tiny", "llama-60m", "modernbert-mini", "t5-small", "qwen3-0.6b"]
WAYS = [{"blocks": 3}, {"feeds": 4}, {"blocks": 2, "feeds": 2}, {}, {"micro_batches": 3, "blocks": 3}]


def step_of(model: str, **ways: object) -> Step:
    lengths = Lengths(4, 128)
    return Step(lengths, source=lengths if model.startswith("t5") else None, compute="bf16", **ways)  # type: ignore[arg-type]


def rehearsal(model: str, step: Step, states: list[int] | None = None) -> Rehearsal:
    _, cfg = preset(model, num_hidden_layers=4) if model != "t5-small" else preset(model, num_layers=3)
    stretches = list(forward_pass(cfg, step, Table.of(cfg, step)))
    return Rehearsal(stretches, list(loss_parts(cfg, step)), states or [], 0)


def left(heap: Heap) -> int:
    """Bytes that somebody holds."""
    return heap.top - sum(size for size, _ in heap.holes)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ways", WAYS, ids=str)
def test_nothing_stays_but_the_optimizers_states(model: str, ways: dict[str, int]) -> None:
    states = [3 * LEAST, 5 * LEAST + 8]
    played = rehearsal(model, step_of(model, **ways), states)
    assert played.high(ways.get("micro_batches", 1)) > 50 * LEAST
    assert left(played.heap) == sum(states)


def halves(again: bool) -> Rehearsal:
    """One stretch that reads and gives a unit, makes four more that it keeps, and has a gradient of weights of two."""
    unit = 2 * LEAST
    tape = Tape(unit, True)
    wide = tape.op(tape.start, size=4 * unit, keep_out=True, leaf=2 * unit)
    out = tape.op(wide, size=unit)
    stretch = stretch_of(tape, out, unit, again)
    start = Tape(0, False)
    first = stretch_of(start, start.op(size=unit, needs=True), 0, False)
    return Rehearsal([first._replace(block=None), stretch], [], [], 0)


def stretch_of(tape: Tape, out: Value, held: int, again: bool) -> Stretch:
    return Stretch("one", tape.profile(out), 0, parts=((tape, (out,)),), again=again)


def test_by_hand() -> None:
    """In units: forward x, 4, out (6). Backward: the gradients of out, of the four and of weights come on top of x and
    the four (out goes first): 1 + 4 + 1 + 4 + 2 = 12. What is computed again has its output once more meanwhile; the
    hole that it leaves is the only one, and of its own size, which nothing of that size fits into."""
    unit = 2 * LEAST
    plain, again = halves(False), halves(True)
    assert plain.high(1) >= 12 * unit
    assert again.high(1) >= 12 * unit
    assert left(plain.heap) == left(again.heap) == 0


def test_a_rehearsal_counts_where_it_takes_more() -> None:
    _, cfg = preset("bert-medium")
    ways = {"compute": "bf16", "predicted": 300}
    lengths = Lengths(16, 128)
    kept = estimate(cfg, Step(lengths, **ways, blocks=8))  # type: ignore[arg-type]
    tight = estimate(cfg, Step(lengths, **ways, blocks=8, tight=True))  # type: ignore[arg-type]
    assert kept.peak > 1.1 * tight.peak
    assert sum(kept.held.values()) == kept.peak


def test_states_come_one_by_one() -> None:
    _, cfg = preset("bert-tiny")
    for optimizer, each in ((Optimizer("adamw"), 2), (Optimizer("sgd"), 1)):
        for w in weights(cfg):
            assert pieces(optimizer, w) == [w.size // w.times * 4] * each * w.times


@pytest.mark.parametrize("model", ["bert-mini", "llama-60m"])
def test_adapters_too(model: str) -> None:
    played = rehearsal(model, step_of(model, adapter=Adapter(8), blocks=4))
    played.high(1)
    assert left(played.heap) == 0
