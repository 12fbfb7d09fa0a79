"""A folder that transformers saved generates here what it generates there, caches and all."""

from pathlib import Path

import pytest
import torch
import transformers as hf

from ronna.decoding.decode import generate
from ronna.decoding.sampling import GenerateConfig
from ronna.model.folder import load_folder

EOS, START = 7, 1
SIZES = {"vocab_size": 60, "eos_token_id": EOS, "pad_token_id": 0, "bos_token_id": START}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": START}
MARIAN = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 48,
    "decoder_start_token_id": START, "forced_eos_token_id": None, "scale_embedding": True,
}  # fmt: skip
QWEN = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "head_dim": 16,
}  # fmt: skip
MODELS = {
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, QWEN),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config, T5),
    "marian": (hf.MarianMTModel, hf.MarianConfig, MARIAN),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_that_of_the_folders_own_model(tmp_path: Path, prompts, name, beams):
    kind, config, options = MODELS[name]
    torch.manual_seed(2)
    theirs = kind(config(**SIZES, **options)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.05))
    theirs.generation_config = hf.GenerationConfig(
        max_new_tokens=12, num_beams=beams, eos_token_id=EOS, pad_token_id=0,
        decoder_start_token_id=START, bos_token_id=START,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ours = load_folder(tmp_path).model
    found = generate(ours, prompts, GenerateConfig(max_tokens=12, beams=beams), eos={EOS}, start=START)
    for prompt, generation in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids))[0]
        expected = out[1 if ours.encoder is not None else len(prompt) :].tolist()
        expected = expected[: expected.index(EOS)] if EOS in expected else expected
        assert generation.tokens == expected
