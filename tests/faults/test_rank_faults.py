"""A run of two ranks that loses one recovers by itself, and ends in the same bits; `ranks.py` has more faults."""

import pytest

from .ranks import FAULTS, Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("fault", ["F1", "F2"])
def test_a_lost_rank_is_replaced_and_the_bits_are_the_same(fault, bench):
    assert FAULTS[fault][1](bench, bench.folder / fault, 0) == ""
