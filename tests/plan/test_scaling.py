"""The law of sizes and tokens, and the sizes to choose from."""

import pytest

from ronna.plan.scaling import best_tokens, expected_loss, largest, proportions


def test_loss_falls_with_size_and_tokens() -> None:
    assert expected_loss(2e9, 1e10) < expected_loss(1e9, 1e10)
    assert expected_loss(1e9, 2e10) < expected_loss(1e9, 1e10)
    assert expected_loss(1e30, 1e30) == pytest.approx(1.8172, abs=1e-3)


@pytest.mark.parametrize("params", [1e8, 1e9, 7e10])
def test_best_tokens_are_the_best_of_the_same_operations(params: float) -> None:
    tokens = best_tokens(params)
    here = expected_loss(params, tokens)
    for factor in (0.8, 0.95, 1.05, 1.25):
        assert expected_loss(params * factor, tokens / factor) > here


def test_about_twenty_tokens_for_each_parameter() -> None:
    """As Hoffmann et al. have it, for the sizes that they trained."""
    assert 15 < best_tokens(1e9) / 1e9 < 30


def test_proportions_contain_about_what_is_published() -> None:
    found = set(proportions(64))
    for width, blocks in ((512, 8), (768, 12), (2048, 24), (4096, 32)):
        assert any(w == width and abs(b - blocks) <= max(2, 0.1 * blocks) for w, b in found)
    assert all(width % 64 == 0 and blocks >= 2 for width, blocks in found)


def test_largest_is_found_by_bisection() -> None:
    asked: list[int] = []

    def fits(i: int) -> bool:
        asked.append(i)
        return i <= 700

    assert largest(1000, fits) == 700
    assert len(asked) < 14
    assert largest(1000, lambda i: False) is None
    assert largest(0, lambda i: True) is None
    assert largest(5, lambda i: True) == 4
