"""torch.compile for what in a block looks at tokens one at a time: all but the attention itself."""

from importlib.util import find_spec

import torch

from ronna.base.device import describe
from ronna.base.errors import RonnaError
from ronna.model.loss import fused_softmax_in_place
from ronna.model.transformer import Block, Transformer


def compile_blocks(model: Transformer) -> None:
    """Compile, from now on, what comes before each block's attention kernel and what comes behind it.

    Left as it is: who sees whom, which changes with every batch. Of the vocabulary loss, which is written by hand, a
    GPU gets the softmax compiled. The first batch pays the compilation, and the first of another size once more, for
    any size.
    """
    if model.head is not None and model.device.type == "cuda":
        model.head.softmax = torch.compile(fused_softmax_in_place)
    for block in model.modules():
        if isinstance(block, Block):
            if block.cross is None:
                block.finish = torch.compile(block.closed_and_fed)
            for part in ("open", "close", "feed"):
                setattr(block, part, torch.compile(getattr(block, part)))


def wants_compile(choice: str, device: torch.device) -> bool:
    """`auto` compiles on CUDA, where Triton is there to do it; on a CPU it wins nothing. `always`, `never`.

    Raises RonnaError for `always` on a CPU without a C++ compiler.
    """
    if choice == "auto":
        return device.type == "cuda" and find_spec("triton") is not None
    if choice == "always" and device.type == "cpu" and not describe("cpu").has_compiler:
        fix = "install one (g++ or clang), or use train.compile=never"
        raise RonnaError("torch.compile needs a C++ compiler on PATH", where="train.compile", fix=fix)
    return choice == "always"
