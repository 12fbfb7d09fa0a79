"""Orders of turns, and what has no pipeline; that losses and gradients are right is shown in `test_ranks`."""

from collections import defaultdict, deque

import pytest

from ronna.base.errors import RonnaError
from ronna.compatible import refuse_shared
from ronna.model.families import preset
from ronna.model.transformer import Transformer
from ronna.parallel.pipeline import Turn, bounds, cut, in_order, one_forward_one_backward, waiting
from ronna.parallel.world import ParallelConfig, World, joined
from ronna.runfile import FinetuneRun


def played(ranks: int, chunks: int, micros: int) -> tuple[int, list[int]]:
    """Turns of all ranks side by side, each of one unit of time; what is sent lies ready until somebody comes for it,
    in order, and nobody may have more than so much lying ready. The time until all are done, and the most micro-batches
    that each rank had on its way."""
    todo = [deque(one_forward_one_backward(rank, ranks, chunks, micros)) for rank in range(ranks)]
    lines: dict[tuple[int, bool], deque] = defaultdict(deque)  # to a rank, of one way
    sent, held, most, time = [0] * ranks, [0] * ranks, [0] * ranks, 0
    stages = ranks * chunks
    turned = [set() for _ in range(ranks)]
    while any(todo):
        moved = []
        for rank, turns in enumerate(todo):
            if not turns:
                continue
            turn = turns[0]
            stage = turn.chunk * ranks + rank
            comes = stage > 0 if turn.forward else stage < stages - 1
            line = lines[rank, turn.forward]
            if (comes and not line) or sent[rank] > waiting(ranks, chunks):
                continue
            if comes:
                assert line[0] == (stage, turn.micro), "what comes is not what the rank waits for"
            if not turn.forward:
                assert (turn.chunk, turn.micro) in turned[rank], "back before it went forward"
            moved.append((rank, turn, stage, comes))
        assert moved, "nobody can go on"
        time += 1
        for rank, turn, stage, comes in moved:
            todo[rank].popleft()
            if comes:
                lines[rank, turn.forward].popleft()
                sent[(rank - 1 if turn.forward else rank + 1) % ranks] -= 1
            turned[rank].add(turn[:2])
            held[rank] += 1 if turn.forward else -1
            most[rank] = max(most[rank], held[rank])
            goes = stage < stages - 1 if turn.forward else stage > 0
            if goes:
                to, step = ((rank + 1) % ranks, 1) if turn.forward else ((rank - 1) % ranks, -1)
                lines[to, turn.forward].append((stage + step, turn.micro))
                sent[rank] += 1
    assert not any(lines.values()) and held == [0] * ranks
    assert all(len(done) == chunks * micros for done in turned)
    return time, most


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("micros", [1, 2, 3, 5, 8, 16])
def test_one_forward_one_backward(ranks, micros):
    time, most = played(ranks, 1, micros)
    assert time == 2 * (micros + ranks - 1)  # no order of one run of blocks a rank waits less
    assert most == [min(micros, ranks - rank) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_several_runs_of_blocks_wait_less(ranks, chunks, rounds):
    micros = ranks * rounds
    time, _ = played(ranks, chunks, micros)
    # A turn is a part of one of a single run of blocks.
    assert time == 2 * (micros * chunks + ranks - 1) < 2 * chunks * (micros + ranks - 1)


@pytest.mark.parametrize("micros", [1, 3, 5])
def test_several_runs_of_blocks_with_any_number_of_micro_batches(micros):
    for ranks, chunks in ((2, 2), (4, 3)):
        _, most = played(ranks, chunks, micros)
        assert most == [chunks * micros] * ranks  # all go forward before the first one goes back


def test_a_rank_with_all_blocks_takes_one_after_the_other():
    assert in_order(2) == [Turn(0, 0, True), Turn(0, 0, False), Turn(0, 1, True), Turn(0, 1, False)]


def test_every_block_is_somewhere():
    for blocks in (4, 7, 12):
        parts = bounds(blocks, 4)
        assert [i for part in parts for i in part] == list(range(blocks))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_has_no_pipeline_is_refused():
    world = World(0, 4, pipeline=4)
    with pytest.raises(RonnaError, match=r"parallel\.pipeline: an encoder-decoder has no pipeline"):
        cut(Transformer(preset("t5-tiny", vocab_size=101)[1]), world)
    with pytest.raises(RonnaError, match=r"parallel\.pipeline: 2 blocks cannot lie in 4 parts"):
        cut(Transformer(preset("bert-tiny", vocab_size=101)[1]), world)


def test_adapters_are_refused():
    asked = {
        "verb": "finetune",
        "out": "o",
        "model": {"name": "m"},
        "data": {"train": "t"},
        "task": {"kind": "classify"},
    }
    run = FinetuneRun.model_validate(asked | {"peft": {"kind": "lora"}, "parallel": {"pipeline": 2}})
    with pytest.raises(RonnaError, match=r"parallel\.pipeline: an adapter on a pipeline does not work"):
        refuse_shared(run)
    refuse_shared(FinetuneRun.model_validate(asked | {"parallel": {"pipeline": 2}}))


def test_several_runs_of_blocks_need_a_pipeline(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(RonnaError, match=r"parallel\.chunks: a rank that has all blocks has them in one run"),
        joined(ParallelConfig(chunks=2), "cpu"),
    ):
        pass
