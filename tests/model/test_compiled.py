"""A compiled model computes what it computed before, in batches of any size; who wants one."""

import pytest
import torch

from ronna.base.device import describe
from ronna.base.errors import RonnaError
from ronna.model import compiled
from ronna.model.config import Attention, Block, Embedding, FeedForward, Head, Model, Norm, Rotary, Stack
from ronna.model.init import build
from ronna.model.sequences import Sequences

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.skipif(not describe("cpu").has_compiler, reason="needs a C++ compiler")
def test_logits_and_gradients_stay() -> None:
    block = Block(
        Attention(2, 8, rotary=Rotary(), qk_norm=Norm("rms")), FeedForward(32, "silu", gated=True), Norm("rms")
    )
    cfg = Model(16, Embedding(20), Head(tied=False), decoder=Stack((block,), True, Norm("rms")))
    plain, fast = build(cfg, 0), build(cfg, 0)
    compiled.compile_blocks(fast)
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
