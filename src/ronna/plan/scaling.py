"""How good a language model becomes with its size and the tokens it has seen, and sizes to choose from."""

from collections.abc import Callable, Iterator

# Hoffmann et al. 2022 ("Chinchilla"), third approach, as fitted again by Besiroglu et al. 2024 (arXiv 2404.10102).
FLOOR, OF_SIZE, OF_TOKENS, SIZE_POWER, TOKENS_POWER = 1.8172, 482.01, 2085.43, 0.3478, 0.3658


def expected_loss(params: float, tokens: float) -> float:
    """Nats a token of a decoder on web text: good for comparing sizes, not for foretelling a loss on other data."""
    return FLOOR + OF_SIZE / params**SIZE_POWER + OF_TOKENS / tokens**TOKENS_POWER


def best_tokens(params: float) -> float:
    """How many tokens make the most of 6 N D operations for a model of N parameters."""
    # Where the two terms lose as much by a little less of either: d/dN = d/dD on N D = const.
    return (TOKENS_POWER * OF_TOKENS / (SIZE_POWER * OF_SIZE) * params**SIZE_POWER) ** (1 / TOKENS_POWER)


def proportions(head: int, least: int = 2, widest: int = 16384) -> Iterator[tuple[int, int]]:
    """Widths and numbers of blocks, from small to large: models become deeper as they become wider, by about what
    published ones have (512 x 8, 1024 x 16, 2048 x 24, 4096 x 32)."""
    step = max(head, 64)
    for width in range(step, widest + 1, step):
        usual = width / (48 + width / 50)
        for blocks in range(max(least, round(0.85 * usual)), max(least, round(1.2 * usual)) + 1):
            yield width, blocks


def largest(sizes: int, fits: Callable[[int], bool]) -> int | None:
    """The last of so many in order that fits, by bisection; None if not even the first does."""
    if not sizes or not fits(0):
        return None
    low, high = 0, sizes - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
