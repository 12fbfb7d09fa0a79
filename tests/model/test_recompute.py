"""Computing a block again in the backward pass changes no bit and keeps less."""

import pytest
import torch
from torch import Tensor

from ronna.base.errors import RonnaError
from ronna.model.families import preset, with_dropout
from ronna.model.init import build
from ronna.model.recompute import Recompute, recompute_blocks, recomputed_blocks
from ronna.model.sequences import Sequences
from ronna.model.transformer import Transformer
from ronna.peft.methods import LoraConfig, adapt
from ronna.peft.prefix import PrefixConfig

LENGTHS, SOURCES = [9, 4, 16], [12, 7, 5]
FAMILIES = ["bert-tiny", "gpt2-tiny", "llama-tiny", "modernbert-tiny", "t5-tiny"]


def model(name: str, dropout: float = 0.1) -> Transformer:
    family, cfg = preset(name, vocab_size=50)
    return build(with_dropout(family, cfg, dropout), seed=0)


def tokens(lengths: list[int]) -> tuple[Tensor, Sequences]:
    return torch.arange(sum(lengths)) % 50, Sequences.of(lengths)


def gradients(model: Transformer) -> dict[str, Tensor]:
    torch.manual_seed(1)
    memory = model.encode(*tokens(SOURCES)) if model.encoder is not None and model.decoder is not None else None
    model(*tokens(LENGTHS), memory=memory).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def kept(model: Transformer) -> int:
    """Bytes that the autograd graph holds, but for what blocks keep for themselves; parameters left out."""
    parameters = {p.data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() not in parameters:
            seen[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        gradients(model)
    return sum(seen.values())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [{"blocks": "all"}, {"feeds": "all"}, {"blocks": 1, "feeds": 1}])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_the_same_to_the_bit(name, config, precision):
    plain, frugal = model(name), model(name)
    plain.compute = frugal.compute = precision
    recompute_blocks(frugal, Recompute(**config))
    wanted, found = gradients(plain), gradients(frugal)
    assert wanted.keys() == found.keys() and len(wanted) > 10
    for parameter in wanted:
        assert torch.equal(found[parameter], wanted[parameter]), parameter


@pytest.mark.parametrize("method", [LoraConfig(dropout=0.1), PrefixConfig()])
def test_adapters_are_computed_again_too(method):
    plain, frugal = model("gpt2-tiny"), model("gpt2-tiny")
    for one in (plain, frugal):
        adapt(one, method, seed=0)
    recompute_blocks(frugal, Recompute(blocks="all"))
    wanted, found = gradients(plain), gradients(frugal)
    assert wanted.keys() == found.keys() and wanted
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_each_block_less_keeps_less():
    def bytes_kept(config: Recompute) -> int:
        frugal = model("gpt2-tiny", dropout=0.0)
        recompute_blocks(frugal, config)
        return kept(frugal)

    blocks = len(model("gpt2-tiny").decoder.blocks)
    by_blocks = [bytes_kept(Recompute(blocks=n)) for n in range(blocks + 1)]
    assert by_blocks == sorted(by_blocks, reverse=True) and len(set(by_blocks)) == blocks + 1
    assert by_blocks[-1] < bytes_kept(Recompute(feeds="all")) < by_blocks[0]


def test_without_gradients_nothing_is_computed_twice(monkeypatch):
    calls = []
    frugal = model("bert-tiny", dropout=0.0)
    feed = frugal.encoder.blocks[0].feed
    frugal.encoder.blocks[0].feed = lambda x: calls.append(1) or feed(x)
    recompute_blocks(frugal, Recompute(blocks="all"))
    with torch.no_grad():
        frugal(*tokens(LENGTHS))
    assert len(calls) == 1
    gradients(frugal)
    assert len(calls) == 3


def test_more_blocks_than_there_are_is_refused():
    t5 = model("t5-tiny")
    count = len(t5.encoder.blocks) + len(t5.decoder.blocks)
    recompute_blocks(t5, Recompute(blocks=count))
    with pytest.raises(RonnaError, match=rf"recompute\.blocks: {count + 1} blocks are asked for, there are {count}"):
        recompute_blocks(model("t5-tiny"), Recompute(blocks=count + 1))
    with pytest.raises(RonnaError, match=rf"recompute\.feeds: {count} blocks are asked for, there are {count - 1}"):
        recompute_blocks(model("t5-tiny"), Recompute(blocks=1, feeds=count))


def test_for_a_while_every_block_computes_again_and_then_as_before():
    plain, some = model("gpt2-tiny"), model("gpt2-tiny")
    recompute_blocks(some, Recompute(blocks=1))
    before = kept(some)
    with recomputed_blocks(some):
        assert kept(some) < 0.8 * before
    assert kept(some) == before < kept(plain)
    with recomputed_blocks(plain):
        pass
    assert not any("forward" in vars(module) for module in plain.modules())
