"""Bugs of fine-tuning that raise no error: each has its test here or where it is named.

Loss over prompts, templates that differ between training and use, packing that leaks, nothing to learn: test_dialogue.
Answers cut in silence: test_seq2seq, test_span_qa, test_dialogue. Entities counted by tokens: test_tag. ROUGE that can
read no Chinese: test_ngrams. Accumulation that depends on the cut: test_loop. Ties lost: test_folder.
"""

import json

import pytest
import torch

import ronna
from ronna.base.config import build
from ronna.model.folder import load_folder, save_folder
from ronna.run import prepare_run
from ronna.runfile import FinetuneRun

TALK = [{"role": "user", "content": "was it good"}, {"role": "assistant", "content": "bad plot"}]


def test_a_model_whose_padding_is_its_end_learns_to_stop(tiny_gpt, tmp_path):
    loaded = load_folder(tiny_gpt)
    save_folder(loaded.model, loaded.family, tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tiny_gpt / name).read_text()
        (tmp_path / "base" / name).write_text(text)
    config = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    config["pad_token"] = config["eos_token"]
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(config))
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join([json.dumps({"messages": TALK})] * 4))
    ronna.finetune(
        out=str(tmp_path / "o"),
        model={"name": str(tmp_path / "base")},
        data={"train": str(tmp_path), "allow_overlap": True},
        task={"kind": "dialogue"},
        optim={"lr": 1e-2},
        train={"steps": 40, "precision": "fp32"},
    )
    loaded = ronna.load(str(tmp_path / "o" / "model"))
    assert loaded.tokenizer.pad_id == loaded.tokenizer.eos_id
    made = loaded.generate(["was it good"])[0]
    assert (made.text, made.finish) == ("bad plot", "eos")


@pytest.mark.parametrize("peft", [None, {"kind": "lora", "rank": 2}])
def test_weights_move_by_the_rate_where_the_computation_is_in_bf16(tiny_bert, tmp_path, peft):
    """Adam's first step is the rate for every weight with a gradient; bf16 weights would swallow it."""
    rows = [{"text": f"the film was {w}", "label": w} for w in ("good", "bad")] * 4
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rate = 1e-5
    tree = {
        "out": str(tmp_path / "o"),
        "model": {"name": str(tiny_bert)},
        "data": {"train": str(tmp_path), "allow_overlap": True},
        "optim": {"lr": rate, "weight_decay": 0.0},
        "schedule": {"kind": "constant"},
        "train": {"steps": 1, "precision": "bf16"},
        "peft": peft,
    }
    training = prepare_run(build(FinetuneRun, tree, where="test"))
    before = {n: p.detach().clone() for n, p in training.parts.model.named_parameters() if p.requires_grad}
    training.train()
    after = dict(training.parts.model.named_parameters())
    out = "classifier.out.weight"
    moved = (after[out].detach() - before[out]).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=0.05, atol=0)
    assert after[out].dtype == torch.float32
