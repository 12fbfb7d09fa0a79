import threading
import traceback
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ronna.base.errors import RonnaError
from ronna.data.loader import Order, positions_for, prefetch, sample_rng

GOLDEN = [2, 5, 7, 8, 1, 9, 3, 4, 0, 6, 9, 2]  # two epochs of Order(10, seed=7), cut in the second


@given(n=st.integers(1, 50), seed=st.integers(0, 2**63), epoch=st.integers(0, 5))
def test_an_epoch_holds_every_item_once(n, seed, epoch):
    assert sorted(Order(n, seed).at(np.arange(n * epoch, n * (epoch + 1)))) == list(range(n))


def test_order_does_not_depend_on_what_was_asked_before():
    positions = np.random.default_rng(0).integers(0, 1000, size=300)
    order = Order(97, seed=3)
    at_once = order.at(positions)
    one_by_one = [int(order.at(np.array([p]))[0]) for p in positions]
    fresh = [int(Order(97, seed=3).at(np.array([p]))[0]) for p in positions[:20]]
    assert at_once.tolist() == one_by_one and at_once.tolist()[:20] == fresh


def test_order_is_what_it_was():
    """A resumed run must see the order it began with, under any version of NumPy."""
    assert Order(10, seed=7).at(np.arange(12)).tolist() == GOLDEN


def test_orders_are_uniform_and_differ():
    few = Counter(tuple(Order(3, seed=0).at(np.arange(3 * e, 3 * e + 3)).tolist()) for e in range(600))
    assert len(few) == 6 and min(few.values()) > 60
    first, other = Order(1000, 0).at(np.arange(2000)), Order(1000, 1).at(np.arange(1000))
    assert (first[:1000] == first[1000:]).mean() < 0.01 and (first[:1000] == other).mean() < 0.01


def test_no_items():
    with pytest.raises(RonnaError, match="no items"):
        Order(0, 0)


@given(
    batch=st.integers(1, 40),
    step=st.integers(0, 1000),
    world=st.integers(1, 4),
    accumulation=st.integers(1, 4),
)
def test_a_step_takes_the_same_samples_however_it_is_divided(batch, step, world, accumulation):
    divided = {"batch": batch, "world": world, "accumulation": accumulation}
    if world * accumulation > batch:
        with pytest.raises(RonnaError, match="cannot be divided"):
            positions_for(step, **divided)
        return
    parts = [
        positions_for(step, rank=rank, micro=micro, **divided) for micro in range(accumulation) for rank in range(world)
    ]
    assert np.concatenate(parts).tolist() == list(range(step * batch, (step + 1) * batch))
    sizes = {len(part) for part in parts}
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


def test_sample_rng_follows_from_seed_and_position():
    def draw(seed, position):
        return tuple(sample_rng(seed, position).integers(2**63, size=2).tolist())

    pairs = [(seed, position) for seed in (0, 1, 2**64 - 1) for position in (0, 1, 2**40)]
    assert [draw(*pair) for pair in pairs] == [draw(*pair) for pair in pairs]
    assert len({draw(*pair) for pair in pairs}) == len(pairs)


def test_the_masks_of_sample_e_are_not_the_order_of_epoch_e():
    order = np.argsort(sample_rng(5, 0).bit_generator.random_raw(100))
    assert not np.array_equal(Order(100, 5).at(np.arange(100)), order)


def test_prefetch_in_order_and_only_so_far_ahead():
    made = []

    def make(step):
        made.append(step)
        return step * step

    steps = prefetch(make, 3, depth=2)
    assert [next(steps) for _ in range(4)] == [9, 16, 25, 36]
    steps.close()
    assert made == sorted(made) and len(made) <= 4 + 3
    assert list(prefetch(make, 0, stop=3, depth=8)) == [0, 1, 4]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetch_raises_at_the_step_with_the_traceback():
    def make(step):
        if step == 2:
            raise KeyError("row 2")
        return step

    seen = []
    with pytest.raises(KeyError, match="row 2") as raised:
        for step in prefetch(make, 0, depth=4):
            seen.append(step)
    assert seen == [0, 1]
    assert 'raise KeyError("row 2")' in "".join(traceback.format_tb(raised.value.__traceback__))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    with pytest.raises(ValueError, match="depth 0"):
        next(prefetch(make, 0, depth=0))
