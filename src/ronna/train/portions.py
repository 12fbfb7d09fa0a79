"""Optimizers for one tensor, or some rows of one, at a time: what a step needs besides is never there for all at once.

Weights held in bfloat16 are stepped in float32 and rounded to either neighbour, so that on average nothing of a step
is lost, however small it is (stochastic rounding, Gupta et al. 2015).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
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

PIECE = 2**18  # numbers that are rounded at a time; a multiple of four, which a word of random bits is for
ROWS = 2**20  # numbers of a portion, where an optimizer looks at one number at a time: 4 MiB in float32
ELEMENTWISE = {"adamw", "adam", "sgd", "adamw8bit"}


class Portion(NamedTuple):
    name: str
    rows: slice
    master: Parameter  # what the optimizer steps: the rows themselves, or their copy in float32, empty between steps
    shell: Tensor | None  # what a copy's master has for its data between steps: a shape without numbers
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
        parts: list[tuple[str, Parameter, slice, Parameter, Tensor | None]] = []
        for weight, name in weights.items():
            for rows in cuts(weight, sliced=config.kind in ELEMENTWISE):
                part = weight.detach()[rows]
                away = offload and part.is_cuda
                own = part.dtype == torch.float32 and not away
                shell = None if own else bare_shape(part, "cpu" if away else part.device)
                whole = rows.start == 0 and rows.stop == len(weight)
                title = name if whole else f"{name}[{rows.start}:{rows.stop}]"
                parts.append((title, weight, rows, Parameter(part if shell is None else shell), shell))
        optimizers = build_apart(config, [(title, master) for title, _, _, master, _ in parts])
        self.shelf, self.shelved = shelf if offload else None, set[int]()
        self.spaces = dict[tuple[str, torch.device], Tensor]()
        self.largest = max((master.numel() for *_, master, _ in parts), default=0)
        self.of: defaultdict[Parameter, list[Portion]] = defaultdict(list)
        for number, (title, weight, rows, master, shell) in enumerate(parts):
            self.of[weight].append(Portion(title, rows, master, shell, number, optimizers[master]))
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
            if portion.shell is not None:
                master.data = self.space("weights", part.shape, master.device).copy_(part)
            master.grad = self.wide(weight.grad[portion.rows], master.device)
            for optimizer in portion.optimizers:
                optimizer.step()
                if self.shelf is not None:
                    put_away(optimizer, self.shelf, self.shelved)
            master.grad = None
            if portion.shell is not None:
                if part.dtype != master.dtype:
                    round_into(part, master.detach(), seed_for(seed, portion.number))
                else:
                    part.copy_(master)
                master.data = portion.shell

    def wide(self, gradient: Tensor, device: torch.device) -> Tensor:
        """Itself where it is in float32 there, else a copy."""
        if gradient.dtype == torch.float32 and gradient.device == device:
            return gradient
        return self.space("gradient", gradient.shape, device).copy_(gradient)

    def space(self, use: str, shape: torch.Size, device: torch.device) -> Tensor:
        """To put something in for a step; what is not large is there for the next one too, as to find and to give back
        memory takes longer than to step."""
        if shape.numel() > ROWS:
            return torch.empty(shape, device=device)
        key = use, device
        if key not in self.spaces or len(self.spaces[key]) < shape.numel():
            self.spaces[key] = torch.empty(min(ROWS, self.largest), device=device)
        return self.spaces[key][: shape.numel()].view(shape)

    def release(self, x: Tensor) -> None:
        """Let go of the memory of a state that waits on the shelf, which somebody has looked at."""
        if self.shelf is not None and x.data_ptr() in self.shelved:
            self.shelf.release(x)


def bare_shape(like: Tensor, device: torch.device | str) -> Tensor:
    """A float32 tensor of this shape without memory for its numbers."""
    shell = torch.empty(like.shape, dtype=torch.float32, device=device)
    shell.untyped_storage().resize_(0)
    return shell


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
    found = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    round_into(found, x, seed)
    return found


def round_into(narrow: Tensor, x: Tensor, seed: int) -> None:
    """The same, some numbers at a time, so that next to nothing is held beside the two."""
    words, halves = x.reshape(-1).view(torch.int32), narrow.view(-1).view(torch.int16)
    bits: Callable[[int], Tensor]
    if x.device.type == "cpu":
        raw = np.random.SFC64(seed)
        bits = lambda n: torch.from_numpy(raw.random_raw(-(-n // 4)).view(np.uint16)[:n].astype(np.int32))  # noqa: E731
    else:
        rng = torch.Generator(x.device).manual_seed(seed)
        bits = lambda n: torch.randint(2**16, (n,), generator=rng, device=x.device, dtype=torch.int32)  # noqa: E731
    for some, half in zip(words.split(PIECE), halves.split(PIECE), strict=True):
        # A bfloat16 is the upper half of a float32: noise on the lower half carries over as often as it should.
        half.copy_(bits(len(some)).add_(some).bitwise_right_shift_(16))
