"""When a launcher starts its ranks again, and when it does not."""

import pytest

from ronna import launch as module
from ronna.base.errors import RonnaError
from ronna.launch import launch


@pytest.mark.parametrize(
    ("codes", "restarts", "code", "tries", "said"),
    [
        ([0], 3, 0, 1, ""),
        ([1, 1, 0], 3, 0, 3, "starting again from the newest checkpoint (2 more times at most)"),
        ([1, 1, 1], 1, 1, 2, "rank 1 was lost; giving up"),
        ([1], 0, 1, 1, "giving up"),
        ([2], 3, 2, 1, ""),
        ([143], 3, 143, 1, ""),
        ([1, 143], 3, 143, 2, "starting again"),
    ],
)
def test_what_may_end_otherwise_is_tried_again(codes, restarts, code, tries, said, monkeypatch, capsys):
    seen = []

    def attempt(ranks, arguments):
        seen.append(list(arguments))
        return codes[len(seen) - 1], "rank 1 was lost"

    monkeypatch.setattr(module, "attempt", attempt)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert launch(2, ["pretrain", "x.toml"], restarts) == code and len(seen) == tries
    told = capsys.readouterr().err
    assert said in told and (told == "" if not said else True)
    assert "--resume" not in seen[0] and all("--resume" in later for later in seen[1:])


@pytest.mark.parametrize(("ranks", "restarts", "where"), [(0, 3, "--nproc"), (2, -1, "--restarts")])
def test_numbers_that_make_no_sense(ranks, restarts, where):
    with pytest.raises(RonnaError, match=where):
        launch(ranks, [], restarts)


@pytest.mark.parametrize(
    ("codes", "first"),
    [([143, -15], 143), ([1, -9], -9), ([-15, 2], 2), ([1, 143], 143), ([-15, 1], 1), ([-6, -15], -6)],
)
def test_the_rank_that_was_the_cause(codes, first):
    assert min(codes, key=module.secondary) == first
