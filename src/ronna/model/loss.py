"""Cross entropy over a vocabulary without ever holding all its logits.

Legend: M predicted positions, C channels, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ronna.model.boxes import box_of, local
from ronna.model.group import Group
from ronna.model.heads import Head
from ronna.model.layers import on_card

CHUNK_ELEMENTS = 2**26  # logits of one chunk: 128 MiB in bf16
CARD_ELEMENTS, CARD_ROWS = 2**28, 256  # the same on a GPU, which is fast at products of some thousand rows, in so many
TILE_ELEMENTS = 2**21  # of its softmax: 8 MiB in fp32, which stays in a cache


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over M of -log softmax(x W^T + b) against the label, a chunk of rows at a time; `smoothing` is the share of
    the target that goes to all V alike (Szegedy et al. 2016).

    The gradients are finished in the forward pass, while a chunk's probabilities are at hand, up to the one
    scalar that comes back: no logits are kept and none are computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, smoothing: float, words: "Words"
    ) -> tuple[Tensor, Tensor]:
        rows = chunk_rows(words.most, on_card(x))
        w = aligned(weight.to(x.dtype))
        b = None if bias is None else aligned(bias.to(x.dtype))
        need_x, need_w, need_b, *_ = ctx.needs_input_grad
        training = need_x or need_w or need_b
        grad_x = torch.empty_like(x) if need_x else None
        grad_w = torch.zeros_like(weight) if need_w and x.shape[0] == 0 else None
        grad_b = torch.zeros_like(bias) if need_b and bias is not None else None
        total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        correct = torch.zeros((), dtype=torch.long, device=x.device)
        for start in range(0, x.shape[0], rows):
            part, gold = x[start : start + rows], labels[start : start + rows, None]
            made = F.linear(part, w, b)
            logits = made[:, : len(weight)]  # the rest are zeros, and stay so
            if not training:
                correct += (words.best(logits) == gold).sum()
            soft = words.alone if words.group.size == 1 else words.softmax_in_place
            total += soft(logits, gold, total.dtype, training, smoothing)
            if grad_x is not None:
                torch.mm(made, w, out=grad_x[start : start + rows])
            if need_w:
                grad_w = with_product(grad_w, made.T, part, weight.dtype)
            if grad_b is not None:
                grad_b += logits.sum(0)
        total = words.group.reduced(total, "sum")
        if grad_x is not None:
            grad_x = words.group.reduced(grad_x, "sum")
        ctx.save_for_backward(grad_x, None if grad_w is None else grad_w[: len(weight)], grad_b)
        ctx.scaled = None
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In place, as the gradient of a vocabulary is large; a graph that is walked again finds it scaled already, and
        # autograd, which would refuse a saved tensor that has changed, is not told.
        factor, ctx.scaled = scale if ctx.scaled is None else scale / ctx.scaled, scale
        return *(None if g is None else g.data.mul_(factor.to(g.dtype)) for g in ctx.saved_tensors), None, None, None


def chunk_rows(vocab: int, cuda: bool) -> int:
    """Of logits that are made at a time."""
    if cuda:
        return max(1, CARD_ELEMENTS // vocab // CARD_ROWS) * CARD_ROWS
    return max(64, CHUNK_ELEMENTS // vocab)


def tile_rows(logits: Tensor) -> int:
    """Of a softmax that is worked out at a time."""
    return max(1, (CHUNK_ELEMENTS if on_card(logits) else TILE_ELEMENTS) // max(1, logits.shape[1]))


def aligned(weight: Tensor) -> Tensor:
    """On a GPU with zeros behind it, up to a multiple of 64 words: over a vocabulary of an odd size products in bf16
    take kernels of an older generation."""
    missing = -len(weight) % 64 if on_card(weight) else 0
    return F.pad(weight, (0, 0) * (weight.ndim - 1) + (0, missing)) if missing else weight


def with_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a b in `dtype`, in place; on a GPU it is added up in that precision from the start."""
    if a.is_cuda and dtype == torch.float32 != a.dtype:
        if total is None:
            return torch.mm(a, b, out_dtype=dtype)
        return torch.addmm(total, a, b, out_dtype=dtype, out=total)
    product = a @ b
    return product.to(dtype) if total is None else total.add_(product)


def fused_softmax_in_place(
    logits: Tensor, gold: Tensor, dtype: torch.dtype, training: bool, smoothing: float = 0.0
) -> Tensor:
    """`softmax_in_place` to be compiled: two passes over the logits and nothing of their size beside them."""
    wide, even = logits.to(dtype), smoothing / logits.shape[1]
    log_z = wide.logsumexp(-1, keepdim=True)
    total = (log_z - (1 - smoothing) * wide.gather(1, gold)).sum()
    if smoothing:
        total = total - even * wide.sum()
    if training:
        right = torch.arange(logits.shape[1], device=logits.device) == gold
        logits.copy_((wide - log_z).exp() - right.to(dtype) * (1 - smoothing) - even)
    return total


