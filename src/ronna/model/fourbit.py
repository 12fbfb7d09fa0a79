"""Linear maps whose weights are held in 4 bits and do not learn: what adapters are trained over in QLoRA (Dettmers et
al. 2023).

A weight is one of the 16 numbers of NormalFloat4 times the largest magnitude of its block of 64. The magnitudes are
fp32, or with double quantization 8 bits each, less their mean and in blocks of 256: 4.5 or 4.127 bits a weight. Both
ways the `bitsandbytes` library does the work, on a CPU and on CUDA.

Legend: T tokens, I inputs and O outputs of a linear map.
"""

import importlib
import logging
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ronna.base.errors import RonnaError
from ronna.model.layers import Linear

Quantize = Literal["nf4", "nf4_double"]

BLOCK, DOUBLE_BLOCK = 64, 256
KERNELS = (torch.float32, torch.float16, torch.bfloat16)  # what weights can be made in


def import_bitsandbytes(where: str = "quantize") -> Any:
    """Raises RonnaError, which says `where` it is wanted, if it is not installed.

    On a CPU with bf16 instructions it would, as it is imported, fetch a program from the network that is not needed
    here, or warn that it cannot. It is kept from both.
    """
    if (found := sys.modules.get("bitsandbytes")) is not None:
        return found
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    fetcher, level = sys.modules.get("kernels"), logger.level
    sys.modules["kernels"] = None  # type: ignore[assignment]  # which makes importing it fail
    logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError:
        fix = "pip install 'ronna[quantize]'"
        raise RonnaError("bitsandbytes is not installed", where=where, fix=fix) from None
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if fetcher is not None:
            sys.modules["kernels"] = fetcher


class Codes(NamedTuple):
    """A matrix in 4 bits: two codes a byte, row after row, and the largest magnitude of each block.

    codes: (O I / 2, 1) uint8. absmax: (blocks,) fp32, or uint8 with double quantization; then `scales` are the largest
    magnitudes of its blocks, fp32, and `mean` () is what was taken from every one.
    """

    codes: Tensor
    absmax: Tensor
    scales: Tensor | None
    mean: Tensor | None

    def wide(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The matrix (O, I) that they stand for."""
        bnb, absmax = import_bitsandbytes().functional, self.absmax
        if self.scales is not None and self.mean is not None:
            absmax = bnb.dequantize_blockwise(absmax, absmax=self.scales, blocksize=DOUBLE_BLOCK) + self.mean
        made = dtype if dtype in KERNELS else torch.float32
        # Its CPU kernel (0.50) begins a block with every row, which is wrong for rows that end within one.
        rows = shape if shape[1] % BLOCK == 0 else (1, shape[0] * shape[1])
        state = bnb.QuantState(absmax, shape=torch.Size(rows), dtype=made, blocksize=BLOCK, quant_type="nf4")
        weight: Tensor = bnb.dequantize_4bit(self.codes, state)
        return weight.view(shape).to(dtype)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self if t is not None)


def encode(weight: Tensor, kind: Quantize) -> Codes:
    """Codes of a weight (O, I): of each number the nearest, in blocks that run on from row to row."""
    weight = weight if weight.dtype in KERNELS else weight.float()
    codes, state = import_bitsandbytes().functional.quantize_4bit(
        weight, blocksize=BLOCK, compress_statistics=kind == "nf4_double", quant_type="nf4"
    )
    return Codes(codes, state.absmax, state.state2.absmax if state.nested else None, state.offset)


class FourBitProduct(torch.autograd.Function):
    """x W^T + bias with a frozen W that is made out of its codes when it is needed and not kept: both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, held: Codes, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(*held)
        ctx.shape = shape
        return F.linear(x, held.wide(shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        of_x, of_bias = ctx.needs_input_grad[:2]
        weight = Codes(*ctx.saved_tensors).wide(ctx.shape, gradient.dtype) if of_x else None
        return (
            None if weight is None else gradient @ weight,
            gradient.flatten(0, -2).sum(0) if of_bias else None,
            None,
            None,
        )


class FourBitLinear(Linear):
    """A linear map with a weight in 4 bits; only `narrowed` makes one, out of a Linear that is there.

    The codes are buffers that no state holds: whoever stores the model names the folder they were made of.
    """

    kind: Quantize
    codes: Tensor
    absmax: Tensor
    scales: Tensor | None
    mean: Tensor | None

    def hold(self, weight: Tensor) -> None:
        """Take the codes of a weight (O, I) for the map's own."""
        for name, tensor in encode(weight, self.kind)._asdict().items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def held(self) -> Codes:
        return Codes(self.codes, self.absmax, self.scales, self.mean)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(O, I) fp32, made anew at every call: a change of it is lost."""
        return self.held.wide(self.shape, torch.float32)

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return self.changed(input, FourBitProduct.apply(input, bias, self.held, self.shape))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Codes go from device to device; in another precision they would mean other weights."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


def narrowed(linear: Linear, kind: Quantize) -> FourBitLinear:
    """The map itself without its weight, which `hold` gives it again."""
    del linear.weight
    linear.__class__ = FourBitLinear
    assert isinstance(linear, FourBitLinear)
    linear.kind = kind
    return linear


def held_in(model: nn.Module) -> str | None:
    """What the weights inside the blocks are held in, in words; None for a model without any in 4 bits."""
    maps = [module for module in model.modules() if isinstance(module, FourBitLinear)]
    if not maps:
        return None
    weights, size = sum(m.in_features * m.out_features for m in maps), sum(m.held.bytes for m in maps)
    bits = 8 * size / weights
    return f"{weights:,} weights of the blocks in {maps[0].kind}: {size / 2**20:,.1f} MiB, {bits:.3f} bits each"
