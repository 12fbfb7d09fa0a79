"""The token embedding trained by rows: those a step looked up, and those the data has at all.

A table of 30,522 x 384 is half of a small encoder, and a data set to fine-tune it on has a fifth or two of its words.
On a CPU a new table of zeros for the gradient cost 13 ms a step, and the optimizer's walk over the whole table 6.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from ronna.model.boxes import in_parts
from ronna.model.transformer import Transformer

# With more than this share of the table in use, a copy of its rows would not pay.
WORTHWHILE = 0.7


class EmbeddingRows:
    """Stands between the backward pass and the optimizer: `merge` before clipping, `dense` around the optimizer
    step. Elsewhere than on a CPU, or where a vocabulary head shares the table or it lies in shards, the gradient is
    dense as always and these do nothing.

    used: (N,) ids that the training data holds. The optimizer is then given these rows alone, under the table's own
    name; the others stay as they are, without decay too, and have no optimizer state. With `sparse` false the gradient
    is dense in any case.
    """

    def __init__(self, model: Transformer, used: Tensor | None = None, sparse: bool = True):
        embedding = model.embedding.tokens
        tied = model.head is not None and model.head.cfg.tied
        alone = model.device.type == "cpu" and not in_parts(embedding.weight)
        embedding.sparse = sparse and alone and not tied and embedding.weight.requires_grad
        self.table: Parameter = embedding.weight  # type: ignore[assignment]
        self.trained: Parameter = self.table
        self.used: Tensor | None = None
        if embedding.sparse and used is not None and len(used) < WORTHWHILE * len(self.table):
            self.used = used
            self.place = torch.zeros(len(self.table), dtype=torch.long).index_copy(0, used, torch.arange(len(used)))
            self.trained = Parameter(self.table.detach()[used])
        self.buffer: Tensor | None = None  # zeros wherever no step is under way

    def named_parameters(self, named: Iterable[tuple[str, Parameter]]) -> Iterator[tuple[str, Parameter]]:
        """The same with the rows in use in the table's place."""
        for name, parameter in named:
            yield name, self.trained if parameter is self.table else parameter

    def merge(self) -> None:
        """One entry for each row, as its norm needs."""
        if self.table.grad is not None and self.table.grad.is_sparse:
            self.table.grad = self.table.grad.coalesce()

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Inside, the optimizer finds a dense gradient, in a buffer that is kept; then the table takes its new rows."""
        gradient = self.table.grad
        if gradient is None or not gradient.is_sparse:
            yield
            return
        if self.buffer is None:
            self.buffer = torch.zeros_like(self.trained)
        rows = gradient.indices()[0]
        rows = rows if self.used is None else self.place[rows]
        self.buffer[rows] = gradient.values()
        self.trained.grad = self.buffer
        yield
        self.trained.grad = None
        self.table.grad = gradient
        self.buffer[rows] = 0.0
        if self.used is not None:
            self.table.detach().index_copy_(0, self.used, self.trained.detach())
