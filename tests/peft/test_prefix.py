"""Prefix tuning: a fresh prefix is words already read, its network is folded away, and its formula written out."""

import pytest
import torch
from torch import Tensor

from ronna.base.errors import RonnaError
from ronna.decoding.decode import generate
from ronna.decoding.sampling import GenerateConfig
from ronna.model import config as c
from ronna.model.families import classifier_for, preset
from ronna.model.folder import save_folder
from ronna.model.init import build, generator
from ronna.model.sequences import Sequences
from ronna.model.transformer import Transformer
from ronna.peft.changes import activate
from ronna.peft.files import read_adapter
from ronna.peft.folder import attach_adapter, write_adapter
from ronna.peft.methods import adapt, longest_text, trained
from ronna.peft.own import adapters
from ronna.peft.prefix import PrefixConfig
from ronna.peft.prompt import PromptConfig

from .test_changes import SIZES, model_of
from .test_folder import stir
from .test_prompt import TEXTS, flat, writer

WRITERS = ["gpt2-tiny", "llama-tiny", "t5-tiny"]


def words_of(tokens: int, seed: int = 0) -> list[int]:
    """The words whose keys and values a fresh prefix begins as."""
    return torch.randint(SIZES["vocab_size"], (tokens,), generator=generator(seed, "prefix")).tolist()


def states(model: Transformer, texts: list[list[int]], source: Transformer) -> list[Tensor]:
    """The last states of each text, whose source is its first words where the model reads one."""
    memory = None
    if model.encoder is not None:
        memory = source.encode(*flat([text[-2:] for text in texts]))
    lengths = [len(text) for text in texts]
    return list(model.hidden(*flat(texts), memory=memory).split(lengths))


