"""What makes answers of hidden states: logits of the vocabulary, scores of sequences, tokens or pairs.

Legend: B sequences, C channels, M positions that are read.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ronna.model import config as c
from ronna.model.group import Group
from ronna.model.layers import ACTIVATIONS, Linear, dropout, make_norm
from ronna.model.sequences import Sequences


class Head(nn.Module):
    """Hidden states to vocabulary logits; training leaves the last product to the chunked loss."""

    def __init__(self, cfg: c.Head, dim: int, vocab: int):
        super().__init__()
        self.cfg, self.vocab = cfg, vocab
        self.group = Group()  # of the ranks that divide its words
        self.dense = Linear(dim, dim, bias=cfg.transform.bias) if cfg.transform else None
        self.norm = make_norm(cfg.transform.norm if cfg.transform else None, dim)
        self.logits = Linear(dim, vocab, bias=cfg.bias)
        self.softmax: Callable[..., Tensor] | None = None  # a faster one for `model.loss`

    def transform(self, x: Tensor) -> Tensor:
        if self.dense is not None and self.cfg.transform is not None:
            x = self.norm(ACTIVATIONS[self.cfg.transform.act](self.dense(x)))
        return x if self.cfg.scale == 1.0 else x * self.cfg.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.group.words(self.logits(self.transform(x)), self.vocab)


def pooled_places(sequences: Sequences, pool: c.Pool) -> Tensor | None:
    """(B,) places whose states `pool` takes; None: all."""
    return {"first": sequences.starts, "last": sequences.last}.get(pool)


def pooled(x: Tensor, sequences: Sequences, pool: c.Pool) -> Tensor:
    """States at `pooled_places` to one (B, C) a sequence."""
    if pool != "mean":
        return x
    sums = x.new_zeros(len(sequences), x.shape[-1]).index_add(0, sequences.owner, x)
    return sums / sequences.lengths.to(x.device, x.dtype)[:, None]


class Classifier(nn.Module):
    """Hidden states, those at `reads`, to scores: (B, labels) of sequences or pairs, (M, labels) of tokens.

    `transitions` (labels + 2, labels), where it has them: from the label of the row to that of the column; in the last
    two rows of beginning and of ending with it. They are not in the scores.
    """

    def __init__(self, cfg: c.Classifier, dim: int):
        super().__init__()
        self.cfg = cfg
        self.dense = Linear(dim, dim, bias=cfg.dense_bias) if cfg.dense else None
        self.norm = make_norm(cfg.norm, dim)
        self.out = Linear(cfg.states * dim, cfg.labels, bias=cfg.bias)
        self.transitions = nn.Parameter(torch.zeros(cfg.labels + 2, cfg.labels)) if cfg.transitions else None

    def reads(self, sequences: Sequences, at: Tensor | None) -> Tensor | None:
        """Places whose states the scores are made of: the tokens `at`, or what is pooled; None: all."""
        return pooled_places(sequences, self.cfg.pool) if self.cfg.of == "sequence" else at

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        if self.cfg.of == "sequence":
            x = pooled(x, sequences, self.cfg.pool)
        if self.dense is not None and self.cfg.dense is not None:
            x = dropout(x, self.cfg.dense_dropout, self.training)
            x = self.norm(ACTIVATIONS[self.cfg.dense](self.dense(x)))
        x = dropout(x, self.cfg.dropout, self.training)
        return self.out(x.view(-1, self.cfg.states * x.shape[-1])).float()
