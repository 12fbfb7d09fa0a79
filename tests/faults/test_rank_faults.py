"""A run of two ranks that loses one, or cannot save, goes on by itself and ends in the same bits; `ranks.py` has more
faults."""

import pytest

from .ranks import FAULTS, Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("fault", ["F1", "F1t", "F2", "F13"])
def test_it_goes_on_and_ends_in_the_same_bits(fault, bench):
    assert FAULTS[fault][1](bench, bench.folder / fault, 0) == ""
