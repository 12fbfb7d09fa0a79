"""Virtual tokens: the `peft` library's logits both ways, texts of unequal lengths side by side, generation."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from ronna.base.errors import RonnaError
from ronna.decoding.batch import inference
from ronna.decoding.decode import generate, perplexity
from ronna.decoding.sampling import GenerateConfig
from ronna.model import config as c
from ronna.model.families import preset
from ronna.model.folder import load_folder
from ronna.model.init import build
from ronna.model.sequences import Sequences
from ronna.model.transformer import Transformer
from ronna.peft.changes import activate, merge
from ronna.peft.files import read_adapter
from ronna.peft.folder import attach_adapter, write_adapter
from ronna.peft.methods import PeftConfig, adapt, longest_text, trained
from ronna.peft.own import adapters
from ronna.peft.prefix import PrefixConfig
from ronna.peft.prompt import PromptConfig

from .test_changes import PRESETS, SIZES, model_of
from .test_folder import BASES, SIZE, stir

peft = pytest.importorskip("peft")

GPT2 = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 2}
MODERN = SIZE | {"num_hidden_layers": 3, "local_attention": 6, "pad_token_id": 0}
BASES = BASES | {
    "bert spans": (hf.BertForQuestionAnswering, hf.BertConfig, SIZE),
    "modernbert": (hf.ModernBertForSequenceClassification, hf.ModernBertConfig, MODERN),
    "modernbert mean": (
        hf.ModernBertForSequenceClassification, hf.ModernBertConfig, MODERN | {"classifier_pooling": "mean"},
    ),
    "gpt2 classifier": (hf.GPT2ForSequenceClassification, hf.GPT2Config, GPT2 | {"pad_token_id": 0}),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, SIZE | {"num_key_value_heads": 1}),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, SIZE | {"num_key_value_heads": 1, "head_dim": 24}),
}  # fmt: skip
KINDS = {"SequenceC": "SEQ_CLS", "TokenClas": "TOKEN_CLS", "QuestionA": "QUESTION_ANS", "CausalLM": "CAUSAL_LM"}
KINDS |= {"BertModel": "FEATURE_EXTRACTION", "LMHeadMod": "CAUSAL_LM", "Condition": "SEQ_2_SEQ_LM"}
TEXTS = [[5, 7, 11, 13, 17, 19, 23, 2, 31, 41], [9, 8, 7], [44, 3, 3, 21, 50, 12], [6], [30, 31, 32, 33, 34, 35, 36]]
METHODS: dict[str, tuple[PeftConfig, Any, dict[str, Any]]] = {
    "prompt": (PromptConfig(tokens=4), peft.PromptTuningConfig, {}),
    "prefix": (PrefixConfig(tokens=4), peft.PrefixTuningConfig, {}),
    "made prefix": (
        PrefixConfig(tokens=4, hidden=9),
        peft.PrefixTuningConfig,
        {"prefix_projection": True, "encoder_hidden_size": 12},
    ),
}


def kind_of(name: str) -> str:
    found = BASES[name][0].__name__
    return next(kind for word, kind in KINDS.items() if word in found)


@pytest.fixture(scope="module", params=BASES)
def base(request, tmp_path_factory) -> tuple[str, Path]:
    cls, config, sizes = BASES[request.param]
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / request.param.replace(" ", "-")
    labels = {"num_labels": 3} if kind_of(request.param) in ("SEQ_CLS", "TOKEN_CLS") else {}
    model = cls(config(**sizes, **labels))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    return request.param, folder


def ours(model: Transformer) -> list[Tensor]:
    """The scores or logits of each text, all texts read in one batch."""
    tokens = torch.tensor([t for text in TEXTS for t in text])
    sequences = Sequences.of([len(text) for text in TEXTS])
    model.eval()
    with torch.no_grad():
        if model.classifier is not None:
            scores = model.scores(tokens, sequences)
            return list(scores) if len(scores) == len(TEXTS) else list(scores.split([len(t) for t in TEXTS]))
        if model.head is None:
            return list(model.hidden(tokens, sequences).split([len(t) for t in TEXTS]))
        memory = model.encode(tokens, sequences) if model.encoder is not None else None
        return list(model(tokens, sequences, memory=memory).split([len(t) for t in TEXTS]))


def theirs(model: Any, text: list[int]) -> Tensor:
    """The same of one text without padding, which transformers' GPT-2 would pool where it does not see tokens."""
    ids = torch.tensor([text])
    with torch.no_grad():
        more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        found = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
    if "start_logits" in found:
        return torch.stack([found.start_logits[0], found.end_logits[0]], -1)[-len(text) :]
    if "last_hidden_state" in found:
        return found.last_hidden_state[0, -len(text) :]
    return found.logits[0] if found.logits.ndim == 2 else found.logits[0, -len(text) :]


