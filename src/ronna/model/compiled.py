"""torch.compile for the halves of a block that look at tokens one at a time."""

from importlib.util import find_spec

import torch

from ronna.base.device import describe
from ronna.base.errors import RonnaError
from ronna.model.attention import Attention
from ronna.model.transformer import Block, Transformer


def compile_blocks(model: Transformer) -> None:
    """Compile, from now on, each block's feed-forward half and what comes before its attention kernel.

    Left as they are: who sees whom, which changes with every batch, and the vocabulary loss, which is written by
    hand. Lengths are dynamic, so batches of other sizes do not compile again. The first batch pays the compilation.
    """
    for module in model.modules():
        if isinstance(module, Block):
            module.feed = torch.compile(module.feed, dynamic=True)  # type: ignore[method-assign]
        elif isinstance(module, Attention):
            module.project = torch.compile(module.project, dynamic=True)  # type: ignore[method-assign]


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
