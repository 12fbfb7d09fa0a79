"""The last block computes what is read of it: the same states, the same gradients, fewer operations."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ronna.model.folder import load_folder
from ronna.model.transformer import Cache, Transformer

from .cases import CLASSIFIERS, NAMES, Case, Texts, flat, ours, scores, texts
from .conftest import Pair

LENGTHS, SOURCES = (24, 17, 28), (13, 20, 32)
# So many that linear maps compute a few rows more; one of each sequence; nothing; everything, backwards.
PLACES = {"many": list(range(1, 68)), "firsts, out of order": [41, 0, 24], "none": [], "all": list(range(69))[::-1]}


def states(case: Case, model: Transformer, batch: Texts, at: Tensor | None = None) -> Tensor:
    segments = torch.cat(batch.segments) if case.segments else None
    memory = model.encode(*flat(batch.sources, model.device)) if case.seq2seq else None
    return model.hidden(*flat(batch.rows, model.device), segments, memory, at=at)


def gradients(model: Transformer, read: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (read * torch.linspace(-1, 1, read.numel()).view_as(read)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("places", PLACES)
def test_states_read_are_those_of_the_whole(pair: Pair, places: str) -> None:
    at = torch.tensor(PLACES[places], dtype=torch.long)
    batch = texts(LENGTHS, SOURCES)
    whole = states(pair.case, pair.ours, batch)
    read = states(pair.case, pair.ours, batch, at)
    torch.testing.assert_close(read, whole[at], atol=2e-5, rtol=1e-5)
    wanted, got = gradients(pair.ours, whole[at]), gradients(pair.ours, read)
    assert wanted.keys() == got.keys()
    for name, gradient in wanted.items():
        bound = 2e-5 * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(got[name], gradient, atol=bound, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_operations_by_formula_are_those_counted(pair: Pair) -> None:
    batch = texts((16, 16, 16), (12, 12, 12))
    at = torch.tensor([3, 20, 40, 47])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        pair.ours.head(states(pair.case, pair.ours, batch, at))  # type: ignore[misc]
    source = 12 if pair.case.seq2seq else 0
    assert pair.ours.cfg.flops(3, 16, source, predicted=4) == counter.get_total_flops()


@pytest.mark.parametrize(("case", "cls"), CLASSIFIERS, ids=NAMES)
def test_a_classifier_of_tokens_scores_those_asked_for(case: Case, cls: Any, tmp_path: Path) -> None:
    case.build(cls, num_labels=2).save_pretrained(tmp_path)
    model, batch, at = load_folder(tmp_path).model.eval(), texts(LENGTHS, SOURCES), torch.tensor([3, 20, 40, 68])
    whole = scores(case, model, batch)
    read = ours(case, model, batch, partial(model.scores, at=at))
    torch.testing.assert_close(read, whole[at] if len(whole) == sum(LENGTHS) else whole, atol=2e-5, rtol=1e-5)
    equal = texts((16, 16, 16))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ours(case, model, equal, partial(model.scores, at=at[:3]))
    assert model.cfg.flops(3, 16, predicted=3) == counter.get_total_flops()


def test_a_prompt_is_read_at_its_end_and_cached_whole(pair: Pair) -> None:
    if pair.ours.cfg.decoder is None:
        pytest.skip("encoders do not decode")
    batch, model = texts(LENGTHS, SOURCES), pair.ours
    tokens, sequences = flat(batch.rows, model.device)
    with torch.no_grad():
        memory = model.encode(*flat(batch.sources, model.device)) if pair.case.seq2seq else None
        whole = model.hidden(tokens, sequences, memory=memory, cache=(cache := Cache()))
        read = model.hidden(tokens, sequences, memory=memory, cache=(short := Cache()), at=sequences.last)
    torch.testing.assert_close(read, whole[sequences.last], atol=2e-5, rtol=1e-5)
    for a, b in zip(cache.layers, short.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys)


def test_a_place_named_twice_is_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match="twice"):
        states(pair.case, pair.ours, texts(LENGTHS, SOURCES), torch.tensor([3, 3]))
