"""Weights in 4 bits: the codes are those of bitsandbytes, the products those of a wide model, the bytes as promised."""

import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ronna.base.errors import RonnaError
from ronna.model.config import without_dropout
from ronna.model.families import preset
from ronna.model.folder import load_folder, save_folder
from ronna.model.fourbit import Codes, FourBitLinear, encode, held_in, import_bitsandbytes, narrowed
from ronna.model.init import build, on_cpu
from ronna.model.layers import Linear, block_linears
from ronna.model.sequences import Sequences
from ronna.model.transformer import Transformer

bnb = pytest.importorskip("bitsandbytes")

KINDS = ("nf4", "nf4_double")
# Rows of a whole number of blocks, rows that end within one, and a last block that is cut.
SHAPES = [(256, 128), (40, 192), (48, 32), (30, 50), (9, 14)]
# The paper's appendix E.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip


def matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def four_bit(linear: Linear, kind: str = "nf4") -> FourBitLinear:
    weight = linear.weight.detach()
    narrow = narrowed(linear, kind)
    narrow.hold(weight)
    return narrow


def by_hand(weight: Tensor) -> Tensor:
    """Each number becomes the nearest of the sixteen, times the largest of its block."""
    made = []
    for block in weight.flatten().split(64):
        table = torch.tensor(NF4) * block.abs().max()
        made.append(table[(block[:, None] - table).abs().argmin(1)])
    return torch.cat(made).view_as(weight)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_are_the_nearest_of_sixteen_numbers(shape):
    weight = matrix(shape)
    made = encode(weight, "nf4").wide(shape, torch.float32)
    torch.testing.assert_close(made, by_hand(weight), atol=1e-7, rtol=0)
    assert len(made.flatten()[:64].unique()) <= 16
    assert 0.06 < float((made - weight).norm() / weight.norm()) < 0.12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_weights_are_those_of_bitsandbytes(shape, kind, dtype):
    weight, double = matrix(shape), kind == "nf4_double"
    held = encode(weight, kind)
    theirs = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, compress_statistics=double, quant_type="nf4")
    theirs.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=double, quant_type="nf4")
    theirs = theirs.to("cpu")
    state = theirs.weight.quant_state
    assert torch.equal(held.codes, theirs.weight.data) and torch.equal(held.absmax, state.absmax)
    assert (held.scales is not None) == state.nested == double
    if shape[1] % 64:
        return  # bitsandbytes 0.50 makes other weights of them on a CPU
    state.dtype = dtype
    assert torch.equal(held.wide(shape, dtype), bnb.functional.dequantize_4bit(theirs.weight.data, state))
    x = torch.randn(70, shape[1], dtype=dtype)
    ours = Linear(shape[1], shape[0], bias=False)
    ours.weight.data = weight
    torch.testing.assert_close(four_bit(ours, kind)(x), theirs(x))


