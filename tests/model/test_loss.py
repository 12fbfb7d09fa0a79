import pytest
import torch
import torch.nn.functional as F

from ronna.model import loss as module
from ronna.model.config import Head, Norm, Transform
from ronna.model.loss import vocabulary_loss
from ronna.model.transformer import Head as HeadModule


@pytest.mark.parametrize("tile", [2**21, 37 * 10], ids=["one tile", "tiles"])
@pytest.mark.parametrize("elements", [2**24, 64 * 37], ids=["one chunk", "three chunks"])
@pytest.mark.parametrize("transform", [None, Transform("gelu", Norm())], ids=["bare", "transformed"])
def test_chunked_loss_is_cross_entropy(elements, tile, transform, monkeypatch):
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