def skip_windows(name: str, method: str) -> None:
    if name.startswith("modernbert") and method != "prompt":
        pytest.skip("sees windows, and transformers' takes no past keys")


def assert_same_scores(mine: list[Tensor], model: Any) -> None:
    for scores, text in zip(mine, TEXTS, strict=True):
        torch.testing.assert_close(scores, theirs(model, text), atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_ours_for_the_same_logits(base, method, tmp_path, recwarn):
    name, folder = base
    skip_windows(name, method)
    loaded, config = load_folder(folder), METHODS[method][0]
    before = ours(loaded.model)
    adapt(loaded.model, config)
    stir(loaded.model)
    write_adapter(loaded.model, loaded.family, tmp_path, config, str(folder))
    mine = ours(loaded.model)
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(mine, before, strict=True))
    if name != "t5" or method == "prompt":  # see `of_decoder`
        assert_same_scores(mine, peft.PeftModel.from_pretrained(BASES[name][0].from_pretrained(folder), tmp_path))
    assert not [w for w in recwarn if "adapter" in str(w.message).lower()]
    again = load_folder(folder)
    attach_adapter(again.model, again.family, read_adapter(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(ours(again.model), mine, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_we_load_theirs_for_the_same_logits(base, method, tmp_path):
    name, folder = base
    skip_windows(name, method)
    _, cls, more = METHODS[method]
    torch.manual_seed(1)
    config = cls(task_type=kind_of(name), num_virtual_tokens=3, **more)
    model = peft.get_peft_model(BASES[name][0].from_pretrained(folder), config)
    model.save_pretrained(tmp_path)
    loaded = load_folder(folder)
    before = ours(loaded.model)
    attach_adapter(loaded.model, loaded.family, read_adapter(tmp_path))
    mine = ours(loaded.model)
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(mine, before, strict=True))
    assert_same_scores(mine, model)


WORDS = [23, 5, 51]  # stand before every text of the tests below, as virtual tokens or as real ones


def prompted(model: Transformer, words: list[int], name: str = "default") -> Transformer:
    """The model with these words' embeddings as its prompt."""
    adapt(model, PromptConfig(tokens=len(words)), name=name)
    model.embedding.changes[name].vectors.data.copy_(model.embedding.tokens.weight[words])
    return model


def writer(preset_name: str) -> Transformer:
    """A model with its vocabulary head and enough noise to have opinions."""
    _, cfg = preset(preset_name, **SIZES, **PRESETS[preset_name])
    model = build(c.without_dropout(cfg), 0)
    rng = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=rng) * 0.2)
    return model


def flat(texts: list[list[int]]) -> tuple[Tensor, Sequences]:
    return torch.tensor([t for text in texts for t in text]), Sequences.of([len(text) for text in texts])


@pytest.mark.parametrize("preset_name", ["bert-tiny", "gpt2-tiny", "llama-tiny", "t5-tiny", "modernbert-tiny"])
def test_virtual_words_are_read_as_real_ones_are(preset_name):
    longer = [WORDS + text for text in TEXTS]
    real = [i for text in longer for i in [False] * 3 + [True] * (len(text) - 3)]
    model, base = prompted(model_of(preset_name), WORDS), model_of(preset_name)
    if model.encoder is not None and model.decoder is not None:
        mine, theirs = model.encode(*flat(TEXTS)), base.encode(*flat(longer))
        torch.testing.assert_close(mine.states, theirs.states)
        states = model.hidden(*flat(TEXTS), memory=mine), base.hidden(*flat(TEXTS), memory=theirs)
        torch.testing.assert_close(*states)
        return
    segments = torch.arange(sum(map(len, TEXTS))) % 2 if model.cfg.embedding.segments else None
    wide = None
    if segments is not None:
        wide = torch.zeros(len(real), dtype=torch.long).masked_scatter(torch.tensor(real), segments)
    wanted = base.hidden(*flat(longer), segments=wide)[real]
    torch.testing.assert_close(model.hidden(*flat(TEXTS), segments=segments), wanted)
    at = torch.tensor([4, 0, 12, 20])
    torch.testing.assert_close(model.hidden(*flat(TEXTS), segments=segments, at=at), wanted[at])
    for pool in ("first", "last", "mean"):
        torch.testing.assert_close(model.pooled(*flat(TEXTS), pool), base.pooled(*flat(longer), pool))


