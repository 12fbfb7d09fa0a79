"""New weights, drawn parameter by parameter from (seed, name), so that no order, device or mesh changes them."""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ronna.model.boxes import in_parts, put
from ronna.model.config import Model
from ronna.model.layers import block_linears
from ronna.model.transformer import Transformer

EMBEDDINGS = ("embedding.tokens", "embedding.positions", "embedding.segments")
INTO_RESIDUAL = ("attention.out", "cross.out", "ffn.down")


def generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


Allot = Callable[[Transformer], None]  # gives the parameters of a model, which have none yet, their memory


def on_cpu(model: Transformer) -> None:
    for module in model.modules():  # as `to_empty` does, which would import sympy
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="cpu"), p.requires_grad))
    model.tie()


def build(cfg: Model, seed: int, matrices: torch.dtype = torch.float32, allot: Allot = on_cpu) -> Transformer:
    """A freshly initialised model, its matrices in the given precision, all else in fp32."""
    with torch.device("meta"):
        model = Transformer(cfg)
    hold(model, matrices)
    allot(model)
    initialise(model, seed)
    return model


def hold(model: Transformer, matrices: torch.dtype) -> None:
    """Hold what has two dimensions in this precision; norms and biases, which are few, stay as they are."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data = parameter.data.to(matrices)
    model.tie()


def hold_maps(model: Transformer, matrices: torch.dtype) -> None:
    """Hold the weights of the linear maps of the blocks, which compute in the precision of their input, in this one."""
    for _, linear in block_linears(model):
        linear.weight.data = linear.weight.data.to(matrices)


@torch.no_grad()
def initialise(model: Transformer, seed: int, only: set[str] | None = None) -> None:
    """Draw every parameter (or those named in `only`) as the model's `Init` says."""
    depth = sum(len(s.blocks) for s in (model.cfg.encoder, model.cfg.decoder) if s)
    for name, parameter in model.named_parameters():
        if only is None or name in only:
            apart = in_parts(parameter) or parameter.dtype != torch.float32
            whole = torch.empty(parameter.shape, dtype=torch.float32) if apart else parameter
            draw(name, whole, model.cfg, depth, generator(seed, name))
            put(parameter, whole)


def draw(name: str, p: Tensor, cfg: Model, depth: int, rng: torch.Generator) -> None:
    stem, leaf = name.rsplit(".", 1)
    if leaf == "bias":
        p.zero_()
    elif p.ndim == 1:
        p.fill_(1.0)
    elif cfg.init.scheme == "xavier" and not stem.startswith(EMBEDDINGS):
        nn.init.xavier_uniform_(p, generator=rng)
    else:
        p.normal_(0.0, spread(stem, p, cfg, depth), generator=rng)


def spread(stem: str, p: Tensor, cfg: Model, depth: int) -> float:
    """Standard deviation of a matrix under the model's scheme."""
    match cfg.init.scheme:
        case "residual" if stem.endswith(INTO_RESIDUAL):
            return cfg.init.std / math.sqrt(2 * depth)
        case "xavier":
            return cfg.dim**-0.5
        case "fan_in":
            return fan_in(stem, p, cfg)
    return cfg.init.std


def fan_in(stem: str, p: Tensor, cfg: Model) -> float:
    """T5: unit embeddings; the query also carries the 1/sqrt(D) that its attention leaves out."""
    if stem.startswith("embedding.") or stem.endswith("head.logits"):
        return 1.0 if stem.startswith("embedding.") else cfg.dim**-0.5
    if stem.endswith("bias.table"):
        return cfg.dim**-0.5
    if stem.endswith((".attention.q", ".cross.q")):
        return (cfg.dim * cfg.last.blocks[0].attention.head_dim) ** -0.5
    return p.shape[-1] ** -0.5
