"""Not only the logits: ten optimizer steps on the same batches give the losses that transformers gives."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ronna.model.config import Classifier, without_dropout
from ronna.model.families import preset
from ronna.model.folder import save_folder
from ronna.model.init import build
from ronna.objectives.base import Sample, collate
from ronna.objectives.clm import CausalLM
from ronna.objectives.denoise import Denoise, DenoiseConfig
from ronna.objectives.mlm import MaskedLM, MLMConfig
from ronna.train.loop import gradients
from ronna.train.optim import AdamW, build_optimizer, clip_gradients

transformers = pytest.importorskip("transformers")
VOCAB, STEPS, RATE = 120, 10, 5e-3
OBJECTIVES = {
    "bert-tiny": (MaskedLM(MLMConfig(), None), "BertForPreTraining"),  # type: ignore[arg-type]
    "gpt2-tiny": (CausalLM(0, 1), "GPT2LMHeadModel"),
    "llama-tiny": (CausalLM(0, 1), "LlamaForCausalLM"),
    "t5-tiny": (Denoise(DenoiseConfig(), (5,), 0, 1), "T5ForConditionalGeneration"),
}


def samples(name: str, rng: np.random.Generator) -> list[Sample]:
    made = []
    for n in (9, 17, 5, 12):
        tokens = rng.integers(6, VOCAB, size=n)
        if name == "bert-tiny":
            chosen = 1 + np.sort(rng.permutation(n - 1)[: n // 3])  # the first token is never predicted
            segments = (np.arange(n) > n // 2).astype(int)
            labels = rng.integers(6, VOCAB, size=len(chosen))
            made.append(Sample(tokens, chosen, labels, segments, target=int(rng.integers(2))))
        else:
            labels = rng.integers(6, VOCAB, size=n)
            source = rng.integers(6, VOCAB, size=n + 3) if name == "t5-tiny" else None
            made.append(Sample(tokens, np.arange(n), labels, source=source))
    return made


def padded(rows: list[np.ndarray], fill: int = 0) -> torch.Tensor:
    out = torch.full((len(rows), max(map(len, rows))), fill)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.from_numpy(row)
    return out


def their_loss(model: torch.nn.Module, name: str, some: list[Sample]) -> torch.Tensor:
    """From the padded logits, as the formula says."""
    ids = padded([s.tokens for s in some])
    mask = padded([np.ones(len(s.tokens), int) for s in some])
    labels = torch.full_like(ids, -100)
    for i, s in enumerate(some):
        labels[i, torch.from_numpy(s.predict)] = torch.from_numpy(s.labels)
    if name == "t5-tiny":
        source = padded([s.source for s in some])
        see = padded([np.ones(len(s.source), int) for s in some])
        out = model(input_ids=source, attention_mask=see, decoder_input_ids=ids, decoder_attention_mask=mask)
    elif name == "bert-tiny":
        out = model(ids, attention_mask=mask, token_type_ids=padded([s.segments for s in some]))
        words = F.cross_entropy(out.prediction_logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return words + F.cross_entropy(out.seq_relationship_logits, torch.tensor([s.target for s in some]))
    else:
        out = model(ids, attention_mask=mask)
    return F.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_follows_transformers(name, tmp_path):
    objective, kind = OBJECTIVES[name]
    family, cfg = preset(name, vocab_size=VOCAB)
    cfg = without_dropout(cfg)
    if name == "bert-tiny":
        from dataclasses import replace

        cfg = replace(cfg, classifier=Classifier(2, "first", "tanh"))
    model = build(cfg, seed=0).train()
    save_folder(model, family, tmp_path)
    peer = getattr(transformers, kind).from_pretrained(tmp_path, attn_implementation="eager").train()
    for module in peer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    [ours] = build_optimizer(AdamW(lr=RATE), model.named_parameters())
    matrices, rest = ([p for p in peer.parameters() if (p.ndim >= 2) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    rng = np.random.default_rng(0)
    for step in range(STEPS):
        some = samples(name, rng)
        totals = gradients(model, objective, [collate(objective, some[:1]), collate(objective, some[1:])], step)
        found = totals.means()["loss"]
        loss = their_loss(peer, name, some)
        assert found == pytest.approx(float(loss.detach()), rel=2e-5 * (step + 1)), f"step {step}"
        loss.backward()
        norm = clip_gradients(model.parameters(), 1.0)
        wanted = torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        assert float(norm) == pytest.approx(float(wanted), rel=1e-4 * (step + 1))
        ours.step()
        theirs.step()
        model.zero_grad()
        theirs.zero_grad()
