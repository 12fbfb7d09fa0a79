"""Optimizers: what to build from a config, their state as named tensors, and gradient clipping."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from itertools import pairwise
from typing import Annotated, Any, Literal, Self, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Parameter
from torch.optim import Optimizer

from ronna.base.errors import RonnaError
from ronna.model.boxes import in_parts, local, whole
from ronna.parallel.world import ENDS
from ronna.train.lean import SMALL, AdamW8bit, Apollo, ApolloOptimizer, ByTensor, EightBitAdamW
from ronna.train.muon import MuonOptimizer
from ronna.train.rates import Rated, by_factor

Decay = Annotated[float, Field(ge=0.0)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]
NamedParameters = Iterable[tuple[str, Parameter]]
AnyTensor = TypeVar("AnyTensor", bound=Tensor)

# Marks a parameter that had no state when it was saved, so that a lost one is never taken for it.
_STATELESS = "stateless"


class AdamW(Rated):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019); fused into one kernel where torch can."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 3e-4
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: Decay = 0.1


class Adam(Rated):
    """Adam without weight decay (Kingma & Ba 2015)."""

    kind: Literal["adam"] = "adam"
    lr: PositiveFloat = 3e-4
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


class SGD(Rated):
    """Stochastic gradient descent with momentum; its weight decay is added to the gradient, as torch does."""

    kind: Literal["sgd"] = "sgd"
    lr: PositiveFloat = 0.1
    momentum: Momentum = 0.9
    nesterov: bool = False
    weight_decay: Decay = 0.0

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class Adafactor(Rated):
    """Second moments of a matrix from its rows and columns (Shazeer & Stern 2018): state R + C, not R x C.

    Each step is relative to the size of the weights, as in the paper: `lr` is the largest relative step, cut
    to 1 / sqrt(t); an update whose root mean square is above `clip` is scaled down to it.
    """

    kind: Literal["adafactor"] = "adafactor"
    lr: PositiveFloat = 1e-2
    beta2_decay: Annotated[float, Field(le=0.0)] = -0.8
    clip: Annotated[float, Field(ge=1.0)] = 1.0
    weight_decay: Decay = 0.0


class Muon(Rated):
    """Orthogonalised momentum for the matrices inside the blocks (Jordan et al. 2024), AdamW for the rest.

    Updates are scaled to AdamW's root mean square (Liu et al. 2025, arXiv:2502.16982), so rates and decays
    found for AdamW carry over. Embeddings, heads, norms and biases take `adamw`, with its own rate.
    """

    kind: Literal["muon"] = "muon"
    lr: PositiveFloat = 3e-4
    momentum: Momentum = 0.95
    nesterov: bool = True
    steps: PositiveInt = 5  # of the Newton-Schulz iteration
    weight_decay: Decay = 0.1
    adamw: AdamW = AdamW()

    @model_validator(mode="after")
    def _rates_in_one_place(self) -> Self:
        if self.adamw.rates:
            raise ValueError("rates of parts stand beside adamw, and are for both")
        return self


WIDENED = 2**20  # numbers of a gradient that are widened at a time
OptimizerConfig = Annotated[AdamW | Adam | SGD | Adafactor | Muon | AdamW8bit | Apollo, Field(discriminator="kind")]


def build_optimizer(config: OptimizerConfig, named_parameters: NamedParameters) -> list[Optimizer]:
    """The optimizers of a model's trainable parameters: two where a kind is not for all of them, else one, and so
    many for each of the `rates`.

    Weight decay falls on matrices (two dimensions or more) only, never on norms and biases. A parameter that
    appears under several names (tied embeddings) is taken once. Each group keeps its configured rate as
    "initial_lr", for `ronna.train.schedule.set_lr`. Raises RonnaError when there is nothing to train.
    """
    trainable = _trainable(config, named_parameters)
    return [o for factor, some in by_factor(config, trainable) for o in _build(config, some, factor)]


def build_apart(config: OptimizerConfig, named_parameters: NamedParameters) -> dict[Parameter, list[Optimizer]]:
    """The same, but optimizers of its own for each parameter."""
    trainable = _trainable(config, named_parameters)
    return {p: _build(config, {p: name}, config.factor(name)) for p, name in trainable.items()}


def _trainable(config: OptimizerConfig, named_parameters: NamedParameters) -> dict[Parameter, str]:
    trainable = {p: name for p, name in _names(named_parameters).items() if p.requires_grad}
    if not trainable:
        raise RonnaError("no parameter is left to train", fix="unfreeze some, or add an adapter")
    if isinstance(config, Muon) and not any(p.ndim == 2 and _inside_block(name) for p, name in trainable.items()):
        raise RonnaError("muon found no matrix inside a block to train", fix='use kind = "adamw"')
    return trainable


def _build(config: OptimizerConfig, trainable: dict[Parameter, str], factor: float) -> list[Optimizer]:
    """One for the parameters that the kind is made for, where there are any, and AdamW for the rest. factor: of the
    rate."""
    if isinstance(config, Muon | Apollo):
        own = [p for p, name in trainable.items() if p.ndim == 2 and _inside_block(name)]
    elif isinstance(config, AdamW8bit):
        own = [p for p in trainable if p.numel() >= SMALL]
    else:
        own = list(trainable)
    taken = set(own)
    others = [p for p in trainable if p not in taken]
    optimizers = [_build_one(config, some) for some in by_mesh(own)]
    if others:
        shared = config.model_dump(include={"lr", "betas", "eps", "weight_decay"})
        rest = config.adamw if isinstance(config, Muon) else AdamW(**shared)
        optimizers += [_build_one(rest, some) for some in by_mesh(others)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"] * factor
    return optimizers


def by_mesh(tensors: Iterable[AnyTensor]) -> list[list[AnyTensor]]:
    """Tensors that lie on the same ranks together, as torch's functions of many tensors want them."""
    groups: defaultdict[DeviceMesh | None, list[AnyTensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.device_mesh if in_parts(tensor) else None].append(tensor)
    return list(groups.values())


def _build_one(config: OptimizerConfig, parameters: list[Parameter]) -> Optimizer:
    if isinstance(config, Adam):
        fused = _can_fuse(parameters)
        return torch.optim.Adam(parameters, config.lr, config.betas, config.eps, fused=fused)
    if isinstance(config, Muon):
        return MuonOptimizer(parameters, config.lr, config.momentum, config.nesterov, config.steps, config.weight_decay)
    groups = _decay_groups(parameters, config.weight_decay)
    if isinstance(config, AdamW):
        fused = _can_fuse(parameters)
        return torch.optim.AdamW(groups, config.lr, config.betas, config.eps, fused=fused)
    if isinstance(config, SGD):
        return torch.optim.SGD(groups, config.lr, config.momentum, nesterov=config.nesterov)
    if isinstance(config, AdamW8bit):
        return EightBitAdamW(groups, config.lr, config.betas, config.eps)
    if isinstance(config, Apollo):
        return ApolloOptimizer(groups, config.lr, config.betas, config.eps, config.rank, config.scope, config.refresh)
    # torch squares the first eps where it floors the second moment (giving the paper's 1e-30), but not where
    # it floors the mean of the rows; its default of 1e-7 there would swamp gradients below 3e-4.
    eps = (1e-15, 1e-3)
    return torch.optim.Adafactor(groups, config.lr, config.beta2_decay, eps, config.clip)


def _inside_block(name: str) -> bool:
    """Whether the name has a block's number, as in "decoder.blocks.3.attention.q.weight"."""
    parts = name.split(".")
    return any(a == "blocks" and b.isdigit() for a, b in pairwise(parts))


def _decay_groups(parameters: list[Parameter], weight_decay: float) -> list[dict[str, Any]]:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _can_fuse(parameters: Iterable[Parameter]) -> bool:
    return all(p.device.type in ("cpu", "cuda", "mps") for p in parameters)


def optimizer_tensors(optimizers: Iterable[Optimizer], named_parameters: NamedParameters) -> dict[str, Tensor]:
    """The state as "parameter.key" -> tensor: moments, momenta, step counters (live, not copies).

    Rates and the like are not in it: they are the config's. Named by parameter, so neither the order of the
    parameters nor their groups matter when it is loaded.
    """
    names = _names(named_parameters)
    tensors: dict[str, Tensor] = {}
    for optimizer in optimizers:
        for parameter in _parameters(optimizer):
            state = {k: v for k, v in optimizer.state.get(parameter, {}).items() if v is not None}
            state = state or {_STATELESS: torch.empty(0, dtype=torch.uint8)}
            tensors |= {f"{names[parameter]}.{key}": value for key, value in state.items()}
    return tensors


def load_optimizer_tensors(
    optimizers: Iterable[Optimizer], named_parameters: NamedParameters, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave, bit for bit; `tensors` are the optimizers' from then on.

    They are looked up one parameter after another, and twice, so that where they are read from a file an optimizer that
    puts its states elsewhere does not have them all in memory. Raises RonnaError naming every missing, unknown or
    wrongly shaped entry, before anything is changed.
    """
    names = _names(named_parameters)
    saved: defaultdict[str, list[str]] = defaultdict(list)  # keys by parameter
    for full_name in tensors:
        name, _, key = full_name.rpartition(".")
        saved[name].append(key)

    def state(name: str) -> dict[str, Tensor]:
        return {key: tensors[f"{name}.{key}"] for key in saved[name]}

    problems: list[str] = []
    loads: list[tuple[Optimizer, dict[int, str]]] = []
    stepped = set[str]()
    for optimizer in optimizers:
        stateful: dict[int, str] = {}
        for number, parameter in enumerate(_parameters(optimizer)):
            stepped.add(name := names[parameter])
            if _STATELESS not in saved[name]:
                problems += _state_problems(name, parameter, state(name), optimizer)
                stateful[number] = name
        loads.append((optimizer, stateful))
    problems += [f"unknown {name}.{key}" for name, keys in saved.items() if name not in stepped for key in keys]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if problems[8:] else "")
        fix = "resume with the model and the optimizer the checkpoint was made with"
        raise RonnaError(f"the saved optimizer state does not fit: {shown}", fix=fix)
    for optimizer, stateful in loads:
        states = {number: state(name) for number, name in stateful.items()}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": states})


def _state_problems(name: str, parameter: Parameter, state: dict[str, Tensor], optimizer: Optimizer) -> list[str]:
    shapes: dict[str, tuple[int, ...]] = {}
    if isinstance(optimizer, ByTensor):
        shapes = optimizer.shapes(parameter.shape)
    keys = set(shapes) or _state_keys(optimizer, parameter.ndim)
    problems = [f"missing {name}.{key}" for key in sorted(keys - state.keys())]
    problems += [f"unknown {name}.{key}" for key in sorted(state.keys() - keys)]
    size = tuple(parameter.shape)
    for key in sorted(state.keys() & keys):
        # As the parameter, or 1 where it is summed up: step counters, row and column moments.
        shape = tuple(state[key].shape)
        fits = len(shape) == len(size) and all(s in (1, p) for s, p in zip(shape, size, strict=True))
        if shape != shapes[key] if shapes else shape and not fits:
            problems.append(f"{name}.{key} has shape {shape} for a parameter of {size}")
    return problems


def _state_keys(optimizer: Optimizer, ndim: int) -> set[str]:
    """What the optimizer keeps for a parameter, found out by letting one like it step on a single number."""
    probe = Parameter(torch.zeros((1,) * ndim))
    probe.grad = torch.zeros_like(probe)
    make: Any = type(optimizer)
    twin = make([optimizer.param_groups[0] | {"params": [probe]}])
    twin.step()
    return {key for key, value in twin.state.get(probe, {}).items() if value is not None}


def _names(named_parameters: NamedParameters) -> dict[Parameter, str]:
    names: dict[Parameter, str] = {}
    for name, parameter in named_parameters:
        names.setdefault(parameter, name)
    return names


def _parameters(optimizer: Optimizer) -> list[Parameter]:
    """In the order in which `state_dict` numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def clip_gradients(parameters: Iterable[Parameter], max_norm: float, stages: dist.ProcessGroup | None = None) -> Tensor:
    """Scale the gradients, in place, to a total norm of at most `max_norm`; returns the norm before that.

    The norm is a 0-dimensional float32 tensor (float64 for float64 gradients) over all gradients together
    (Pascanu et al. 2013), accumulated in float32 even for bfloat16 gradients. Nothing here waits for the
    device: the caller reads the norm once, and skips the step when it is not finite. In that case the
    gradients are left as they were. `math.inf` measures without clipping. stages: ranks each of which has other blocks.
    """
    found = [p.grad for p in parameters if p.grad is not None]
    gradients = [g.values() if g.is_sparse else g for g in found]  # of a sparse one, coalesced, the rows it has
    if not gradients and stages is None:
        return torch.zeros(())
    dtype = reduce(torch.promote_types, {g.dtype for g in gradients}, torch.float32)
    if stages is None:
        totals = [_total_norm(some, dtype) for some in by_mesh(gradients)]
    else:
        totals = _norms_of_stages(gradients, dtype, stages)
    total = totals[0] if len(totals) == 1 else torch.linalg.vector_norm(torch.stack(totals))
    if total.device.type == "cpu" and not max_norm < float(total) < math.inf:
        return total  # nothing to scale, and on a CPU looking costs less than a pass over the gradients
    scale = scaled_to(total, max_norm)
    by_device: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
    for gradient in map(local, gradients):
        by_device[gradient.device].append(gradient)
    for device, group in by_device.items():
        torch._foreach_mul_(group, scale.to(device))
    return total


def _norms_of_stages(gradients: list[Tensor], dtype: torch.dtype, stages: dist.ProcessGroup) -> list[Tensor]:
    """Of what lies in shards over all stages, and of the blocks of all of them."""
    apart = [g for g in gradients if in_parts(g) and ENDS not in (g.device_mesh.mesh_dim_names or ())]
    common = [g for g in gradients if in_parts(g) and ENDS in (g.device_mesh.mesh_dim_names or ())]
    own = [_total_norm(some, dtype) for some in by_mesh(apart)]
    device = local(gradients[0]).device if gradients else torch.device("cpu")
    squares = sum((norm**2 for norm in own), torch.zeros((), dtype=dtype, device=device))
    dist.all_reduce(squares, group=stages)
    return [squares.sqrt(), *(_total_norm(some, dtype) for some in by_mesh(common))]


def _total_norm(gradients: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Of gradients that lie on the same ranks."""
    if any(g.dtype != dtype for g in gradients) and gradients[0].device.type == "cpu":
        norms = tuple(norm_of(g) for g in gradients)
    else:
        norms = torch._foreach_norm(list(gradients), 2.0, dtype=dtype)
    return whole(torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])))


def norm_of(gradient: Tensor) -> Tensor:
    """In float32, () on its device; of a shard, of what lies here. A CPU would widen all of what is narrow first, so it
    is asked for in pieces."""
    gradient = local(gradient)
    if gradient.dtype == torch.float32 or gradient.device.type != "cpu":
        return torch.linalg.vector_norm(gradient, dtype=torch.float32)
    pieces = gradient.reshape(-1).split(WIDENED)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p, dtype=torch.float32) for p in pieces]))


def scaled_to(norm: Tensor, max_norm: float) -> Tensor:
    """What to multiply gradients of this norm by: at most 1, and 1 where the norm is not finite."""
    # A norm of 0 clips nothing; without this an infinite norm would turn the gradients into zeros and NaN.
    return (max_norm / (torch.where(norm.isfinite(), norm, 0.0) + 1e-6)).clamp(max=1.0)
