"""Adapter folders: `peft` loads ours for the same logits, we load theirs, and what does not fit is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from ronna.base.errors import RonnaError
from ronna.model.families import read_config
from ronna.model.folder import load_folder
from ronna.model.folder_config import save_config
from ronna.model.sequences import Sequences
from ronna.peft.files import read_adapter
from ronna.peft.folder import attach_adapter, write_adapter
from ronna.peft.houlsby import HoulsbyConfig
from ronna.peft.lora import LoraConfig
from ronna.peft.methods import BitFitConfig, adapt, trained
from ronna.stored import open_folder

peft = pytest.importorskip("peft")

SIZE = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
BASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (hf.BertForSequenceClassification, hf.BertConfig, SIZE),
    "bert bare": (hf.BertModel, hf.BertConfig, SIZE),
    "bert tokens": (hf.BertForTokenClassification, hf.BertConfig, SIZE),
    "roberta": (hf.RobertaForSequenceClassification, hf.RobertaConfig, SIZE | {"pad_token_id": 0}),
    "modernbert": (hf.ModernBertForSequenceClassification, hf.ModernBertConfig, SIZE | {"pad_token_id": 0}),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 2}),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, SIZE | {"num_key_value_heads": 1}),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config, {"vocab_size": 60, "d_model": 32, "num_layers": 2, "d_kv": 16,
                                                         "num_heads": 2, "d_ff": 48}),
}  # fmt: skip
CONFIGS = {
    "lora": LoraConfig(rank=4, alpha=6, targets=("q", "v", "ffn.down")),
    "rslora": LoraConfig(rank=4, alpha=6, rslora=True),
    "dora": LoraConfig(rank=4, dora=True, targets=("q", "k", "v")),
}
IDS = torch.tensor([[5, 7, 11, 13, 17, 19, 23, 2]])


@pytest.fixture(scope="module", params=BASES)
def base(request, tmp_path_factory) -> tuple[str, Path]:
    cls, config, sizes = BASES[request.param]
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / request.param.replace(" ", "-")
    labels = {"num_labels": 3} if "Classification" in cls.__name__ else {}
    cls(config(**sizes, **labels)).save_pretrained(folder)
    return request.param, folder


def ours(model) -> torch.Tensor:
    tokens, sequences = IDS[0], Sequences.of([8])
    model.eval()
    with torch.no_grad():
        if model.classifier is not None:
            return model.scores(tokens, sequences)
        if model.head is None:
            return model.hidden(tokens, sequences)
        memory = model.encode(tokens, sequences) if model.encoder is not None else None
        return model(tokens, sequences, memory=memory)


def theirs(model) -> torch.Tensor:
    with torch.no_grad():
        more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
        out = model.eval()(IDS, **more)
        logits = out.logits if "logits" in out else out.last_hidden_state
    return logits[0] if logits.ndim == 3 else logits


def stir(model, seed: int = 3) -> None:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=rng) * 0.1)


@pytest.mark.parametrize("method", CONFIGS)
def test_peft_loads_ours_for_the_same_logits(base, method, tmp_path, recwarn):
    name, folder = base
    loaded = load_folder(folder)
    adapt(loaded.model, CONFIGS[method])
    stir(loaded.model)
    write_adapter(loaded.model, loaded.family, tmp_path, CONFIGS[method], str(folder))
    read = peft.PeftModel.from_pretrained(BASES[name][0].from_pretrained(folder), tmp_path)
    wanted = ours(loaded.model)
    torch.testing.assert_close(theirs(read), wanted, atol=2e-5, rtol=1e-4)
    assert (ours(load_folder(folder).model) - wanted).abs().max() > 1e-3
    assert not [w for w in recwarn if "adapter" in str(w.message).lower()]
    again = load_folder(folder)
    attach_adapter(again.model, again.family, read_adapter(tmp_path))
    torch.testing.assert_close(ours(again.model), wanted, atol=1e-6, rtol=1e-5)


THEIRS = {
    "bert": ["query", "attention.output.dense"], "bert bare": ["value"],
    "bert tokens": ["query", "value"], "roberta": ["query", "dense"],
    "modernbert": ["Wqkv", "Wo"], "gpt2": ["c_attn", "c_proj"], "qwen2": ["q_proj", "down_proj"], "t5": ["q", "wo"],
}  # fmt: skip


@pytest.mark.parametrize(
    "more", [{}, {"use_rslora": True}, {"use_dora": True}, {"alpha_pattern": {"nothing": 3}}], ids=str
)
def test_we_load_theirs_for_the_same_logits(base, more, tmp_path):
    name, folder = base
    kind = {"Sequence": "SEQ_CLS", "TokenCla": "TOKEN_CLS"}.get(BASES[name][0].__name__.split("For")[-1][:8])
    targets = THEIRS[name]
    if name == "roberta" and kind == "SEQ_CLS":
        targets = ["query", "value"]  # "dense" would reach into the classifier, which is saved whole
    if "alpha_pattern" in more:
        more = {"alpha_pattern": {targets[0]: 3}, "rank_pattern": {targets[0]: 2}}
    config = peft.LoraConfig(task_type=kind, r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, **more)
    model = peft.get_peft_model(BASES[name][0].from_pretrained(folder), config)
    model.save_pretrained(tmp_path)
    loaded = load_folder(folder)
    attach_adapter(loaded.model, loaded.family, read_adapter(tmp_path))
    torch.testing.assert_close(ours(loaded.model), theirs(model), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [HoulsbyConfig(size=5), BitFitConfig()], ids=["houlsby", "bitfit"])
def test_our_own_layout_comes_back(base, config, tmp_path):
    name, folder = base
    if config.kind == "bitfit" and name in ("modernbert", "t5"):
        pytest.skip("has no biases")
    loaded = load_folder(folder)
    adapt(loaded.model, config)
    stir(loaded.model)
    write_adapter(loaded.model, loaded.family, tmp_path, config, str(folder))
    save_config(loaded.model.cfg, loaded.family, tmp_path, extra_config=loaded.config)
    again = open_folder(tmp_path)
    assert torch.equal(ours(again.model), ours(loaded.model))
    assert read_config(tmp_path)[1].classifier == loaded.model.cfg.classifier


DAMAGED = [
    ({"lora_alpha": "high"}, "lora_alpha"),
    ({"lora_dropout": 2}, "lora_dropout"),
    ({"alpha_pattern": ["query"]}, "alpha_pattern"),
    ({"alpha_pattern": {"(": 4}}, "no regular expression"),
    ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": True}, "num_virtual_tokens"),
]


def test_what_does_not_fit_is_refused(tmp_path):
    cls, config, sizes = BASES["bert"]
    small, large = tmp_path / "small", tmp_path / "large"
    cls(config(**sizes)).save_pretrained(small)
    cls(config(**sizes | {"hidden_size": 64, "num_hidden_layers": 1})).save_pretrained(large)
    loaded = load_folder(small)
    adapt(loaded.model, LoraConfig(rank=2))
    stir(loaded.model)
    write_adapter(loaded.model, loaded.family, tmp_path / "a", LoraConfig(rank=2), str(small))
    other = load_folder(large)
    with pytest.raises(RonnaError, match="a LoRA of shapes"):
        attach_adapter(other.model, other.family, read_adapter(tmp_path / "a"))
    cut = read_adapter(tmp_path / "a")
    shallow = load_folder(small)
    cut.tensors["base_model.model.bert.encoder.layer.7.output.dense.lora_A.weight"] = torch.zeros(2, 48)
    with pytest.raises(RonnaError, match=r"no place in the model for .*layer\.7"):
        attach_adapter(shallow.model, shallow.family, cut)
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for change, message in (
        ({"peft_type": "IA3"}, "'IA3' are not supported"),
        ({"peft_type": None}, "not supported"),
        *DAMAGED,
    ):
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings | change))
        with pytest.raises(RonnaError, match=message):
            read_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "/nowhere"}))
    with pytest.raises(RonnaError, match="its base /nowhere is not there"):
        open_folder(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("[]")
    with pytest.raises(RonnaError, match="not the settings of an adapter"):
        open_folder(tmp_path / "a")