def softmax_in_place(
    logits: Tensor, gold: Tensor, dtype: torch.dtype, training: bool, smoothing: float = 0.0
) -> Tensor:
    """Summed loss of logits (rows, V) against gold (rows, 1); training turns them into their own gradient.

    Worked out in `dtype`, a tile of rows at a time, so that the passes over it do not go to memory.
    """
    rows = tile_rows(logits)
    total = logits.new_zeros((), dtype=dtype)
    even = smoothing / logits.shape[1]
    for tile, label in zip(logits.split(rows), gold.split(rows), strict=True):
        log_p = torch.log_softmax(tile, dim=-1, dtype=dtype)
        total -= log_p.gather(1, label).sum() * (1 - smoothing)
        if smoothing:
            total -= log_p.sum() * even
        if training:
            p = log_p.exp_()
            p = p.scatter_add_(1, label, p.new_full((1, 1), smoothing - 1.0).expand_as(label))
            tile.copy_(p.sub_(even) if smoothing else p)
    return total


@dataclass(frozen=True)
class Words:
    """Those of a head that this rank has: from `first` on, of V in all."""

    group: Group
    first: int
    vocab: int
    alone: Callable[..., Tensor] = softmax_in_place  # where it has all

    @property
    def most(self) -> int:
        """As many as any rank has."""
        return -(-self.vocab // self.group.size)

    def best(self, logits: Tensor) -> Tensor:
        """(rows, 1): the word of the largest logit."""
        found = logits.argmax(-1, keepdim=True)
        if self.group.size == 1:
            return found
        here = logits.gather(1, found).float()
        first = torch.where(here == self.group.reduced(here, "max"), found + self.first, self.vocab)
        return self.group.reduced(first, "min")

    def softmax_in_place(
        self, logits: Tensor, gold: Tensor, dtype: torch.dtype, training: bool, smoothing: float = 0.0
    ) -> Tensor:
        """This rank's part of what the function of this name returns, of its part of the logits."""
        rows, even = tile_rows(logits), smoothing / self.vocab
        most = self.group.reduced(logits.max(-1, keepdim=True).values.to(dtype), "max")
        tiles = list(zip(logits.split(rows), most.split(rows), gold.split(rows), strict=True))
        sums = [(tile.to(dtype) - top).exp_().sum(-1, keepdim=True) for tile, top, _ in tiles]
        log_z = most + self.group.reduced(torch.cat(sums), "sum").log_()
        total = logits.new_zeros((), dtype=dtype)
        for (tile, _, label), z in zip(tiles, log_z.split(rows), strict=True):
            log_p = tile.to(dtype) - z
            here = (label >= self.first) & (label < self.first + tile.shape[1])
            label = (label - self.first) * here
            total -= (log_p.gather(1, label) * here).sum() * (1 - smoothing)
            if smoothing:
                total -= log_p.sum() * even
            if training:
                p = log_p.exp_().scatter_add_(1, label, (smoothing - 1.0) * here.to(dtype))
                tile.copy_(p.sub_(even))
        return total


def token_log_probs(head: Head, hidden: Tensor, labels: Tensor) -> Tensor:
    """(M,) fp32 log-probability (nats) of each label (M,) at hidden states (M, C).

    Logits are made a chunk of rows at a time and made again for the gradient, so that none are kept.
    """
    weight, bias, x = head.logits.weight, head.logits.bias, head.transform(hidden)

    def chunk(part: Tensor, gold: Tensor) -> Tensor:
        logits = F.linear(part, weight.to(part.dtype), None if bias is None else bias.to(part.dtype))
        return torch.log_softmax(logits, dim=-1, dtype=torch.float32).gather(1, gold[:, None])[:, 0]

    rows = max(64, CHUNK_ELEMENTS // weight.shape[0])
    pieces = zip(x.split(rows), labels.split(rows), strict=True)
    found = [checkpoint(chunk, part, gold, use_reentrant=False) for part, gold in pieces]
    return torch.cat(found) if found else x.new_zeros(0, dtype=torch.float32)


def same(x: Tensor) -> Tensor:
    return x


def vocabulary_loss(head: Head, hidden: Tensor, labels: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor | None]:
    """Summed cross entropy (nats) of hidden states (M, C) against labels (M,), and how many are predicted right.

    The second is counted only where no gradient is taken: it would cost training another look at all logits.
    """
    hidden, labels = head.group.some(hidden), head.group.some(labels)
    x = head.transform(hidden)
    words = Words(head.group, box_of(head.logits.weight).start[0], head.vocab, head.softmax or softmax_in_place)
    weight = local(head.logits.weight)
    bias = None if head.logits.bias is None else local(head.logits.bias)
    if not torch.is_grad_enabled():  # a Function is told that parameters want gradients even then
        x, weight, bias = x.detach(), weight.detach(), None if bias is None else bias.detach()
    with saved_tensors_hooks(same, same):  # finished gradients, scaled where they lie: no use for them elsewhere
        total, correct = ChunkedCrossEntropy.apply(x, weight, bias, labels, smoothing, words)
    total, correct = head.group.all_of(total), head.group.all_of(correct)
    return total, None if total.requires_grad else correct
