import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ronna.base.errors import RonnaError
from ronna.data.mixture import Mixture

WEIGHTS = st.lists(st.integers(1, 60), min_size=1, max_size=8)


def shares(sources, k):
    return np.cumsum(sources[:, None] == np.arange(k), axis=0)


@given(weights=WEIGHTS, scale=st.sampled_from([1, 0.01, 3.5]))
def test_every_prefix_is_within_one_of_its_weights(weights, scale):
    mixture = Mixture([weight * scale for weight in weights])
    positions = np.arange(2 * mixture.period + 7)
    sources, ordinals = mixture.draw(positions)
    counts = shares(sources, len(weights))
    expected = (positions + 1)[:, None] * np.asarray(weights) / sum(weights)
    assert np.abs(counts - expected).max() < 1 + 1e-9
    for source in range(len(weights)):
        assert np.array_equal(ordinals[sources == source], np.arange((sources == source).sum()))


def test_random_access_far_away():
    mixture = Mixture([0.7, 0.2, 0.1])
    assert mixture.period == 10 and np.allclose(mixture.weights, [0.7, 0.2, 0.1])
    far = 10**12 + np.arange(100)
    sources, ordinals = mixture.draw(far)
    assert [int(n) for n in shares(sources, 3)[-1]] == [70, 20, 10]
    assert ordinals[sources == 1].min() == 2 * 10**11
    again = mixture.draw(far[::-1])
    assert np.array_equal(again[0][::-1], sources) and np.array_equal(again[1][::-1], ordinals)


def test_weights_without_a_short_period_are_rounded_and_said():
    wanted = np.array([123_456_789, 1, 987_654_321])
    mixture = Mixture(wanted.tolist())
    assert np.abs(mixture.weights - wanted / wanted.sum()).max() < 2 / 65_536
    sources, _ = mixture.draw(np.arange(mixture.period))
    expected = np.arange(1, mixture.period + 1)[:, None] * np.asarray(mixture.weights)
    assert np.abs(shares(sources, 3) - expected).max() < 1
    assert (sources == 1).sum() == 1, "a source that was named is drawn"


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [float("nan")], [float("inf")]])
def test_bad_weights(weights):
    with pytest.raises(RonnaError):
        Mixture(weights)
