import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ronna.base.errors import RonnaError
from ronna.data.packing import chunk_and_pack, length_batches
from ronna.data.sources import BadRows, read_records

LENGTHS = st.lists(st.integers(0, 70), max_size=80)


def slow_best_fit(sizes, capacity):
    """Best-fit decreasing word for word: the number of bins it needs."""
    free = []
    for size in sorted(sizes, reverse=True):
        fitting = [space for space in free if space >= size]
        if fitting:
            free.remove(min(fitting))
            free.append(min(fitting) - size)
        else:
            free.append(capacity - size)
    return len(free)


@given(lengths=LENGTHS, capacity=st.integers(3, 40), overhead=st.integers(0, 2))
def test_every_token_exactly_once_and_no_bin_over_full(lengths, capacity, overhead):
    packing = chunk_and_pack(lengths, capacity, overhead=overhead)
    seen = [np.zeros(n, dtype=int) for n in lengths]
    pieces = [packing[b] for b in range(len(packing))]
    for bin in pieces:
        assert bin and sum(length + overhead for _, _, length in bin) <= capacity
        for document, start, length in bin:
            assert length > 0
            seen[document][start : start + length] += 1
    assert all((counts == 1).all() for counts in seen)
    flat = [piece for bin in pieces for piece in bin]
    assert len(flat) == len(packing.length)
    for n, document in zip(lengths, range(len(lengths)), strict=True):
        room = capacity - overhead
        cut = sorted(length for d, _, length in flat if d == document)
        assert cut == sorted([room] * (n // room) + [n % room] * (n % room > 0)), "cut only what is too long"


@given(lengths=LENGTHS, capacity=st.integers(3, 40))
def test_as_good_as_best_fit_decreasing_word_for_word(lengths, capacity):
    packing = chunk_and_pack(lengths, capacity)
    assert len(packing) == slow_best_fit(packing.length.tolist(), capacity)


@pytest.mark.parametrize("capacity", [512, 2048, 8192])
def test_fill_of_a_long_tail(capacity):
    lengths = np.exp(np.random.default_rng(0).normal(5.5, 1.2, size=50_000)).astype(int) + 1
    packing = chunk_and_pack(lengths, capacity, overhead=1)
    assert packing.length.sum() == lengths.sum()
    assert 0.995 <= packing.fill <= 1


@pytest.mark.parametrize("capacity", [128, 512, 2048])
def test_fill_of_real_articles(capacity, real_data):
    records = read_records(real_data / "lm_wiki_en/train.jsonl.gz", bad=BadRows())
    lengths = [len(record.fields["text"].split()) for record in records]
    assert 0.995 <= chunk_and_pack(lengths, capacity, overhead=1).fill <= 1


def test_packing_by_hand():
    packing = chunk_and_pack([9, 3, 0, 2], 4, overhead=0)
    assert [packing[b] for b in range(len(packing))] == [
        [(0, 0, 4)],
        [(0, 4, 4)],
        [(0, 8, 1), (1, 0, 3)],
        [(3, 0, 2)],
    ]
    assert packing.fill == 14 / 16
    assert len(chunk_and_pack([], 4)) == 0 and chunk_and_pack([], 4).fill == 1
    with pytest.raises(RonnaError, match="no room"):
        chunk_and_pack([1], 2, overhead=2)
    with pytest.raises(IndexError):
        packing[4]


@given(lengths=LENGTHS, size=st.integers(1, 9), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_batches_hold_every_item_once(lengths, size, seed, epoch):
    for limit in ({"batch_size": size}, {"batch_tokens": 10 * size}):
        batches = length_batches(lengths, seed=seed, epoch=epoch, **limit)
        assert sorted(i for batch in batches for i in batch.tolist()) == list(range(len(lengths)))
        again = length_batches(lengths, seed=seed, epoch=epoch, **limit)
        assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in again]
        for batch in batches:
            assert len(batch)
            if "batch_size" in limit:
                assert len(batch) <= size
            else:
                assert len(batch) == 1 or sum(lengths[i] for i in batch) <= 10 * size


def test_batches_are_full_of_like_lengths_and_new_every_epoch():
    lengths = np.exp(np.random.default_rng(0).normal(4, 0.8, size=20_000)).astype(int) + 1

    def padding(batches):
        return 1 - lengths.sum() / sum(len(batch) * lengths[batch].max() for batch in batches)

    by_size = length_batches(lengths, seed=1, epoch=0, batch_size=32)
    by_tokens = length_batches(lengths, seed=1, epoch=0, batch_tokens=4096)
    assert padding(np.split(np.arange(20_000), 625)) > 0.7, "what random batches would waste"
    assert padding(by_size) < 0.15 and padding(by_tokens) < 0.05
    assert sum(len(batch) < 32 for batch in by_size) <= 1
    assert len(by_tokens) <= 1.05 * lengths.sum() / 4096
    firsts = {int(length_batches(lengths, seed=s, epoch=e, batch_size=32)[0][0]) for s in (1, 2) for e in (0, 1)}
    assert len(firsts) == 4
    means = [lengths[batch].mean() for batch in by_size]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.1, "short before long would be a curriculum"


def test_batches_want_one_limit():
    for limits in ({}, {"batch_size": 1, "batch_tokens": 1}):
        with pytest.raises(ValueError, match="batch_size or batch_tokens"):
            length_batches([1], seed=0, epoch=0, **limits)
