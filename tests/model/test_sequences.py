import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ronna.model.sequences import Sequences, computed_rows, few_sizes

CPU = torch.device("cpu")

lengths = st.lists(st.one_of(st.integers(1, 12), st.integers(1, 40)), min_size=1, max_size=20)


@given(lengths)
def test_views_hold_every_token_once_and_give_it_back(some):
    sequences = Sequences.of(some)
    x = torch.arange(1, sequences.tokens + 1)[:, None]
    for view in (sequences.padded, sequences.packed):
        spread = view.spread(x)
        assert spread.shape == (view.rows, view.columns, 1)
        assert torch.equal(view.gather(spread), x)
        filled = spread[..., 0] > 0
        assert torch.equal(filled, view.sequence >= 0)
        owners = view.sequence[filled]
        assert torch.equal(owners.sort().values, sequences.owner.sort().values)
    assert sequences.padded.rows == len(some) and sequences.padded.columns == max(some)


@given(lengths)
def test_packed_views_have_few_shapes(some):
    view = Sequences.of(some).packed
    if len(set(some)) == 1:
        assert (view.rows, view.columns) == (len(some), some[0])
    else:
        assert max(some) <= view.columns <= max(some) + 7 and view.columns % 8 == 0
        assert view.rows <= len(some) * 9 / 8
    assert len({few_sizes(n, 1) for n in range(64, 1025)}) == 33


@given(lengths)
def test_packed_rows_hold_whole_sequences_in_order(some):
    view = Sequences.of(some).packed
    rows = [sorted(set(row[row >= 0].tolist())) for row in view.sequence if row.max() >= 0]
    assert [i for row in rows for i in row] == list(range(len(some)))
    assert view.single == all(len(row) == 1 for row in rows)


@given(lengths, st.booleans(), st.one_of(st.none(), st.integers(0, 6)))
def test_masks_say_what_the_words_say(some, causal, window):
    sequences = Sequences.of(some)
    view = sequences.packed
    mask = sequences.mask(view, causal=causal, window=window)
    full = (view.rows, 1, view.columns, view.columns)
    if mask is None:
        mask = torch.ones(full, dtype=torch.bool).tril() if causal else torch.ones(full, dtype=torch.bool)
    mask = mask.expand(full)
    for r in range(view.rows):
        for i in range(view.columns):
            if view.sequence[r, i] < 0:
                continue
            for j in range(view.columns):
                wanted = bool(view.sequence[r, i] == view.sequence[r, j])
                distance = i - j
                wanted &= not causal or distance >= 0
                wanted &= window is None or abs(distance) <= window
                assert bool(mask[r, 0, i, j]) == wanted


@given(lengths)
def test_every_row_of_a_mask_sees_something(some):
    """A row of scores that is wholly masked would be a row of NaN."""
    sequences = Sequences.of(some)
    for causal in (True, False):
        mask = sequences.mask(sequences.packed, causal=causal, window=3)
        assert mask is None or bool(mask.any(-1).all())


def test_positions_go_on_from_a_cache():
    sequences = Sequences(torch.tensor([2, 1, 3]), past=torch.tensor([4, 0, 7]))
    assert sequences.positions.tolist() == [4, 5, 0, 7, 8, 9]
    assert sequences.starts.tolist() == [0, 2, 3] and sequences.last.tolist() == [1, 2, 5]
    assert sequences.bounds.tolist() == [0, 2, 3, 6] and sequences.bounds.dtype is torch.int32


@pytest.mark.parametrize("equal", [[4, 4, 4], [7]])
def test_equal_lengths_need_neither_copies_nor_masks(equal):
    sequences = Sequences.of(equal)
    assert sequences.packed.slots is None
    assert sequences.mask(sequences.packed, causal=True, window=None) is None
    assert sequences.mask(sequences.packed, causal=False, window=None) is None


@given(st.integers(1, 20_000))
def test_rows_are_few_shapes_and_little_waste(tokens):
    rows = computed_rows(tokens, CPU)
    assert tokens <= rows <= tokens * 17 / 16 and computed_rows(rows, CPU) == rows
    wide = Sequences.of([tokens]).widen(torch.ones(tokens, 2))
    assert wide.shape == (rows, 2) and wide.sum() == 2 * tokens and bool((wide[:tokens] == 1).all())


def test_lengths_between_256_and_4096_have_less_than_a_hundred_shapes():
    assert len({computed_rows(n, CPU) for n in range(256, 4097)}) < 100