@pytest.mark.parametrize("preset_name", ["gpt2-tiny", "llama-tiny"])
def test_a_fresh_prefix_is_words_that_a_decoder_has_read(preset_name):
    base, model = writer(preset_name), writer(preset_name)
    adapt(model, PrefixConfig(tokens=3))
    wanted = states(base, [words_of(3) + text for text in TEXTS], base)
    for mine, theirs in zip(states(model, TEXTS, base), wanted, strict=True):
        torch.testing.assert_close(mine, theirs[3:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("preset_name", WRITERS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_is_generation_without_one(preset_name, beams):
    """Each step's likeliest token, worked out from scratch: the cache keeps the prefix where it belongs."""
    model = writer(preset_name)
    adapt(model, PrefixConfig(tokens=5))
    stir(model)
    start = 7 if model.encoder is not None else None
    config = GenerateConfig(max_tokens=8, temperature=0.0, beams=beams)
    for text, found in zip(TEXTS, generate(model, TEXTS, config, start=start), strict=True):
        begin = text if start is None else [start]
        memory = None if start is None else model.encode(*flat([text]))
        log_p = model(*flat([begin + found.tokens]), memory=memory).log_softmax(-1)[len(begin) - 1 : -1]
        assert found.score == pytest.approx(float(log_p[range(8), found.tokens].mean()), abs=1e-4)
        if beams == 1:
            assert log_p.argmax(-1).tolist() == found.tokens
    bare = generate(writer(preset_name), TEXTS, config, start=start)
    assert [g.tokens for g in bare] != [g.tokens for g in generate(model, TEXTS, config, start=start)]


@pytest.mark.parametrize("preset_name", ["bert-tiny", "gpt2-tiny", "t5-tiny"])
def test_attention_reads_the_prefix_as_its_formula_says(preset_name):
    """The first block's attention of one text, with scores written out over prefix and text."""
    model = writer(preset_name)
    adapt(model, PrefixConfig(tokens=4))
    stir(model)
    attention, [text] = model.last.blocks[0].attention, TEXTS[:1]
    sequences = model.placed(Sequences.of([len(text)]), model.last)
    assert sequences.positions.tolist() == [4 + i for i in range(len(text))]
    x, prefix = torch.randn(len(text), 32), model.last.prefix()[0]
    q, k, v = (attention.split(m(x)) for m in (attention.q, attention.k, attention.v))
    k, v = torch.cat([prefix.keys, k]), torch.cat([prefix.values, v])
    scale = attention.cfg.head_dim**-0.5 if attention.cfg.scale is None else attention.cfg.scale
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if model.last.bias is not None:
        scores += model.last.bias(torch.arange(4, 4 + len(text))[None], torch.arange(4 + len(text))[None])[0]
    if model.last.cfg.causal:
        later = torch.arange(4 + len(text))[None, :] > torch.arange(4, 4 + len(text))[:, None]
        scores = scores.masked_fill(later, float("-inf"))
    wanted = attention.out(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(-2))
    qkv = attention.project(x, len(text), None)
    found = attention.close(attention.mix(*qkv, sequences, model.last.bias, None, prefix))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("preset_name", [*WRITERS, "bert-tiny"])
def test_texts_side_by_side_are_read_as_alone(preset_name):
    model = writer(preset_name)
    adapt(model, PrefixConfig(tokens=5))
    stir(model)
    together = states(model, TEXTS, model)
    for text, mine in zip(TEXTS, together, strict=True):
        [alone] = states(model, [text], model)
        torch.testing.assert_close(mine, alone, atol=1e-4, rtol=1e-4)
    if model.encoder is None:
        at = torch.tensor([4, 0, 12, 20])
        torch.testing.assert_close(model.hidden(*flat(TEXTS), at=at), torch.cat(together)[at], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("hidden", [None, 6])
def test_a_prefix_learns_and_its_network_is_folded_away(hidden, tmp_path):
    family, cfg = preset("bert-tiny", **SIZES)
    cfg = c.without_dropout(c.replace(cfg, head=None, classifier=classifier_for(family, cfg, 3)))
    model, config = build(cfg, 0), PrefixConfig(tokens=4, hidden=hidden)
    save_folder(model, family, tmp_path / "base")
    adapt(model, config)
    stir(model)
    own = {name for name in trained(model) if not name.startswith("classifier.")}
    leaves = {"table"} if hidden is None else {"seeds", "inner.weight", "inner.bias", "outer.weight", "outer.bias"}
    assert own == {f"encoder.changes.default.{leaf}" for leaf in leaves}
    scores = model.scores(*flat(TEXTS))
    scores.square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(trained(model))
    # What is written are the tensors that are given, as a checkpoint's are, whatever the model has become since.
    kept = {name: p.detach().clone() for name, p in trained(model).items()}
    with torch.no_grad():
        for p in trained(model).values():
            p.zero_()
    write_adapter(model, family, tmp_path / "a", config, str(tmp_path / "base"), tensors=kept)
    adapter = read_adapter(tmp_path / "a")
    assert adapter.tensors["prompt_embeddings"].shape == (4, 2 * 2 * 32)
    again = build(cfg, 0)
    attach_adapter(again, family, adapter)
    torch.testing.assert_close(again.scores(*flat(TEXTS)), scores, atol=1e-6, rtol=1e-5)


def test_prefixes_and_prompts_are_switched_and_stacked():
    model = writer("gpt2-tiny")
    whole, bare = model.max_length, states(model, TEXTS, model)
    adapt(model, PrefixConfig(tokens=3), name="a")
    adapt(model, PromptConfig(tokens=2), name="b")
    adapt(model, PrefixConfig(tokens=4, hidden=5), name="c")
    assert adapters(model) == ["a", "b", "c"] and model.max_length == whole - 9
    config, found = GenerateConfig(max_tokens=6, temperature=0.0), {}
    for names in ("a", "b", "c", "ac", "ca", "ab", "abc"):
        activate(model, *names)
        assert model.max_length == whole - sum({"a": 3, "b": 2, "c": 4}[n] for n in names)
        found[names] = states(model, TEXTS, model)
        for text, written in zip(TEXTS, generate(model, TEXTS, config), strict=True):
            log_p = model(*flat([text + written.tokens])).log_softmax(-1)[len(text) - 1 : -1]
            assert log_p.argmax(-1).tolist() == written.tokens
    assert len({float(some[0].sum()) for some in found.values()}) == 7
    activate(model)
    for mine, before in zip(states(model, TEXTS, model), bare, strict=True):
        torch.testing.assert_close(mine, before, atol=1e-5, rtol=1e-5)


def test_a_fresh_prefix_stands_behind_what_is_there():
    """Words drawn for a second prefix have read the first one."""
    model, base = writer("llama-tiny"), writer("llama-tiny")
    adapt(model, PrefixConfig(tokens=3), name="a", seed=1)
    adapt(model, PrefixConfig(tokens=2), name="b", seed=2)
    longer = [words_of(3, 1) + words_of(2, 2) + text for text in TEXTS]
    for mine, theirs in zip(states(model, TEXTS, base), states(base, longer, base), strict=True):
        torch.testing.assert_close(mine, theirs[5:], atol=1e-4, rtol=1e-4)


def test_models_without_room_or_meaning_for_it_are_refused():
    with pytest.raises(RonnaError, match="sees a window alone"):
        adapt(model_of("modernbert-tiny"), PrefixConfig())
    model = writer("gpt2-tiny")
    with pytest.raises(RonnaError, match="use fewer"):
        adapt(model, PrefixConfig(tokens=model.max_length))
    assert longest_text(model.cfg, PrefixConfig(tokens=7)) == model.max_length - 7
    uneven = list(model.cfg.decoder.blocks)
    uneven[1] = c.replace(uneven[1], attention=c.replace(uneven[1].attention, heads=4, head_dim=8))
    cfg = c.replace(model.cfg, decoder=c.replace(model.cfg.decoder, blocks=tuple(uneven)))
    with pytest.raises(RonnaError, match="differ in their heads"):
        adapt(build(cfg, 0), PrefixConfig())
