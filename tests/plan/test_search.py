"""The planner's choice: what it picks fits, nothing that fits is faster, and what does not fit says what it lacks."""

from dataclasses import replace
from itertools import pairwise, product

import pytest

from ronna.model.families import preset
from ronna.plan.hardware import device
from ronna.plan.memory import estimate
from ronna.plan.search import Plan, Shape, Work, leanest, lightest, search, sizes, some_way_fits, ways
from ronna.plan.shapes import Adapter, Lengths
from ronna.plan.stretches import Step
from ronna.plan.time import step_time
from ronna.plan.weights import Optimizer

MODEL = preset("llama-60m")[1]
H200 = device("h200")[1]


def work(batch: int = 8, length: int = 256, model=MODEL, exact: bool = False, **step) -> Work:
    asked = Step(Lengths(batch, length), compute="bf16", **step)
    return Work(model, asked, batch, lambda n: Shape(Lengths(n, length)), exact)


def seconds(step: Step) -> float:
    return step_time(MODEL, step, H200).total


def need(some: Work) -> int:
    return estimate(some.model, some.step).peak


def found(some: Work, room: int) -> list[Plan]:
    return search(some, room, seconds)


def test_with_room_enough_nothing_is_changed() -> None:
    best = found(work(), need(work()))[0]
    assert (best.name, best.fits, best.exact) == ("as asked for", True, True)
    assert best.step == work().step


@pytest.mark.parametrize("share", [0.9, 0.75, 0.6, 0.45])
def test_what_is_chosen_fits_and_is_exact_while_it_can_be(share: float) -> None:
    some = work()
    room = int(share * need(some))
    best = found(some, room)[0]
    assert best.fits
    assert best.peak <= room
    assert best.peak == estimate(MODEL, best.step).peak
    assert best.exact
    assert best.step.micro_batches == -(-8 // best.micro)


def test_the_fastest_of_all_that_fit() -> None:
    """Beside every micro-batch and every number of blocks and halves, one by one."""
    some = replace(work(), exact=True)
    room, blocks = int(0.7 * need(some)), some.blocks
    here = [p for p in found(some, room) if p.fits and not p.step.offload and not p.step.fused_backward]
    every = [
        replace(some.at(some.step, micro), blocks=b, feeds=f)
        for micro, b, f in product(sizes(8), range(blocks + 1), range(blocks + 1))
        if b + f <= blocks
    ]
    fitting = [seconds(step) for step in every if estimate(MODEL, step).peak <= room]
    assert fitting
    assert here[0].seconds <= 1.03 * min(fitting)


def test_no_more_is_computed_again_than_must_be() -> None:
    some = work()
    plain = replace(some.at(some.step, 8), tight=True)

    def peak(step: Step) -> int:
        return estimate(MODEL, step).peak

    halves = [replace(plain, feeds=n) for n in range(some.blocks + 1)]
    whole = [replace(plain, blocks=n, feeds=some.blocks - n) for n in range(1, some.blocks + 1)]
    for few, more in pairwise([*halves, *whole]):
        assert peak(more) < peak(few)
        room = peak(more)
        chosen = lightest(some, plain, lambda step, room=room: peak(step) <= room)  # type: ignore[misc]
        assert chosen is not None
        assert peak(chosen) <= room
        assert (chosen.blocks, chosen.feeds) <= (more.blocks, more.feeds)
    assert lightest(some, plain, lambda step: False) is None


def test_the_order_is_exact_then_fast_then_what_lacks_least() -> None:
    plans = found(work(), int(0.5 * need(work())))
    fits = [p for p in plans if p.fits]
    assert [(not p.exact, p.seconds) for p in fits] == sorted((not p.exact, p.seconds) for p in fits)
    lacking = [p.missing for p in plans if not p.fits]
    assert plans == fits + plans[len(fits) :]
    assert lacking == sorted(lacking)


def test_what_is_missing_is_what_would_do() -> None:
    some = work()
    lacking = found(some, 2**20)
    assert not any(p.fits for p in lacking)
    least = lacking[0]
    assert not some_way_fits(some, 2**20 + least.missing - 1)
    assert some_way_fits(some, 2**20 + least.missing)
    assert found(some, 2**20 + least.missing)[0].fits


def test_less_room_is_never_faster() -> None:
    some = work(exact=True)
    times = [found(some, int(share * need(some)))[0].seconds for share in (1.0, 0.8, 0.6, 0.4)]
    assert times == sorted(times)


def test_exact_ways_keep_optimizer_weights_and_clipping() -> None:
    for step in ways(work(exact=True)):
        assert (step.optimizer, step.weights, step.clip) == (Optimizer(), "fp32", True)
    kinds = {step.optimizer.kind for step in ways(work())}
    assert kinds == {"adamw", "adamw8bit", "apollo"}
    without = replace(work(), eight_bit=False)
    assert {step.optimizer.kind for step in ways(without)} == {"adamw", "apollo"}


def test_an_adapter_is_not_made_what_it_cannot_be() -> None:
    for step in ways(work(adapter=Adapter(8))):
        assert (step.fused_backward, step.weights, step.optimizer) == (False, "fp32", Optimizer())
        assert "optimizer" not in step.offload


def test_a_fused_step_is_one_micro_batch() -> None:
    for plan in found(work(), int(0.4 * need(work()))):
        assert plan.micro == 8 or not plan.step.fused_backward


def test_a_correction_asks_for_more() -> None:
    some = work()
    exactly = need(some)
    assert search(some, exactly, seconds)[0].name == "as asked for"
    assert search(some, exactly, seconds, 1.1)[0].name != "as asked for"
    assert search(some, int(1.1 * exactly) + 1, seconds, 1.1)[0].name == "as asked for"


def test_fixed_work_keeps_its_micro_batch() -> None:
    some = replace(work(), fixed=True)
    for plan in found(some, int(0.6 * need(some))):
        assert plan.micro == 8
        assert (plan.step.blocks, plan.step.feeds) == (0, 0)
    for way in ways(some):
        assert leanest(some, way).blocks == 0


def test_sizes_halve() -> None:
    assert sizes(32) == [32, 16, 8, 4, 2, 1]
    assert sizes(6) == [6, 3, 2, 1]
    assert sizes(1) == [1]


def test_words_say_what_differs() -> None:
    plans = found(work(), int(0.3 * need(work())))
    said = " ".join(p.name for p in plans)
    for word in ("8-bit AdamW", "bf16 weights", "fused backward", "blocks", "optimizer on disk", "APOLLO"):
        assert word in said


def test_virtual_tokens_stand_before_what_the_first_stack_reads() -> None:
    step = Step(Lengths(1, 1), adapter=Adapter(5, kind="prompt"))
    led = Shape(Lengths(2, 30, 50)).of(step)
    assert (led.lengths.length, led.lengths.total) == (35, 60) and led.led(-5).lengths.total == 50
    led = Shape(Lengths(2, 30), Lengths(2, 40)).of(step)
    assert led.lengths.total == 60 and led.source is not None and led.source.total == 90
    assert Shape(Lengths(2, 30)).of(replace(step, adapter=Adapter(5, kind="prefix"))).lengths.total == 60
