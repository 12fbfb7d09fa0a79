"""Batches that several look at together: everyone makes the same calls, and has all answers in the end."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from threading import Barrier, Lock

import pytest
import torch

from ronna.decoding.among import SINGLE, owned, turns
from ronna.decoding.decode import generate
from ronna.decoding.sampling import GenerateConfig
from ronna.model.init import build


class Thread:
    """One of several threads, which give each other what ranks would."""

    def __init__(self, part, parts, barrier, slots):
        self.part, self.parts, self.barrier, self.slots = part, parts, barrier, slots

    def from_parts(self, mine):
        self.barrier.wait(20)
        self.slots[self.part] = mine
        self.barrier.wait(20)
        return [self.slots[part] for part in range(self.parts)]

    def any(self, here):
        return any(self.from_parts(here))


def together(parts, work):
    """What `work(among)` returns in each of so many threads."""
    barrier, slots = Barrier(parts), {}
    with ThreadPoolExecutor(parts) as pool:
        said = [pool.submit(work, Thread(part, parts, barrier, slots)) for part in range(parts)]
        return [one.result(timeout=120) for one in said]


@pytest.mark.parametrize("count", range(8))
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_each_batch_has_one_owner_and_all_take_as_many(parts, count):
    batches = [f"batch {i}" for i in range(count)]
    among = [Thread(part, parts, None, None) for part in range(parts)]
    taken = [list(turns(batches, one)) for one in among]
    assert len({len(some) for some in taken}) == 1 and len(taken[0]) == -(-count // parts)
    mine = [[batch for batch, own in some if own] for some in taken]
    assert sorted(chain(*mine)) == batches
    assert mine == [list(owned(batches, part, among[0])) for part in range(parts)]
    assert list(turns(batches, SINGLE)) == [(batch, True) for batch in batches]


class Counted:
    """How often a model is called, and by what."""

    def __init__(self, model):
        self.calls, lock = [], Lock()
        for name in ("encode", "hidden"):
            setattr(model, name, partial(self.call, name, getattr(model, name), lock))

    def call(self, name, inner, lock, *inputs, **more):
        with lock:
            self.calls.append(name)
            return inner(*inputs, **more)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.3}, {"beams": 3}], ids=["greedy", "drawn", "beams"])
@pytest.mark.parametrize("parts", [2, 3])
def test_shared_prompts_are_continued_as_by_one(models, prompts, name, options, parts):
    config, model = GenerateConfig(max_tokens=12, no_repeat_ngram=1, **options), models[name]
    eos = {generate(model, prompts, config, start=1)[0].tokens[3]}  # an end that comes early to some
    wanted = generate(model, prompts, config, eos=eos, start=1, batch_size=2, decode=str)
    state, calls = model.state_dict(), {}

    def work(among):
        mine = build(model.cfg, seed=0)
        mine.load_state_dict(state)
        calls[among.part] = Counted(mine).calls
        return generate(mine, prompts, config, eos=eos, start=1, batch_size=2, decode=str, among=among)

    for found in together(parts, work):
        assert [(g.tokens, g.text, g.finish) for g in found] == [(g.tokens, g.text, g.finish) for g in wanted]
        assert [g.score for g in found] == pytest.approx([g.score for g in wanted], abs=1e-5)
    assert all(calls[part] == calls[0] for part in range(parts)) and len(calls[0]) > 4
    assert len({len(g.tokens) for g in wanted}) > 1  # some have to wait for others


def test_nothing_to_continue(models):
    assert together(2, lambda among: generate(models["gpt2"], [], GenerateConfig(), among=among)) == [[], []]


def test_parts_of_unequal_size_come_whole():
    work = lambda among: [x.tolist() for x in among.from_parts(torch.arange(among.part))]  # noqa: E731
    assert together(3, work) == [[[], [0], [0, 1]]] * 3
