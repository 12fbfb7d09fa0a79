"""Optimizers for one tensor, or some rows of one, at a time: what a step needs besides is never there for all at once.

Weights held in bfloat16 are stepped in float32 and rounded to either neighbour, so that on average nothing of a step
is lost, however small it is (stochastic rounding, Gupta et al. 2015).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from ronna.base.device import seed_for
from ronna.train.optim import OptimizerConfig, build_apart
from ronna.train.shelf import LEAST, Shelf

ROWS = 2**22  # numbers of a portion, where an optimizer looks at one number at a time: 16 MiB in float32
ELEMENTWISE = {"adamw", "adam", "sgd", "adamw8bit"}


class Portion(NamedTuple):
    name: str
    rows: slice
    master: Parameter  # what the optimizer steps: the rows themselves, or their copy in float32, empty between steps
    copied: bool
    number: int  # among all portions
    optimizers: list[Optimizer]


class Portions:
    """The optimizers of a model's trainable parameters, each of at most some rows of one."""

    def __init__(
        self,
        config: OptimizerConfig,
        named_parameters: Iterable[tuple[str, Parameter]],
        offload: bool = False,
        shelf: Shelf | None = None,
    ):
        """With `offload`, states wait on the `shelf` for their step, or, where weights are on a GPU, in the host's
        memory, where the step is then taken (ZeRO-Offload, Ren et al. 2021)."""
        weights: dict[Parameter, str] = {}
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                weights.setdefault(parameter, name)
        parts: list[tuple[str, Parameter, slice, Parameter]] = []
        for weight, name in weights.items():
            for rows in cuts(weight, sliced=config.kind in ELEMENTWISE):
                part = weight.detach()[rows]
                away = offload and part.is_cuda
                own = part.dtype == torch.float32 and not away
                master = Parameter(part if own else torch.empty(part.shape, device="cpu" if away else part.device))
                whole = rows.start == 0 and rows.stop == len(weight)
                parts.append((name if whole else f"{name}[{rows.start}:{rows.stop}]", weight, rows, master))
        optimizers = build_apart(config, [(name, master) for name, _, _, master in parts])
        self.shelf, self.shelved = shelf if offload else None, set[int]()
        self.of: defaultdict[Parameter, list[Portion]] = defaultdict(list)
        for number, (name, weight, rows, master) in enumerate(parts):
            copied = master.data_ptr() != weight.detach()[rows].data_ptr()
            if copied:
                master.untyped_storage().resize_(0)
            self.of[weight].append(Portion(name, rows, master, copied, number, optimizers[master]))
        self.optimizers = [o for portions in self.of.values() for portion in portions for o in portion.optimizers]
        if self.shelf is not None:
            for optimizer in self.optimizers:
                optimizer.register_load_state_dict_post_hook(partial(put_away, shelf=self.shelf, shelved=self.shelved))

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        for portions in self.of.values():
            for portion in portions:
                yield portion.name, portion.master

    @torch.no_grad()
    def step(self, weight: Parameter, seed: int) -> None:
        """One step of a parameter by its gradient; `seed` decides how it is rounded."""
        assert weight.grad is not None
        for portion in self.of[weight]:
            part, master = weight.detach()[portion.rows], portion.master
            if portion.copied:
                master.untyped_storage().resize_(master.numel() * master.element_size())
                master.copy_(part)
            master.grad = weight.grad[portion.rows].to(master.device, master.dtype)
            for optimizer in portion.optimizers:
                optimizer.step()
                if self.shelf is not None:
                    put_away(optimizer, self.shelf, self.shelved)
            master.grad = None
            if portion.copied:
                narrow = part.dtype != master.dtype
                part.copy_(rounded(master, seed_for(seed, portion.number)) if narrow else master)
                master.untyped_storage().resize_(0)

    def release(self, x: Tensor) -> None:
        """Let go of the memory of a state that waits on the shelf, which somebody has looked at."""
        if self.shelf is not None and x.data_ptr() in self.shelved:
            self.shelf.release(x)


def put_away(optimizer: Optimizer, shelf: Shelf, shelved: set[int]) -> None:
    """Let the states of an optimizer wait on the shelf."""
    for state in optimizer.state.values():
        for name, x in state.items():
            if x.data_ptr() in shelved:
                shelf.release(x)
            elif x.numel() * x.element_size() >= LEAST:
                state[name] = shelf.put(x)
                shelved.add(state[name].data_ptr())


def cuts(weight: Parameter, sliced: bool) -> Iterator[slice]:
    """Rows of a tensor in pieces of about `ROWS` numbers, or all of them."""
    step = max(1, ROWS // max(1, weight[0].numel())) if sliced else len(weight)
    for start in range(0, len(weight), step):
        yield slice(start, min(len(weight), start + step))


def rounded(x: Tensor, seed: int) -> Tensor:
    """float32 -> bfloat16, up or down with the chances that make the mean x. Not for what is not finite."""
    if x.device.type == "cpu":
        words = np.random.SFC64(seed).random_raw(-(-x.numel() // 4)).view(np.uint16)
        noise = torch.from_numpy(words[: x.numel()].astype(np.int32)).view(x.shape)
    else:
        rng = torch.Generator(x.device).manual_seed(seed)
        noise = torch.randint(2**16, x.shape, generator=rng, device=x.device, dtype=torch.int32)
    # A bfloat16 is the upper half of a float32: noise on the lower half carries over as often as it should.
    return (noise.add_(x.view(torch.int32)) >> 16).to(torch.int16).view(torch.bfloat16)
