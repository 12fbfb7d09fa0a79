"""No document sees another one; alone, in a batch and decoded token by token, a text has the same logits."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ronna.model.attention import Attention
from ronna.model.sequences import Sequences
from ronna.model.transformer import Cache

from .cases import VOCAB, Texts, difference, flat, ours, texts
from .conftest import Pair

SHORT = (24, 3, 5, 2, 7, 1, 4, 6, 3, 2, 9, 5)


def spans(rows: list[Tensor]) -> list[slice]:
    ends = torch.tensor([len(r) for r in rows]).cumsum(0).tolist()
    return [slice(end - len(row), end) for end, row in zip(ends, rows, strict=True)]


def other(row: Tensor) -> Tensor:
    return (row + 7) % (VOCAB - 1) + 1


@pytest.mark.parametrize("lengths", [(24, 17, 9), SHORT], ids=["a row each", "rows shared"])
@pytest.mark.parametrize("changed", [0, 1])
def test_a_document_never_touches_another(pair: Pair, lengths: tuple[int, ...], changed: int) -> None:
    batch = texts(lengths, tuple(n + 1 for n in lengths))
    rows, sources = list(batch.rows), list(batch.sources)
    rows[changed], sources[changed] = other(rows[changed]), other(sources[changed])
    before = ours(pair.case, pair.ours, batch)
    after = ours(pair.case, pair.ours, replace(batch, rows=rows, sources=sources))
    for i, span in enumerate(spans(batch.rows)):
        apart = (before[span] - after[span]).abs().max().item()
        assert apart > 0.0 if i == changed else apart == 0.0


def test_short_documents_do_share_rows() -> None:
    view = Sequences.of(list(SHORT)).packed
    assert view.rows < len(SHORT) and not view.single


@pytest.mark.parametrize("lengths", [(24, 17, 9), SHORT], ids=["a row each", "rows shared"])
def test_alone_is_in_a_batch(pair: Pair, lengths: tuple[int, ...]) -> None:
    batch = texts(lengths, tuple(n + 1 for n in lengths))
    together = ours(pair.case, pair.ours, batch)
    for i, span in enumerate(spans(batch.rows)):
        alone = Texts([batch.rows[i]], [batch.sources[i]], [batch.segments[i]])
        assert difference(together[span], ours(pair.case, pair.ours, alone)) < 1e-5


def test_decoding_with_a_cache_is_the_whole_forward(pair: Pair) -> None:
    """Prompts of unequal lengths in one batch, then a token for each at a time."""
    if pair.ours.decoder is None:
        pytest.skip("encoders do not decode")
    prompts, steps = [5, 9, 2], 6
    batch = texts(tuple(n + steps for n in prompts))
    whole = [ours(pair.case, pair.ours, batch)[span] for span in spans(batch.rows)]
    model, cache = pair.ours, Cache()
    with torch.no_grad():
        memory = model.encode(*flat(batch.sources, model.device)) if pair.case.seq2seq else None
        rows = [row[:n] for row, n in zip(batch.rows, prompts, strict=True)]
        first = model(*flat(rows, model.device), memory=memory, cache=cache)
        for logits, span, n in zip(whole, spans(rows), prompts, strict=True):
            assert difference(first[span], logits[:n]) < 1e-5
        for step in range(steps):
            past = torch.tensor(prompts) + step
            tokens = torch.stack([row[n] for row, n in zip(batch.rows, past.tolist(), strict=True)])
            sequences = Sequences(torch.ones(3, dtype=torch.long), past=past)
            found = model(tokens, sequences, memory=memory, cache=cache)
            expected = torch.stack([logits[n] for logits, n in zip(whole, past.tolist(), strict=True)])
            assert difference(found, expected) < 1e-5


def test_a_cache_keeps_the_chosen_sequences(pair: Pair) -> None:
    """After `select` (a finished text leaves, beams change places) the rest decode on as before."""
    if pair.ours.decoder is None or pair.case.seq2seq:
        pytest.skip("needs a decoder alone")
    batch = texts((8, 6, 7))
    cache = Cache()
    with torch.no_grad():
        pair.ours(*flat([row[:-1] for row in batch.rows], pair.ours.device), cache=cache)
        cache.select(torch.tensor([2, 0]))
        kept = [batch.rows[2], batch.rows[0]]
        past = torch.tensor([len(row) - 1 for row in kept])
        last = torch.stack([row[-1] for row in kept])
        found = pair.ours(last, Sequences(torch.ones(2, dtype=torch.long), past=past), cache=cache)
    whole = ours(pair.case, pair.ours, batch)
    ends = [span.stop - 1 for span in spans(batch.rows)]
    assert difference(found, whole[[ends[2], ends[0]]]) < 1e-5


def test_dropout_reaches_attention_and_layers(pair: Pair) -> None:
    """In training mode two passes differ; with the same seed they are the same."""
    if not any(m.cfg.dropout for m in pair.ours.modules() if isinstance(m, Attention)):
        pytest.skip("this family trains without dropout")
    pair.ours.train()
    try:
        runs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            runs.append(ours(pair.case, pair.ours, texts()))
    finally:
        pair.ours.eval()
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
