import pytest
import torch

from ronna.model.config import Attention as Config
from ronna.model.config import Classifier as Scores
from ronna.model.heads import Classifier
from ronna.model.layers import Linear, dropout, merged
from ronna.model.sequences import Sequences


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_the_expectation_and_passes_gradients_where_it_kept(rate):
    torch.manual_seed(0)
    x = torch.ones(1000, 1001, requires_grad=True)
    y = dropout(x, rate, training=True)
    y.sum().backward()
    kept = y != 0
    assert abs(float(kept.float().mean()) - (1 - rate)) < 2e-3
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - rate)), rtol=1e-4, atol=0)
    assert torch.equal(x.grad, y.detach())
    columns = kept.float().mean(0)
    assert columns.std() < 1.2 * (rate * (1 - rate) / 1000) ** 0.5  # no pattern along the draws


def test_dropout_follows_the_seed():
    x = torch.ones(999)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(dropout(x, 0.3, training=True))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_no_dropout_is_the_tensor_itself():
    x = torch.ones(3)
    assert dropout(x, 0.5, training=False) is x and dropout(x, 0.0, training=True) is x


@pytest.mark.parametrize("tokens", [3, 100], ids=["one by one", "joined"])
@pytest.mark.parametrize("bias", [True, False])
def test_merged_products_are_the_separate_ones(tokens, bias):
    torch.manual_seed(0)
    a, b, x = Linear(8, 16, bias=bias), Linear(8, 4, bias=bias), torch.randn(tokens, 8)
    torch.testing.assert_close(merged(x, a, b), (a(x), b(x)))


class Wrapped(Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


class Changed(Linear):
    def changed(self, input: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return output * input.mean(-1, keepdim=True)


@pytest.mark.parametrize("kind", [Wrapped, Changed])
def test_a_changed_map_changes_merged_products_too(kind):
    a, b, x = kind(8, 16), Linear(8, 4), torch.randn(100, 8)
    torch.testing.assert_close(merged(x, a, b), (a(x), b(x)))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [None, 2])
def test_written_out_attention_is_sdpa_but_for_its_dropout(causal, kv_heads, monkeypatch):
    from ronna.model import attention

    monkeypatch.setattr(attention, "drop", lambda x, rate, training: x)
    torch.manual_seed(0)
    cfg = Config(4, 8, kv_heads)
    q, k, v = torch.randn(3, 6, 4, 8), torch.randn(3, 6, cfg.kv, 8), torch.randn(3, 6, cfg.kv, 8)
    mask = torch.rand(3, 1, 6, 6) > 0.4
    mask |= torch.eye(6, dtype=torch.bool)
    for m in (None, mask, torch.randn(1, 4, 6, 6)):
        plain = attention.sdpa(q, k, v, cfg, mask=m, causal=causal, dropout=0.0)
        written = attention.sdpa(q.clone().requires_grad_(), k, v, cfg, mask=m, causal=causal, dropout=0.0)
        torch.testing.assert_close(written, plain)


@pytest.mark.parametrize("place", ["dropout", "dense_dropout"])
def test_a_classifier_drops_what_its_layers_read(place):
    classifier = Classifier(Scores(2, dense="tanh", **{place: 0.5}), dim=64)
    read = {}
    for name in ("dense", "out"):
        getattr(classifier, name).register_forward_pre_hook(lambda _, inputs, name=name: read.update({name: inputs[0]}))
    classifier(torch.ones(1, 64), Sequences.of([5]))
    dropped = {"dropout": "out", "dense_dropout": "dense"}[place]
    assert {name: bool((x == 0).any()) for name, x in read.items()} == {"dense": False, "out": False} | {dropped: True}
