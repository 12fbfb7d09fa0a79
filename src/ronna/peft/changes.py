"""Adapters as changes of linear maps: put on, switched, stacked, merged. Names of the base's weights stay as they are.

Legend: T tokens, I inputs and O outputs of a linear map, r rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from ronna.base.errors import RonnaError
from ronna.model.fourbit import FourBitLinear
from ronna.model.layers import Linear, block_linears
from ronna.model.transformer import Transformer
from ronna.peft.own import AdaptedTransformer, adapters, at_work


class Change(nn.Module, ABC):
    """What one adapter does to one linear map."""

    @abstractmethod
    def forward(self, base: Linear, x: Tensor, y: Tensor) -> Tensor:
        """The changed output (T, O), given the map, its input (T, I) and its output as it is without this adapter."""

    def merged_weight(self, base: Linear) -> Tensor:
        """The weight (O, I), fp32, of the one linear map that does both. Raises RonnaError where there is none."""
        raise not_linear()


def not_linear() -> RonnaError:
    return RonnaError("this adapter is no linear map, so it cannot be merged", fix="keep it beside its base")


class Changed(nn.Module):
    """A module with adapters; only `attach` makes one, out of a module that is there."""

    changes: nn.ModuleDict  # every adapter, by name
    active: tuple[str, ...]  # those at work, the first one nearest to the base


class ChangedLinear(Linear, Changed):
    kept: Tensor | None = None  # the weight before a merge

    @property
    def companions(self) -> list[nn.Module]:
        return list(self.changes.values())

    def changed(self, input: Tensor, output: Tensor) -> Tensor:
        for name in self.active:
            output = self.changes[name](self, input, output)
        return output


class ChangedFourBitLinear(FourBitLinear, ChangedLinear):
    """A linear map in 4 bits with adapters."""


def change(linear: ChangedLinear, name: str) -> Change:
    found = linear.changes[name]
    assert isinstance(found, Change)
    return found


def attach(module: nn.Module, kind: type[Changed], name: str, new: nn.Module) -> None:
    """Put what an adapter does on a module, at work at once.

    kind: a class of the module's own with adapters, whose meaning of what the module does it gets.
    """
    if not isinstance(module, Changed):
        module.__class__ = kind
        module.changes, module.active = nn.ModuleDict(), ()  # type: ignore[assignment]
    assert isinstance(module, Changed)
    module.changes[name] = new.to(next(chain(module.parameters(), module.buffers())).device)
    module.active = (*module.active, name)


def attach_change(linear: Linear, name: str, new: Change) -> None:
    """`attach` of a change to a linear map, whatever its weight is held in."""
    attach(linear, ChangedFourBitLinear if isinstance(linear, FourBitLinear) else ChangedLinear, name, new)


def changed_modules(model: nn.Module) -> Iterator[tuple[str, Changed]]:
    for path, module in model.named_modules():
        if isinstance(module, Changed):
            yield path, module


def changed_linears(model: nn.Module) -> Iterator[tuple[str, ChangedLinear]]:
    for path, module in changed_modules(model):
        if isinstance(module, ChangedLinear):
            yield path, module


def activate(model: nn.Module, *names: str) -> None:
    """Let these adapters work, in this order, and no others; none is the bare base. RonnaError for an unknown one.

    Weights that they have in place of the base's, such as a classifier, are switched with them: the last one's count.
    """
    known = adapters(model)
    for name in names:
        if name not in known:
            raise RonnaError(f"no adapter {name!r}", fix=f"there are {', '.join(known) or 'none'}")
    if any(linear.kept is not None for _, linear in changed_linears(model)):
        raise RonnaError("an adapter is merged into the weights", fix="unmerge it first")
    for _, module in changed_modules(model):
        module.active = tuple(name for name in names if name in module.changes)
    if isinstance(model, AdaptedTransformer):
        model.show(*names)


@contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """The base alone inside; afterwards the adapters that were at work are at work again."""
    names = at_work(model)
    activate(model)
    try:
        yield
    finally:
        activate(model, *names)


@torch.no_grad()
def merge(model: Transformer, name: str, *, tolerance: float = 0.01) -> float:
    """Write an adapter into the base's weights, worked out in fp32; it then works without costing anything.

    Returns how far rounding to the weights' own precision moved the change, as a share of it (Frobenius norms over
    the whole model). Raises RonnaError, the weights as they were, where that is over the tolerance, as it is where
    small changes meet large bf16 weights, and for weights in 4 bits.
    """
    if name not in adapters(model):
        raise RonnaError(f"no adapter {name!r}", fix=f"there are {', '.join(adapters(model)) or 'none'}")
    found = [(path, linear) for path, linear in changed_linears(model) if name in linear.changes]
    if not found or len(found) < sum(name in module.changes for _, module in changed_modules(model)):
        raise not_linear()
    if any(linear.kept is not None or linear.active != (name,) for _, linear in found):
        raise RonnaError("only an adapter that works alone can be merged", fix=f"activate {name!r} alone, unmerged")
    if any(isinstance(linear, FourBitLinear) for _, linear in found):
        raise RonnaError("weights in 4 bits cannot take the change up", fix="open the base without quantize")
    lost = size = 0.0
    new: list[Tensor] = []
    for _, linear in found:
        before, exact = linear.weight.float(), change(linear, name).merged_weight(linear)
        new.append(exact.to(linear.weight.dtype))
        lost += float((new[-1].float() - exact).square().sum())
        size += float((exact - before).square().sum())
    error = (lost / size) ** 0.5 if size else 0.0
    if error > tolerance:
        raise RonnaError(
            f"in {str(found[0][1].weight.dtype).removeprefix('torch.')} the merged weights would miss "
            f"{error:.1%} of the change",
            fix=f"merge into fp32 weights, or accept it with a tolerance above {tolerance:g}",
        )
    for (_, linear), weight in zip(found, new, strict=True):
        linear.kept = linear.weight.detach().clone()
        linear.weight.copy_(weight)
        linear.active = ()
    return error


@torch.no_grad()
def unmerge(model: nn.Module, name: str) -> None:
    """The base's weights to the bit as before `merge`, the adapter at work beside them."""
    for _, linear in changed_linears(model):
        if linear.kept is not None and name in linear.changes:
            linear.weight.copy_(linear.kept)
            linear.kept, linear.active = None, (name,)


def adapter_parameters(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapter's own weights, under names without its own: `encoder.blocks.0.attention.q.a`."""
    for path, module in changed_modules(model):
        if name in module.changes:
            for leaf, parameter in module.changes[name].named_parameters():
                yield f"{path}.{leaf}", parameter


def targeted(model: Transformer, targets: Sequence[str]) -> list[tuple[str, Linear]]:
    """The linear maps of the blocks whose name ends in one of `targets` ("q", "ffn.up"; "all": every one).

    Raises RonnaError for a target that nothing answers to.
    """
    linears = list(block_linears(model))
    if "all" in targets:
        return linears
    found = {target: [path for path, _ in linears if f".{path}".endswith(f".{target}")] for target in targets}
    if missing := [target for target, paths in found.items() if not paths]:
        leaves = sorted({path.split(".", 3)[-1] for path, _ in linears})
        fix = f"use all, or some of {', '.join(leaves)}"
        raise RonnaError(f"no linear map is called {missing[0]}", where="peft.targets", fix=fix)
    chosen = {path for paths in found.values() for path in paths}
    return [(path, module) for path, module in linears if path in chosen]
