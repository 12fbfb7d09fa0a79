"""Cross entropy over a vocabulary without ever holding all its logits.

Legend: M predicted positions, C channels, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ronna.model.transformer import Head

CHUNK_ELEMENTS = 2**24  # logits of one chunk: 64 MiB in fp32


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over M of -log softmax(x W^T + b)[label], a chunk of rows at a time.

    The gradients are finished in the forward pass, while a chunk's probabilities are at hand, up to the one
    scalar that comes back: no logits are kept and none are computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = max(64, CHUNK_ELEMENTS // weight.shape[0])
        w = weight.to(x.dtype)
        b = None if bias is None else bias.to(x.dtype)
        need_x, need_w, need_b, _ = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if need_x else None
        grad_w = torch.zeros_like(weight) if need_w else None
        grad_b = torch.zeros_like(bias) if need_b and bias is not None else None
        total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        correct = torch.zeros((), dtype=torch.long, device=x.device)
        for start in range(0, x.shape[0], rows):
            part, gold = x[start : start + rows], labels[start : start + rows, None]
            logits = torch.nn.functional.linear(part, w, b)
            correct += (logits.argmax(-1, keepdim=True) == gold).sum()
            log_p = torch.log_softmax(logits, dim=-1, dtype=total.dtype)
            del logits
            total -= log_p.gather(1, gold).sum()
            if not (need_x or need_w or need_b):
                continue
            grad = log_p.exp_()
            grad.scatter_add_(1, gold, grad.new_full((1, 1), -1.0).expand_as(gold))
            grad = grad.to(x.dtype)
            if grad_x is not None:
                torch.mm(grad, w, out=grad_x[start : start + rows])
            if grad_w is not None:
                grad_w += grad.T @ part
            if grad_b is not None:
                grad_b += grad.sum(0)
        ctx.save_for_backward(grad_x, grad_w, grad_b)
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if g is None else g.mul_(scale.to(g.dtype)) for g in ctx.saved_tensors), None


def vocabulary_loss(head: Head, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross entropy (nats) and number of correct predictions of hidden states (M, C) against labels (M,)."""
    x = head.transform(hidden)
    return ChunkedCrossEntropy.apply(x, head.logits.weight, head.logits.bias, labels)
