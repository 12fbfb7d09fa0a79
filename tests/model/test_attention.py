"""Which kernel a GPU is given, and that they agree."""

import pytest
import torch

from ronna.model import attention
from ronna.model.config import Attention
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