def test_double_quantization_moves_the_blocks_magnitudes_by_little():
    weight = matrix((256, 128))
    one, two = (encode(weight, kind).wide((256, 128), torch.float32) for kind in KINDS)
    assert 0 < float((one - two).norm() / one.norm()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_a_wide_map_to_the_bit(kind, bias, dtype):
    torch.manual_seed(0)
    linear = Linear(128, 96, bias=bias)
    wide = Linear(128, 96, bias=bias)
    wide.load_state_dict(linear.state_dict())
    narrow = four_bit(linear, kind)
    wide.weight.data = narrow.weight
    wide.weight.requires_grad_(False)
    found = []
    for one in (narrow, wide):
        x = torch.randn(70, 128, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        y = one(x)
        y.float().square().sum().backward()
        found.append((y.detach(), x.grad, one.bias.grad if bias else None))
    for ours, theirs in zip(*found, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


def test_in_double_precision_too():
    linear = four_bit(Linear(64, 64, bias=False))
    x = torch.randn(3, 64, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(linear(x), x @ linear.weight.double().T)
    assert torch.autograd.gradcheck(linear, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backward_pass_is_given_codes_and_no_weight(dtype):
    def saved(linear: Linear) -> dict[int, int]:
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(8, 256, dtype=dtype, requires_grad=True)
        with saved_tensors_hooks(note, lambda t: t):
            linear(x).sum().backward()
        return kept

    wide = Linear(256, 512, bias=False).requires_grad_(False)
    weights = 256 * 512
    assert max(saved(wide).values()) == weights * dtype.itemsize  # the parameter, or its cast
    kept = saved(four_bit(Linear(256, 512, bias=False)))
    assert sum(kept.values()) == weights // 2 + weights // 64 * 4  # which are the module's own
    kept = saved(four_bit(Linear(256, 512, bias=False), "nf4_double"))
    assert sum(kept.values()) == weights // 2 + weights // 64 + weights // 64 // 256 * 4 + 4


def test_codes_move_but_are_never_rounded():
    for kind in KINDS:
        linear = four_bit(Linear(64, 64), kind)
        before = linear.weight
        linear.to(torch.bfloat16)
        assert linear.bias.dtype == torch.bfloat16 and torch.equal(linear.weight, before)
        assert linear.held.absmax.dtype == (torch.float32 if kind == "nf4" else torch.uint8)
        linear.to("meta")
        assert all(t.is_meta for t in linear.held if t is not None)


PRESETS = {"bert-tiny": {}, "gpt2-tiny": {}, "llama-tiny": {"num_key_value_heads": 1}, "t5-tiny": {},
           "modernbert-tiny": {}}  # fmt: skip
SIZES = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def folder_of(name: str, root: Path) -> Path:
    family, cfg = preset(name, **SIZES, **PRESETS[name])
    save_folder(build(without_dropout(cfg), seed=0), family, root / name)
    return root / name


def states(model: Transformer) -> Tensor:
    tokens, sequences = torch.arange(80) * 7 % 99, Sequences.of([50, 30])
    memory = model.encode(tokens, sequences) if model.encoder is not None and model.decoder is not None else None
    return model.hidden(tokens, sequences, memory=memory)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PRESETS)
def test_a_folder_in_four_bits_is_the_model_with_those_weights(name, kind, tmp_path):
    folder = folder_of(name, tmp_path)
    narrow, wide = load_folder(folder, quantize=kind).model, load_folder(folder).model
    linears = dict(block_linears(wide))
    assert linears.keys() == dict(block_linears(narrow)).keys()
    others = {n: p for n, p in wide.named_parameters() if n.removesuffix(".weight") not in linears}
    assert narrow.state_dict().keys() - {"head.logits.weight"} == others.keys() - {"head.logits.weight"}
    assert all(torch.equal(p, others[n]) for n, p in narrow.named_parameters())
    before = states(wide).detach()
    for path, linear in block_linears(narrow):
        assert torch.equal(linear.weight, encode(linears[path].weight.detach(), kind).wide(linear.shape, torch.float32))
        linears[path].weight.data = linear.weight
    found = states(narrow).detach()
    torch.testing.assert_close(found, states(wide).detach(), atol=2e-5, rtol=1e-5)
    assert 1e-4 < float((found - before).norm() / before.norm()) < 0.5


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.5), ("nf4_double", 4.127)])
def test_memory_falls_to_so_many_bits_a_weight(kind, bits, tmp_path):
    family, cfg = preset("bert-tiny", **SIZES | {"hidden_size": 256, "intermediate_size": 1024})
    save_folder(build(cfg, seed=0), family, tmp_path)
    narrow, wide = load_folder(tmp_path, quantize=kind).model, load_folder(tmp_path).model
    weights = sum(linear.weight.numel() for _, linear in block_linears(wide))
    assert weights == 2 * 12 * 256**2

    def held(model: Transformer) -> int:
        tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
        return sum(tensors.values())

    in_blocks = held(narrow) - (held(wide) - 4 * weights)
    assert 8 * in_blocks / weights == pytest.approx(bits, abs=2e-3)
    assert f"{weights:,} weights of the blocks in {kind}: {in_blocks / 2**20:.1f} MiB, {bits:.3f}" in held_in(narrow)
    assert held_in(wide) is None


def test_a_folder_is_never_held_wide(tmp_path, monkeypatch):
    """While one weight is read, those before it are codes and those after it have no memory."""
    folder, hold, seen = folder_of("bert-tiny", tmp_path), FourBitLinear.hold, []

    def watched(linear: FourBitLinear, weight: Tensor) -> None:
        assert not any(ref() is not None for ref in seen), "a weight outlived its codes"
        hold(linear, weight)
        seen.append(weakref.ref(weight))

    monkeypatch.setattr(FourBitLinear, "hold", watched)
    made = []
    load_folder(
        folder, quantize="nf4", allot=lambda model: made.append(on_cpu(model) or dict(model.named_parameters()))
    )
    assert len(seen) == 12 and not any(p.ndim == 2 and ".blocks." in n for n, p in made[0].items())


def test_dropout_that_is_asked_for_is_there(tmp_path):
    folder = folder_of("bert-tiny", tmp_path)
    model = load_folder(folder, quantize="nf4", dropout=0.3).model
    assert model.encoder.blocks[0].cfg.dropout == 0.3
    torch.manual_seed(0)
    assert not torch.equal(states(model.train()), states(model))


def test_without_the_library_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(RonnaError, match=r"ronna\[quantize\]"):
        import_bitsandbytes()
    with pytest.raises(RonnaError, match="not installed"):
        encode(matrix((64, 64)), "nf4")


def test_codes_are_a_tuple_without_holes():
    one, two = (encode(matrix((64, 64)), kind) for kind in KINDS)
    assert one == Codes(one.codes, one.absmax, None, None) and all(t is not None for t in two)
    assert one.bytes == 64 * 32 + 64 * 4 and two.bytes == 64 * 32 + 64 + 4 + 4
