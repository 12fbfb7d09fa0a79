import math

import pytest
from pydantic import TypeAdapter, ValidationError

from ronna.train.schedule import WSD, Constant, Cosine, Linear, Schedule, lr_scale, warmup_steps

R = math.sqrt

TABLES = {
    "constant": (Constant(), 4, [1, 1, 1, 1, 1]),
    "constant, warmup": (Constant(warmup=4), 6, [0.25, 0.5, 0.75, 1, 1, 1, 1]),
    "linear": (Linear(), 4, [1, 0.75, 0.5, 0.25, 0, 0]),
    "linear, warmup": (Linear(warmup=2), 6, [0.5, 1, 1, 0.75, 0.5, 0.25, 0]),
    "linear, warmup as a part": (Linear(warmup=0.25), 8, [0.5, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]),
    "linear, floor": (Linear(min_ratio=0.2), 4, [1, 0.8, 0.6, 0.4, 0.2, 0.2]),
    "cosine": (Cosine(min_ratio=0.0), 4, [1, (2 + R(2)) / 4, 0.5, (2 - R(2)) / 4, 0]),
    "cosine, floor": (Cosine(warmup=1, min_ratio=0.1), 3, [1, 1, 0.55, 0.1, 0.1]),
    "wsd": (WSD(warmup=2, decay=0.5), 8, [0.5, 1, 1, 1, 1, 0.5, 1 - R(0.5), 1 - R(0.75), 0]),
    "wsd, linear": (WSD(decay=0.5, shape="linear"), 4, [1, 1, 1, 0.5, 0]),
    "wsd, floor": (WSD(decay=0.5, shape="linear", min_ratio=0.5), 4, [1, 1, 1, 0.75, 0.5]),
    "wsd, no decay": (WSD(decay=0.0), 3, [1, 1, 1]),
    "wsd, decay meets warmup": (WSD(warmup=3, decay=1.0, shape="linear"), 5, [1 / 3, 2 / 3, 1, 1, 0.5, 0]),
    "warmup longer than the run": (Linear(warmup=8), 4, [1 / 8, 2 / 8, 3 / 8, 4 / 8]),
    "warmup as long as the run": (Linear(warmup=2), 2, [0.5, 1, 0, 0]),
}


@pytest.mark.parametrize("name", TABLES)
def test_table(name):
    config, total, expected = TABLES[name]
    assert [lr_scale(config, step, total) for step in range(len(expected))] == pytest.approx(expected)


@pytest.mark.parametrize("config", [Constant(warmup=7), Linear(warmup=0.1), Cosine(), WSD(warmup=5)])
def test_every_step_learns_and_none_exceeds_the_peak(config):
    scales = [lr_scale(config, step, 100) for step in range(100)]
    assert min(scales) > 0 and max(scales) == 1


def test_the_stable_part_of_wsd_does_not_know_the_length_of_the_run():
    config = WSD(warmup=10, decay=0.2)
    assert [lr_scale(config, s, 100) for s in range(80)] == [lr_scale(config, s, 500) for s in range(80)]


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (3, 3), (0.0, 0), (0.06, 6), (0.055, 6), (1, 1)])
def test_warmup_in_steps_or_as_a_part(warmup, steps):
    assert warmup_steps(Linear(warmup=warmup), 100) == steps


def test_configs_are_told_apart_by_kind():
    adapter = TypeAdapter(Schedule)
    assert adapter.validate_python({"kind": "wsd", "decay": 0.1}) == WSD(decay=0.1)
    for wrong in ({"kind": "cosin"}, {"kind": "linear", "warmup": -1}, {"kind": "linear", "warmup": 1.5}):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)
