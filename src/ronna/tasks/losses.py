"""Losses of classification, summed over rows, for classes of unequal size too.

Legend: B rows, K classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CERTAIN = 1e-7  # a smaller doubt counts as this much: powers below 1 have no slope at 0


def balanced_weights(targets: Sequence[Any], classes: int) -> Tensor:
    """(K,) fp32: what makes every class as heavy as the others, from class ids or from rows of flags (K,).

    Class ids: n / (K n_k), of mean 1 over the rows (King & Zeng 2001; "balanced" in scikit-learn). Flags: a label's
    absences over its occurrences. A class that does not occur has weight 1.
    """
    gold = np.asarray(targets)
    each = np.bincount(gold, minlength=classes) if gold.ndim == 1 else gold.sum(0)
    heavy = len(gold) / classes if gold.ndim == 1 else len(gold) - each
    weights = np.divide(heavy, each, out=np.ones(classes), where=each > 0)
    return torch.from_numpy(weights).float()


def cross_entropy(scores: Tensor, gold: Tensor, weights: Tensor | None = None, gamma: float = 0.0) -> Tensor:
    """Scores (B, K) against class ids (B,): sum of w_gold (1 - p_gold)^gamma (-log p_gold), Lin et al. 2017."""
    weights = None if weights is None else weights.to(scores.device)
    if not gamma:
        return F.cross_entropy(scores, gold, weights, reduction="sum")
    log_p = scores.log_softmax(-1).gather(1, gold[:, None])[:, 0]
    loss = (1 - log_p.exp()).clamp(min=CERTAIN).pow(gamma) * -log_p
    return (loss if weights is None else loss * weights[gold]).sum()


def binary_cross_entropy(scores: Tensor, gold: Tensor, weights: Tensor | None = None, gamma: float = 0.0) -> Tensor:
    """Scores (B, K) against flags (B, K): the mean over labels, summed over rows; occurrences weigh w (K,)."""
    weights = None if weights is None else weights.to(scores.device)
    loss = F.binary_cross_entropy_with_logits(scores, gold, pos_weight=weights, reduction="none")
    if gamma:
        missed = torch.where(gold > 0, -scores, scores).sigmoid()
        loss = missed.clamp(min=CERTAIN).pow(gamma) * loss
    return loss.mean(-1).sum()
