import pytest
import torch
from torch.nn import Parameter

from ronna.train import muon
from ronna.train.muon import MuonOptimizer, orthogonal

SIZES = [(24, 40), (40, 24), (32, 32)]


def matrices(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in SIZES]


def trained(make, steps: int = 4) -> list[Parameter]:
    parameters = [Parameter(x) for x in matrices(0)]
    optimizer = make(parameters)
    for step in range(steps):
        for p, gradient in zip(parameters, matrices(step + 1), strict=True):
            p.grad = gradient
        optimizer.step()
    return parameters


@pytest.fixture
def in_precision(monkeypatch):
    """Sets the precision of products."""
    return lambda dtype: monkeypatch.setattr(muon, "precision", lambda device: dtype)


@pytest.mark.parametrize("nesterov", [True, False])
def test_in_bf16_it_is_torchs_to_the_bit(nesterov, in_precision):
    in_precision(torch.bfloat16)
    ours = trained(lambda p: MuonOptimizer(p, 0.05, 0.9, nesterov, 3, 0.1))
    options = {"lr": 0.05, "momentum": 0.9, "nesterov": nesterov, "ns_steps": 3, "weight_decay": 0.1}
    theirs = trained(lambda p: torch.optim.Muon(p, **options, adjust_lr_fn="match_rms_adamw"))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("nesterov", [True, False])
def test_in_fp32_it_is_the_same_but_for_rounding(nesterov, in_precision):
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        in_precision(dtype)
        found.append(trained(lambda p: MuonOptimizer(p, 0.05, 0.9, nesterov, 5, 0.1)))
    for before, narrow, wide in zip(matrices(0), *found, strict=True):
        assert narrow.dtype == wide.dtype == torch.float32
        assert 0 < (narrow - wide).norm() < 0.02 * (wide - before).norm()


def test_singular_vectors_stay_and_values_come_near_to_one(in_precision):
    in_precision(torch.float32)
    for x in matrices(3):
        u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
        values = s / s.norm()
        for _ in range(5):
            values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
        wanted = u @ values.diag() @ v
        torch.testing.assert_close(orthogonal(x, 5).double(), wanted, rtol=0, atol=1e-5)
        assert values.min() > 0.6 and values.max() < 1.3


def test_a_gradient_of_nothing_changes_nothing(in_precision):
    in_precision(torch.float32)
    assert torch.equal(orthogonal(torch.zeros(3, 5), 5), torch.zeros(3, 5))


def test_what_it_is_given_stays(in_precision):
    in_precision(torch.float32)
    x = matrices(5)[0]
    before = x.clone()
    orthogonal(x, 5)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("has", "wanted"), [(True, torch.bfloat16), (False, torch.float32)])
def test_products_are_in_bf16_only_where_there_are_instructions_for_it(has, wanted, monkeypatch):
    monkeypatch.setattr(muon, "has_bf16", lambda device: has)
    assert muon.precision.__wrapped__(torch.device("cpu")) == wanted
