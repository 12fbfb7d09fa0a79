"""A compiled model computes what it computed before, in batches of any size; who wants one."""

import pytest
import torch
import torch._dynamo.utils

from ronna.base.device import describe
from ronna.base.errors import RonnaError
from ronna.model import compiled
from ronna.model.config import Attention, Block, Embedding, FeedForward, Head, Model, Norm, Rotary, Stack
from ronna.model.init import build
from ronna.model.recompute import Recompute, recompute_blocks
from ronna.model.sequences import Sequences

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def of_blocks(count: int) -> Model:
    block = Block(
        Attention(2, 8, rotary=Rotary(), qk_norm=Norm("rms")), FeedForward(32, "silu", gated=True), Norm("rms")
    )
    return Model(16, Embedding(20), Head(tied=False), decoder=Stack((block,) * count, True, Norm("rms")))


@pytest.mark.skipif(not describe("cpu").has_compiler, reason="needs a C++ compiler")
@pytest.mark.parametrize("recompute", [Recompute(), Recompute(blocks=1), Recompute(feeds=2)], ids=str)
def test_logits_and_gradients_stay(recompute: Recompute) -> None:
    plain, fast = build(of_blocks(2), 0), build(of_blocks(2), 0)
    compiled.compile_blocks(fast)
    recompute_blocks(fast, recompute)
    for lengths in ([30, 50], [70, 3, 41]):
        tokens = torch.arange(sum(lengths)) % 20
        outputs = [model(tokens, Sequences.of(lengths)) for model in (plain, fast)]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
        for output in outputs:
            output.square().sum().backward()
    assert type(fast.decoder.blocks[0].feed).__name__ == "function" and list(fast.state_dict()) == list(
        plain.state_dict()
    )
    for a, b in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not describe("cpu").has_compiler, reason="needs a C++ compiler")
def test_many_blocks_are_compiled_as_one() -> None:
    """A block that were compiled for itself would soon be one too many, and the rest computed as they are."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fast = build(of_blocks(12), 0)
    compiled.compile_blocks(fast)
    for _ in range(2):
        fast(torch.arange(80) % 20, Sequences.of([30, 50])).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_auto_compiles_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    for triton, expected in ((object(), True), (None, False)):
        monkeypatch.setattr(compiled, "find_spec", lambda name, found=triton: found)
        assert compiled.wants_compile("auto", CUDA) == expected
        assert not compiled.wants_compile("auto", CPU) and not compiled.wants_compile("never", CUDA)
    assert compiled.wants_compile("always", CUDA)


def test_always_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RonnaError, match=r"train\.compile: torch.compile needs a C\+\+ compiler"):
        compiled.wants_compile("always", CPU)