@pytest.mark.parametrize("preset_name", ["gpt2-tiny", "llama-tiny", "t5-tiny"])
@pytest.mark.parametrize("beams", [1, 3])
def test_what_is_written_after_virtual_words_is_what_follows_real_ones(preset_name, beams):
    config = GenerateConfig(max_tokens=12, temperature=0.0, beams=beams)
    model = prompted(writer(preset_name), WORDS)
    start = 7 if model.encoder is not None else None
    mine = generate(model, TEXTS, config, eos=(3,), start=start)
    theirs = generate(writer(preset_name), [WORDS + text for text in TEXTS], config, eos=(3,), start=start)
    for a, b in zip(mine, theirs, strict=True):
        assert a.tokens == b.tokens and a.finish == b.finish and a.score == pytest.approx(b.score, abs=1e-4)
    assert len({t for a in mine for t in a.tokens}) > 3


def test_a_prompt_learns_and_nothing_else_of_a_decoder_does():
    model = prompted(writer("gpt2-tiny"), WORDS)
    assert set(trained(model)) == {"embedding.changes.default.vectors"}
    model.hidden(*flat(TEXTS)).square().sum().backward()
    found = {name for name, p in model.named_parameters() if p.grad is not None}
    assert found == set(trained(model))
    vectors = model.embedding.changes["default"].vectors
    # The gradient is that of the same vectors as input of the first block, added up over the texts.
    base, longer = writer("gpt2-tiny"), [WORDS + text for text in TEXTS]
    sequences = flat(longer)[1]
    x = base.embedding.tokens(flat(longer)[0]).detach().requires_grad_()
    states = base.decoder(x + base.embedding.positions(sequences.positions), sequences)
    real = torch.cat([torch.arange(len(text)) >= 3 for text in longer])
    states[real].square().sum().backward()
    torch.testing.assert_close(vectors.grad, x.grad[~real].view(len(TEXTS), 3, -1).sum(0), rtol=1e-4, atol=1e-5)


def test_positions_are_shared_by_prompt_and_text():
    model = writer("gpt2-tiny")
    whole = model.max_length
    prompted(model, WORDS)
    assert whole == model.cfg.max_length and model.max_length == whole - 3
    assert longest_text(model.cfg, PromptConfig(tokens=10)) == whole - 10 and longest_text(model.cfg, None) == whole
    with pytest.raises(RonnaError, match="tokens, but the model reads"):
        generate(model, [[5] * (whole - 2)], GenerateConfig())
    assert len(generate(model, [[5] * (whole - 5)], GenerateConfig(max_tokens=9))[0].tokens) == 2
    with pytest.raises(RonnaError, match="use 1 to"):
        perplexity(model, [[1, 2, 3]], length=whole - 2, stride=4)
    nats = perplexity(model, [TEXTS[0]], length=4, stride=2)
    with inference(model):
        first = model(*flat([TEXTS[0][:4]])).log_softmax(-1)
    assert nats[1] == 9 and nats[0] > 0
    alone, _ = perplexity(model, [TEXTS[0][:5]], length=4, stride=4)
    assert alone == pytest.approx(float(-first[range(4), TEXTS[0][1:5]].sum()), rel=1e-5)
    for tokens in (whole, whole + 1):
        with pytest.raises(RonnaError, match="use fewer"):
            adapt(writer("gpt2-tiny"), PromptConfig(tokens=tokens))
        with pytest.raises(RonnaError, match="use fewer"):
            longest_text(model.cfg, PromptConfig(tokens=tokens))


def test_prompts_are_switched_and_stacked():
    model = prompted(prompted(model_of("llama-tiny"), WORDS, "a"), [7, 8], "b")
    assert adapters(model) == ["a", "b"]
    base = model_of("llama-tiny")
    for names, words in (("a", WORDS), ("b", [7, 8]), ("ab", [*WORDS, 7, 8]), ("ba", [7, 8, *WORDS]), ("", [])):
        activate(model, *names)
        longer = [words + text for text in TEXTS]
        real = torch.cat([torch.arange(len(text)) >= len(words) for text in longer])
        torch.testing.assert_close(model.hidden(*flat(TEXTS)), base.hidden(*flat(longer))[real])
    activate(model, "a")
    with pytest.raises(RonnaError, match="no linear map"):
        merge(model, "a")


def test_models_without_a_meaning_for_it_are_refused():
    with pytest.raises(RonnaError, match="scales its embeddings"):
        adapt(build(preset("transformer-tiny", vocab_size=60)[1], 0), PromptConfig())
