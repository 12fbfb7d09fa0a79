"""Sequences continued together: their tokens, what the model keeps of them, one call of it a step.

Legend: B sequences, L columns of the tokens so far, S flat source tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ronna.decoding.among import SINGLE, Among
from ronna.model.sequences import Sequences
from ronna.model.transformer import Cache, Memory, Transformer


@contextmanager
def inference(model: Transformer) -> Iterator[None]:
    """No dropout and no gradients inside; the model trains on afterwards if it did before."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


class Batch:
    """B sequences that grow by one token a step. `sources` are what the decoder of an encoder-decoder reads.

    tokens (B, L): prompt and continuation, -1 behind the end; lengths (B,). Rows may be dropped, repeated and
    reordered between steps.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        sources: Sequence[Sequence[int]] | None = None,
        among: Among = SINGLE,
    ):
        self.model, self.cache, self.memory, self.among = model, Cache(), None, among
        rows = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
        self.tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(model.device)
        self.lengths = torch.tensor([len(row) for row in rows], device=model.device)
        self.longest = self.tokens.shape[1]
        if sources is not None:
            flat = torch.tensor([token for source in sources for token in source], dtype=torch.long)
            lengths = [len(source) for source in sources]
            self.memory = model.encode(flat.to(model.device), Sequences.of(lengths, model.device))
        self.one = self.one_source() if among.parts > 1 else None

    def __len__(self) -> int:
        return len(self.lengths)

    def logits(self) -> Tensor:
        """(B, V) fp32 for each sequence's next token. Feeds the model what its cache does not hold yet."""
        assert self.model.head is not None
        if self.among.parts > 1:
            self.among.any(True)
        if self.cache.layers:
            past = self.lengths - 1
            sequences = Sequences(torch.ones(len(self), dtype=torch.long), past, self.model.device)
            fed = self.tokens.gather(1, past[:, None])[:, 0]
        else:
            sequences = Sequences(self.lengths, device=self.model.device)
            fed = self.tokens[self.tokens >= 0]
        hidden = self.model.hidden(fed, sequences, memory=self.memory, cache=self.cache, at=sequences.last)
        return self.model.head(hidden).float()

    def one_source(self) -> Memory | None:
        """What a decoder reads of the first sequence."""
        if self.memory is None:
            return None
        length = int(self.memory.sequences.lengths[0])
        return Memory(self.memory.states[:length].clone(), Sequences.of([length], self.model.device))

    def wait(self) -> None:
        """Take part in what the others' sequences still need of a model that all compute together."""
        while self.among.parts > 1 and self.among.any(False):
            self.model.hidden(self.tokens.new_zeros(1), Sequences.of([1], self.model.device), memory=self.one)

    def append(self, tokens: Tensor) -> None:
        """One more token (B,) for each sequence."""
        if self.longest == self.tokens.shape[1]:
            self.tokens = F.pad(self.tokens, (0, max(64, self.longest)), value=-1)
        self.tokens.scatter_(1, self.lengths[:, None], tokens[:, None])
        self.lengths += 1
        self.longest += 1

    def reorder(self, rows: Tensor) -> None:
        """Sequence i goes on from what was sequence rows[i] (B,), which has the same source."""
        self.tokens, self.lengths = self.tokens[rows], self.lengths[rows]
        self.cache.select(rows)

    def select(self, rows: Tensor) -> None:
        """Keep the given sequences with their sources, in this order, each as often as it is named."""
        self.reorder(rows)
        if self.memory is None:
            return
        sources = self.memory.sequences
        kept = Sequences(sources.lengths[rows.cpu()], device=sources.device)
        inside = torch.arange(kept.tokens, device=sources.device) - kept.starts[kept.owner]
        index = sources.starts[rows][kept.owner] + inside
        self.memory = Memory(self.memory.states[index], kept)
        for layer in self.cache.layers:
            if layer.memory is not None:
                keys, values = layer.memory
                layer.memory = keys[index], values[index]
