"""How devices share a step by the planner: layouts, what each holds, and what they wait for."""

from dataclasses import replace

import pytest

from ronna.model import config as c
from ronna.model.families import preset
from ronna.parallel.pipeline import bounds, one_forward_one_backward
from ronna.plan.hardware import device
from ronna.plan.memory import estimate, estimate_stage
from ronna.plan.ranks import ALONE, Ranks, apart, around, block_sizes, divided, divides, layouts, sent, share
from ronna.plan.shapes import Adapter, Lengths
from ronna.plan.stages import blocks_of, on_their_way, stages, with_blocks
from ronna.plan.stretches import Step
from ronna.plan.time import step_time
from ronna.plan.weights import Weight, weights

LLAMA, T5 = preset("llama-3-8b", num_hidden_layers=8)[1], preset("t5-base")[1]


def step(ranks: Ranks = ALONE, sequences: int = 4, **more: object) -> Step:
    return Step(Lengths(sequences, 512), compute="bf16", device="cuda", ranks=ranks, **more)


def test_layouts_divide_the_devices_and_stay_within_a_machine() -> None:
    everything = list(layouts(LLAMA, 64, 8, most_parts=64))
    assert len(everything) == len(set(everything)) and all(r.size == 64 for r in everything)
    found = [r for r in everything if r.pipeline == 1]
    assert all(r.size == 64 and r.tensor <= 8 and divides(LLAMA, r.tensor) for r in found)
    assert {Ranks(1, 64, 1), Ranks(8, 8, 1), Ranks(64, 1, 1), Ranks(1, 8, 8), Ranks(8, 2, 4)} <= set(found)
    assert all(r.tensor == r.pipeline == 1 for r in layouts(LLAMA, 64, 8, 64, whole=False))
    assert all(r.parts <= 16 for r in layouts(LLAMA, 64, 8, most_parts=16))
    assert not [r for r in layouts(LLAMA, 64, 8, most_parts=4) if r.pipeline == 1]
    assert list(layouts(LLAMA, 2, 1, 8)) == [Ranks(1, 2, 1), Ranks(2, 1, 1), Ranks(pipeline=2)]


def test_layouts_with_a_pipeline() -> None:
    found = [r for r in layouts(LLAMA, 64, 8, most_parts=64) if r.pipeline > 1]
    assert {r.pipeline for r in found} == {2, 4, 8}  # of 8 blocks
    assert {Ranks(1, 8, pipeline=8), Ranks(1, 4, 8, pipeline=2), Ranks(4, 1, 8, pipeline=2)} <= set(found)
    assert all(r.parts * r.pipeline <= 64 for r in found)  # else most of the time is waited for others
    assert all(r.pipeline == 1 for r in layouts(T5, 8, 8, 8))


def test_layouts_in_which_texts_are_shared() -> None:
    found = list(layouts(LLAMA, 16, 8, most_parts=16, context=True))
    assert len(found) == len(set(found)) and set(layouts(LLAMA, 16, 8, 16)) < set(found)
    assert all(r.size == 16 and r.context * r.tensor <= 8 for r in found)
    assert {Ranks(1, 2, context=8), Ranks(2, 1, context=8), Ranks(1, 4, 2, context=2)} <= set(found)
    assert {r.parts for r in layouts(LLAMA, 16, 8, most_parts=2, context=True) if r.pipeline == 1} == {2}
    assert all(r.context == 1 for r in layouts(preset("gpt2")[1], 8, 8, 8, context=True) if r.tensor == 4)  # 12 heads


@pytest.mark.parametrize("model", [LLAMA, T5], ids=["llama", "t5"])
def test_a_tensor_group_holds_a_block_once(model: c.Model) -> None:
    part = divided(model, Ranks(tensor=4))
    inside = sum(w.size for w in weights(model) if w.inside and w.columns)
    assert sum(w.size for w in weights(part) if w.inside and w.columns) * 4 == inside
    assert sum(block_sizes(model)) + around(model) == model.params()
    assert divided(model, Ranks(shard=4)) == model


def test_uneven_heads_are_not_divided() -> None:
    assert not divides(preset("gpt2")[1], 8)  # of 12 heads
    assert divides(preset("gpt2")[1], 4)
    assert not divides(preset("llama-1b")[1], 2)  # of 5,461 hidden channels


def test_the_first_rank_has_no_fewer_rows_than_any_other() -> None:
    assert share(Weight("w", 10, 3), Ranks(shard=4)).rows == 3
    assert share(Weight("w", 1), Ranks(shard=4)).rows == 1


def test_what_is_in_shards_falls_as_their_number() -> None:
    for name in ("weights", "optimizer"):
        one, two, eight = (estimate(LLAMA, step(Ranks(shard=n))).held[name] for n in (1, 2, 8))
        assert one == pytest.approx(2 * two, rel=0.01) and one == pytest.approx(8 * eight, rel=0.01)
    assert estimate(LLAMA, step(Ranks(replicate=8))).held["optimizer"] == estimate(LLAMA, step()).held["optimizer"]


