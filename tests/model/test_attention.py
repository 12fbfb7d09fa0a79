"""Which kernel a GPU is given, that they agree, and what a batch keeps for all blocks."""

import pytest
import torch

from ronna.model import attention
from ronna.model.config import Attention
from ronna.model.families import preset
from ronna.model.init import build
from ronna.model.sequences import Sequences


@pytest.mark.parametrize(
    ("lengths", "window", "expected"),
    [
        ([8, 8, 8], None, True),
        ([8], None, True),
        ([8, 7], None, False),
        ([4, 4, 8], None, False),
        ([8, 8], 7, True),  # the furthest token is seven away
        ([8, 8], 6, False),
    ],
)
def test_full_rows_are_a_rectangle(lengths: list[int], window: int | None, expected: bool) -> None:
    assert attention.fills_rectangle(Sequences.of(lengths), window) == expected


def test_a_batch_looked_at_before_has_the_gradient_of_a_fresh_one() -> None:
    model = build(preset("t5-tiny", vocab_size=50)[1], seed=0).eval()
    tokens, looked_at = torch.arange(9), Sequences.of([5, 4])
    with torch.no_grad():
        model.encode(tokens, looked_at)
    found = []
    for sequences in (Sequences.of([5, 4]), looked_at):
        model.zero_grad()
        model.encode(tokens, sequences).states.sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and "encoder.bias.table.weight" in found[0]
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv", [4, 2])
def test_rectangles_and_variable_lengths_agree(causal: bool, kv: int) -> None:
    torch.manual_seed(0)
    cfg = Attention(4, 64, kv_heads=kv)
    block = attention.Attention(cfg, 256, causal).cuda()
    q, k, v = (torch.randn(96, heads, 64, device="cuda").bfloat16() for heads in (4, kv, kv))
    sequences = Sequences.of([48, 48], "cuda")
    flat = attention.varlen(q, k, v, cfg, sequences, causal=causal).float()
    rows = block.attend(q, k, v, sequences, None, None).float()
    assert torch.linalg.vector_norm(flat - rows) < 1e-2 * torch.linalg.vector_norm(flat)
