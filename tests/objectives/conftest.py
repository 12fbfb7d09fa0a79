from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ronna.data.shards import Shards, write_shards
from ronna.objectives.mlm import Vocabulary

SPECIALS = 10  # ids below are special: 0 pad, 1 unk, 2 cls, 3 sep, 4 mask, 5 to 9 sentinels


@pytest.fixture
def vocabulary() -> Vocabulary:
    size = 200
    ids = np.arange(size)
    return Vocabulary(
        size,
        cls=2,
        sep=3,
        mask=4,
        special=ids < SPECIALS,
        continues_word=ids % 5 == 0,
        ends_sentence=ids % 17 == 3,
    )


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[[list[int]], Shards]:
    def make(lengths: list[int]) -> Shards:
        rng = np.random.default_rng(0)
        documents = [rng.integers(SPECIALS, 200, size=n) for n in lengths]
        write_shards(tmp_path / "shards", documents, vocab_size=200, tokenizer_hash="t", source_hash="s")
        return Shards(tmp_path / "shards")

    return make