def test_blocks_are_whole_one_at_a_time() -> None:
    model = preset("llama-3-8b", num_hidden_layers=8, vocab_size=1000)[1]  # with little around them
    eight = step(Ranks(shard=8))
    block, rest = 2 * block_sizes(model)[0], 4 * around(model)
    assert estimate(model, eight).held["gathered"] == 2 * block + rest  # one more comes in the meantime
    assert estimate(model, replace(eight, device="cpu")).held["gathered"] < 2 * block
    assert estimate(model, step()).held["gathered"] == 0
    assert estimate(LLAMA, eight).where == "loss" and estimate(LLAMA, eight).held["gathered"] == 4 * around(LLAMA)


def test_the_last_block_is_gathered_again_beside_what_all_have_kept() -> None:
    model = preset("llama-tiny", hidden_size=768, intermediate_size=2048, num_attention_heads=12, num_hidden_layers=8)[
        1
    ]
    found = estimate(model, Step(Lengths(4, 64), ranks=Ranks(shard=4)))
    assert found.where == "gathering block 7"
    assert found.held["activations"] == sum(found.activations)
    assert found.held["passing"] == 2 * 4 * block_sizes(model)[7] + 4 * 64 * model.dim * 4  # and a gradient


def test_micro_batches_keep_their_share_of_the_gradients() -> None:
    one, more = (estimate(LLAMA, step(Ranks(shard=8), micro_batches=n)) for n in (1, 2))
    assert more.peak > one.peak
    assert more.held["gradients"] - one.held["gradients"] <= LLAMA.params() * 4 / 8 * 1.01


def test_a_tensor_group_shares_activations_too() -> None:
    alone, four = (estimate(LLAMA, step(Ranks(tensor=n))).activations[0] for n in (1, 4))
    whole = estimate(LLAMA, step(Ranks(tensor=4, sequence=False))).activations[0]
    assert alone / 4 < four < whole < 0.6 * alone  # what divided maps read is whole on each rank in any case
    again = {"blocks": len(LLAMA.last.blocks)}
    alone, four = (estimate(LLAMA, step(Ranks(tensor=n), **again)).activations[0] for n in (1, 4))
    assert four == alone / 4


