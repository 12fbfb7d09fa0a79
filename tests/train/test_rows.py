"""Row gradients are the dense ones: in norm, in clipping, in what every optimizer makes of them."""

from contextlib import nullcontext

import pytest
import torch

from ronna.model.config import Attention, Block, Embedding, FeedForward, Head, LearnedPositions, Model, Norm, Stack
from ronna.model.init import build
from ronna.model.sequences import Sequences
from ronna.model.transformer import Transformer
from ronna.train.optim import SGD, Adafactor, Adam, AdamW, Muon, build_optimizer, clip_gradients
from ronna.train.rows import EmbeddingRows

VOCAB = 40
OPTIMIZERS = [AdamW(lr=1e-2), Adam(lr=1e-2), SGD(lr=1e-2), Adafactor(), Muon(lr=1e-2)]


def tiny(tied: bool = False) -> Transformer:
    block = Block(Attention(2, 8), FeedForward(32), Norm())
    embedding = Embedding(VOCAB, LearnedPositions(16))
    return build(Model(16, embedding, Head(tied=tied), decoder=Stack((block,), True, Norm())), seed=1)


def backward(model: Transformer, step: int) -> None:
    """Two micro-batches, each with tokens that repeat."""
    rng = torch.Generator().manual_seed(step)
    for _ in range(2):
        tokens = torch.randint(0, 9, (12,), generator=rng)
        loss = torch.nn.functional.cross_entropy(model(tokens, Sequences.of([7, 5])), tokens)
        (10 * loss).backward()


def trained(model: Transformer, optim, rows: EmbeddingRows | None) -> tuple[list[torch.Tensor], list[float]]:
    named = model.named_parameters()
    optimizers, norms = build_optimizer(optim, rows.named_parameters(named) if rows else named), []
    for step in range(4):
        backward(model, step)
        if rows:
            assert model.embedding.tokens.weight.grad.is_sparse
            rows.merge()
        norms.append(float(clip_gradients(model.parameters(), 0.5)))
        with rows.dense() if rows else nullcontext():
            for optimizer in optimizers:
                optimizer.step()
        assert not rows or not rows.buffer.any()
        model.zero_grad()
    return [p.detach() for p in model.parameters()], norms


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=lambda o: o.kind)
def test_training_is_the_same(optim):
    dense, sparse = tiny(), tiny()
    expected, norms = trained(dense, optim, None)
    found, again = trained(sparse, optim, EmbeddingRows(sparse))
    assert again == pytest.approx(norms, rel=1e-6) and max(norms) > 0.5
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


# Adafactor is left out: its means over rows and columns are then those of the rows in use.
@pytest.mark.parametrize("optim", [o for o in OPTIMIZERS if o.kind != "adafactor"], ids=lambda o: o.kind)
def test_rows_in_use_are_trained_as_in_the_whole_table_and_the_others_stay(optim):
    used = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 20])  # 20 has no gradient and decays
    dense, sparse = tiny(), tiny()
    start = sparse.embedding.tokens.weight.detach().clone()
    expected, norms = trained(dense, optim, None)
    rows = EmbeddingRows(sparse, used)
    found, again = trained(sparse, optim, rows)
    assert rows.trained.shape == (10, 16) and again == pytest.approx(norms, rel=1e-6)
    others = torch.ones(VOCAB, dtype=torch.bool).index_fill(0, used, False)
    for (name, _), a, b in zip(sparse.named_parameters(), found, expected, strict=True):
        if name == "embedding.tokens.weight":
            assert torch.equal(a[others], start[others]) and not torch.equal(a[used], start[used])
            a, b = a[used], b[used]
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_table_in_full_use_is_not_copied():
    rows = EmbeddingRows(tiny(), torch.arange(VOCAB - 4))
    assert rows.used is None and rows.trained is rows.table


def test_a_table_that_a_head_shares_stays_dense():
    model = tiny(tied=True)
    rows = EmbeddingRows(model, torch.arange(9))
    backward(model, 0)
    assert not model.embedding.tokens.weight.grad.is_sparse
    before = model.embedding.tokens.weight.grad
    rows.merge()
    with rows.dense():
        assert rows.trained is model.embedding.tokens.weight
    assert model.embedding.tokens.weight.grad is before


def test_a_skipped_step_leaves_no_rows_behind():
    model = tiny()
    rows = EmbeddingRows(model)
    backward(model, 0)
    rows.merge()
    model.zero_grad()
    with rows.dense():
        pass
    assert rows.buffer is None and model.embedding.tokens.weight.grad is None
