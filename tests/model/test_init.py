"""New weights in another precision are those of fp32, rounded."""

import torch

from ronna.model.families import preset
from ronna.model.init import build, hold


def test_matrices_may_be_born_in_bf16():
    _, cfg = preset("bert-tiny", vocab_size=50)
    wide, narrow, held = build(cfg, 3), build(cfg, 3, torch.bfloat16), build(cfg, 3)
    hold(held, torch.bfloat16)
    assert narrow.head.logits.weight is narrow.embedding.tokens.weight
    for (name, a), b, c in zip(wide.named_parameters(), narrow.parameters(), held.parameters(), strict=True):
        assert b.dtype == c.dtype == (torch.bfloat16 if a.ndim == 2 else torch.float32), name
        assert torch.equal(b, a.to(b.dtype)) and torch.equal(b, c), name