def test_a_tensor_group_shares_the_words() -> None:
    assert divided(LLAMA, Ranks(tensor=3)).embedding.vocab == -(-LLAMA.embedding.vocab // 3)
    alone, four = (estimate(LLAMA, step(Ranks(tensor=n), 64, compiled=False)) for n in (1, 4))
    assert (alone.where, four.where) == ("loss", "loss")
    shared = 6 * LLAMA.embedding.vocab * LLAMA.dim  # its table in bf16 and the gradient of it in fp32
    assert alone.held["passing"] - four.held["passing"] == pytest.approx(0.75 * shared, rel=0.01)


@pytest.mark.parametrize("model", [LLAMA, T5], ids=["llama", "t5"])
def test_a_context_group_shares_the_activations_of_a_text(model: c.Model) -> None:
    alone, four = (
        estimate(model, replace(step(Ranks(context=n)), source=Lengths(4, 512) if model is T5 else None))
        for n in (1, 4)
    )
    for before, after in zip(alone.activations, four.activations, strict=True):
        assert 0.24 * before < after < 0.3 * before
    assert alone.held["optimizer"] == pytest.approx(4 * four.held["optimizer"], rel=0.01)
    assert 4 * four.loss < 1.01 * alone.loss


def test_ranks_that_share_a_text_read_keys_that_are_fewer_than_they() -> None:
    one = apart(LLAMA.last.blocks[0].attention, 16)  # of 32 heads, 8 of keys and values
    assert (one.heads, one.kv) == (2, 1) and not divides(LLAMA, 16)
    one = apart(LLAMA.last.blocks[0].attention, 4)
    assert (one.heads, one.kv) == (8, 2)


def test_an_adapter_shares_its_base() -> None:
    adapter = Adapter(8)
    one, four = (estimate(LLAMA, step(Ranks(shard=n), adapter=adapter)).held["weights"] for n in (1, 4))
    assert one == pytest.approx(4 * four, rel=0.01)


def waits(ranks: Ranks, **more: object) -> float:
    time = step_time(LLAMA, step(ranks), replace(device("h100-80gb")[1], **more))
    return time.communication


def test_communication() -> None:
    assert waits(ALONE) == 0.0
    assert waits(Ranks(tensor=8)) > waits(Ranks(tensor=2)) > 0.0  # nothing else can be computed in the meantime
    far = waits(Ranks(shard=16), network=1e9)
    assert far > waits(Ranks(shard=16), network=1e10) > waits(Ranks(shard=8), network=1e9)
    assert waits(Ranks(2, 8), network=1e9) < far  # gradients alone travel between machines
    assert waits(Ranks(shard=8), machine=4, network=1e9) > waits(Ranks(shard=8), machine=8, network=1e9)


def test_texts_are_exchanged_around_attention() -> None:
    rows, width = 1000, 2
    it = sent(LLAMA, Ranks(context=4), rows * LLAMA.dim * width, width, learning=0, again=0)
    of_a_row = (32 + 8 + 8 + 32) * 128  # queries, keys, values, and what comes of them
    assert it.exchanged == rows * width * 8 * 2 * of_a_row and it.exchanges == 8 * 4
    again = sent(LLAMA, Ranks(context=4), rows * LLAMA.dim * width, width, learning=0, again=16)
    assert again.exchanged == 1.5 * it.exchanged  # forward twice, backward once
    assert sent(LLAMA, Ranks(shard=4), rows * LLAMA.dim * width, width, 0, 0).exchanged == 0
    near, far = (waits(Ranks(context=8), machine=n, network=1e9) for n in (8, 4))
    assert far > near > waits(Ranks(context=8), machine=8, network=1e9, link=1e12)


def test_ranks_that_share_a_text_do_as_much_of_it_each() -> None:
    card = device("h100-80gb")[1]
    one, four = (step_time(LLAMA, step(Ranks(context=n)), card) for n in (1, 4))
    assert four.flops == pytest.approx(one.flops / 4, rel=0.03)


def test_a_cpu_waits_for_all_that_is_sent() -> None:
    cpu = replace(device("h100-80gb")[1], kind="cpu")
    beside, alone = (step_time(LLAMA, step(Ranks(shard=8)), d).communication for d in (device("h100-80gb")[1], cpu))
    assert alone > beside


def test_more_ranks_take_less_time_for_a_share() -> None:
    card = device("h100-80gb")[1]
    one = step_time(LLAMA, step(sequences=8), card).total
    two = step_time(LLAMA, step(Ranks(tensor=2), sequences=8), card).total
    assert 0.4 * one < two < 0.9 * one


def test_a_pipeline_divides_the_blocks_and_waits_at_both_ends() -> None:
    flat, deep = (estimate(LLAMA, step(ranks, micro_batches=8)) for ranks in (Ranks(shard=4), Ranks(pipeline=4)))
    assert flat.weights == pytest.approx(deep.weights, rel=0.01)
    assert flat.held["optimizer"] == pytest.approx(deep.held["optimizer"], rel=0.01)
    inside = sum(w.size for w in weights(LLAMA) if w.inside)
    assert (
        sum(w.size for w in weights(with_blocks(LLAMA, blocks_of(8, Ranks(pipeline=4), 1))) if w.inside) * 4 == inside
    )
    _, card = device("h100-80gb")
    four, eight, more = (step_time(LLAMA, step(Ranks(pipeline=4), micro_batches=m), card) for m in (4, 8, 16))
    shares = [time.communication / (time.total - time.optimizer) for time in (four, eight, more)]
    for share_of_it, least in zip(shares, (3 / 7, 3 / 11, 3 / 19), strict=True):  # (P - 1) / (M + P - 1)
        assert least < share_of_it < least + 0.1  # what is sent
    chunks = step_time(LLAMA, step(Ranks(pipeline=4, chunks=2), micro_batches=8), card)
    assert chunks.communication < eight.communication


def test_the_first_rank_of_a_pipeline_has_most_micro_batches_on_their_way() -> None:
    ranks = Ranks(pipeline=4)
    assert [on_their_way(ranks, rank, 8) for rank in range(4)] == [4, 3, 2, 1]
    assert [on_their_way(ranks, rank, 2) for rank in range(4)] == [2, 2, 2, 1]
    turns = {(rank, micros): one_forward_one_backward(rank, 4, 2, micros) for rank in range(4) for micros in (4, 8, 6)}
    for (rank, micros), some in turns.items():
        most = max(sum(1 if t.forward else -1 for t in some[:i]) for i in range(len(some) + 1))
        assert on_their_way(replace(ranks, chunks=2), rank, micros) == most / 2, (rank, micros)
    first, last = stages(LLAMA, step(ranks, micro_batches=8, blocks=5, feeds=2))
    assert (first.behind, last.behind) == (3, 0) and first.computes.head is None and last.computes.head is not None
    assert (first.step.blocks, first.step.feeds, last.step.blocks, last.step.feeds) == (2, 0, 0, 1)
    held = [estimate_stage(stages(LLAMA, step(ranks, micro_batches=m))[0]).peak for m in (2, 3, 4, 8)]
    assert held[0] < held[1] < held[2] == held[3]
    assert estimate(LLAMA, step(ranks, micro_batches=8)).peak == max(
        estimate_stage(stage).peak for stage in stages(LLAMA, step(ranks, micro_batches=8))
    )


def test_blocks_lie_where_the_planner_thinks() -> None:
    for chunks in (1, 2):
        ranks = Ranks(pipeline=2, chunks=chunks)
        found = [[i for part in bounds(7, 2 * chunks)[rank::2] for i in part] for rank in (0, 1)]
        assert found == [blocks_of(7, ranks, rank) for rank in (0, 1)]
