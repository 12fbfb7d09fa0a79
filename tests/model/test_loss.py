import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from ronna.model import loss as module
from ronna.model.config import Head, Norm, Transform
from ronna.model.group import Group
from ronna.model.heads import Head as HeadModule
from ronna.model.loss import ChunkedCrossEntropy, Words, vocabulary_loss


@pytest.mark.parametrize("tile", [2**21, 37 * 10], ids=["one tile", "tiles"])
@pytest.mark.parametrize("elements", [2**24, 64 * 37], ids=["one chunk", "three chunks"])
@pytest.mark.parametrize("transform", [None, Transform("gelu", Norm())], ids=["bare", "transformed"])
@pytest.mark.parametrize("card", [False, True], ids=["cpu", "as a card"])
def test_chunked_loss_is_cross_entropy(elements, tile, transform, card, monkeypatch):
    monkeypatch.setattr(module, "on_card", lambda x: card)
    monkeypatch.setattr(module, "CARD_ELEMENTS", elements)
    monkeypatch.setattr(module, "CARD_ROWS", 64)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
    torch.manual_seed(0)
    head = HeadModule(Head(tied=False, bias=True, scale=0.5, transform=transform), 16, 37).double()
    x = torch.randn(150, 16, dtype=torch.double, requires_grad=True)
    labels = torch.randint(37, (150,))
    expected = F.cross_entropy(head(x), labels, reduction="sum")
    wanted = torch.autograd.grad(expected / 150, [x, *head.parameters()])
    found, correct = vocabulary_loss(head, x, labels)
    gradients = torch.autograd.grad(found / 150, [x, *head.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert correct is None
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_frozen_head_gets_no_gradient():
    head = HeadModule(Head(tied=False, bias=True), 16, 37).requires_grad_(False)
    x = torch.randn(10, 16, requires_grad=True)
    vocabulary_loss(head, x, torch.randint(37, (10,)))[0].backward()
    assert x.grad is not None and head.logits.weight.grad is None and head.logits.bias.grad is None


def test_evaluation_needs_no_gradient_memory():
    head = HeadModule(Head(tied=False), 16, 37)
    with torch.inference_mode():
        x, labels = torch.randn(10, 16), torch.randint(37, (10,))
        total, correct = vocabulary_loss(head, x, labels)
        assert int(correct) == int((head(x).argmax(-1) == labels).sum())
        torch.testing.assert_close(total, F.cross_entropy(head(x), labels, reduction="sum"))


def test_nothing_to_predict_gives_zero_gradients():
    head = HeadModule(Head(tied=False), 16, 37)
    x = torch.zeros(0, 16, requires_grad=True)
    total, _ = vocabulary_loss(head, x, torch.zeros(0, dtype=torch.long))
    total.backward()
    assert float(total) == 0.0 and not head.logits.weight.grad.any()


@pytest.mark.parametrize("tile", [2**21, 37 * 10], ids=["one tile", "tiles"])
def test_smoothed_loss_is_that_of_torch(tile, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 64 * 37)
    monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
    head = HeadModule(Head(tied=False, bias=True), 16, 37).double()
    x = torch.randn(150, 16, dtype=torch.double, requires_grad=True)
    labels = torch.randint(37, (150,))
    expected = F.cross_entropy(head(x), labels, reduction="sum", label_smoothing=0.1)
    wanted = torch.autograd.grad(expected, [x, *head.parameters()])
    found, _ = vocabulary_loss(head, x, labels, 0.1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(torch.autograd.grad(found, [x, *head.parameters()]), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("training", [True, False])
def test_the_softmax_to_be_compiled_is_the_other_one(training, smoothing):
    torch.manual_seed(0)
    logits, gold = torch.randn(90, 37, dtype=torch.double) * 3, torch.randint(37, (90, 1))
    wanted, found = logits.clone(), logits.clone()
    total = module.softmax_in_place(wanted, gold, torch.double, training, smoothing)
    fused = module.fused_softmax_in_place(found, gold, torch.double, training, smoothing)
    torch.testing.assert_close(fused, total, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)


def test_chunks_of_a_card():
    assert module.chunk_rows(32000, cuda=True) == 8192 and module.chunk_rows(128256, cuda=True) == 2048
    assert module.chunk_rows(2**30, cuda=True) == 256 and module.chunk_rows(2**21, cuda=False) == 64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_card_computes_the_same(bias, compiled, monkeypatch):
    """A vocabulary of an odd size, in chunks, in bf16 with fp32 weights: beside double precision."""
    monkeypatch.setattr(module, "CARD_ELEMENTS", 256 * 1003)
    torch.manual_seed(0)
    head = HeadModule(Head(tied=False, bias=bias), 64, 1003)
    x, labels = torch.randn(700, 64).bfloat16(), torch.randint(1003, (700,))
    exact = HeadModule(Head(tied=False, bias=bias), 64, 1003).double()
    exact.load_state_dict({k: v.bfloat16().double() for k, v in head.state_dict().items()})
    wide = x.double().requires_grad_()
    expected = F.cross_entropy(exact(wide), labels, reduction="sum")
    wanted = torch.autograd.grad(expected, [wide, *exact.parameters()])
    head, narrow = head.cuda(), x.cuda().requires_grad_()
    head.softmax = torch.compile(module.fused_softmax_in_place) if compiled else None
    found, _ = vocabulary_loss(head, narrow, labels.cuda())
    gradients = torch.autograd.grad(found, [narrow, *head.parameters()])
    assert abs(float(found) / float(expected) - 1) < 2e-3
    for ours, theirs in zip(gradients, wanted, strict=True):
        difference = torch.linalg.vector_norm(ours.double().cpu() - theirs) / torch.linalg.vector_norm(theirs)
        assert difference < 1e-2


class Threads(Group):
    """Threads as ranks, which meet at each reduction."""

    def __init__(self, size):
        self.size, self.barrier, self.found = size, threading.Barrier(size, timeout=30), {}

    def reduced(self, x, how):
        self.found[threading.get_ident()] = x
        self.barrier.wait()
        every = torch.stack(list(self.found.values()))
        self.barrier.wait()
        return every.sum(0) if how == "sum" else every.amax(0) if how == "max" else every.amin(0)


@pytest.mark.parametrize("tile", [2**21, 13 * 10], ids=["one tile", "tiles"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_words_in_parts(tile, smoothing, monkeypatch):
    monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
    torch.manual_seed(0)
    # Of whole numbers, so that the best word of some rows is there three times: the first of them counts.
    weight, bias, x = (torch.randint(-2, 3, s).double() for s in ((37, 16), (37,), (90, 16)))
    weight[5] = weight[20] = weight[36]
    bias[[5, 20, 36]] = 6.0
    labels = torch.randint(37, (90,))
    labels[:30] = F.linear(x, weight, bias).argmax(-1)[:30]
    whole = [t.clone().requires_grad_() for t in (x, weight, bias)]
    logits = F.linear(*whole)
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    wanted, group = torch.autograd.grad(expected, whole), Threads(3)

    def rank(i):
        part = slice(13 * i, min(13 * i + 13, 37))  # of 13, 13 and 11 words
        mine = [t.clone().requires_grad_() for t in (x, weight[part], bias[part])]
        words = Words(group, part.start, 37)
        loss, _ = ChunkedCrossEntropy.apply(*mine, labels, smoothing, words)
        gradients = torch.autograd.grad(loss, mine)
        _, correct = ChunkedCrossEntropy.apply(x, weight[part], bias[part], labels, smoothing, words)
        return part, loss, gradients, correct

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(rank, range(3)))
    assert int((logits.argmax(-1) == labels).sum()) >= 30 and int((labels == 5).sum()) > 5
    for part, loss, (of_x, of_weight, of_bias), correct in found:
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        assert int(correct) == int((logits.argmax(-1) == labels).sum())
        torch.testing.assert_close(of_x, wanted[0], rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(of_weight, wanted[1][part], rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(of_bias, wanted[2][part], rtol=1e-10, atol=1e-13)
