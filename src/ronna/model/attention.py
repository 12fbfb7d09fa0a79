"""How tokens read each other: the kernel a device likes, rotary positions, relative bias, the cache of decoding.

Only this file knows that some kernels want rectangles. Everything here takes and returns flat tokens.

Legend: T tokens, B sequences, R rows and L columns of a view, H heads, K key/value heads, D head size, n keys of a
prefix.
"""

import math
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ronna.model import config as c
from ronna.model.boxes import local
from ronna.model.group import Group
from ronna.model.layers import Linear, Table, make_norm, merged
from ronna.model.layers import dropout as drop
from ronna.model.sequences import Reads, Sequences, View

# On a CPU the flash kernel's backward pass loses against plain products up to about this length.
WRITTEN_OUT = 512


def rotary_angles(cfg: c.Rotary, dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, D/2) in fp32 of position * theta ** (-2i / D), scaled as the config says."""
    freqs = cfg.theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    match cfg.scaling:
        case c.LinearScaling(factor):
            freqs = freqs / factor
        case c.Llama3Scaling(factor, low, high, original):
            turns = original * freqs / (2 * math.pi)
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            freqs = freqs * (keep + (1 - keep) / factor)
    angle = positions.float()[:, None] * freqs
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x (T, H, D): each pair (i, i + D/2) turns by its angle."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def placed(q: Tensor, k: Tensor, angles: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    return (q, k) if angles is None else (rotate(q, *angles), rotate(k, *angles))


class RelativeBias(nn.Module):
    """T5's bias of the attention scores by distance (Raffel et al. 2020, section 2.1)."""

    def __init__(self, cfg: c.RelativeBias, heads: int, causal: bool):
        super().__init__()
        self.cfg, self.causal = cfg, causal
        self.group = Group()  # of the ranks that share the heads
        self.table = Table(cfg.buckets, heads)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Positions (R, Lq) and (R, Lk) -> bias (R, H, Lq, Lk)."""
        buckets = self.bucket(keys[:, None, :] - queries[:, :, None])
        return F.embedding(buckets, self.group.channels(local(self.table.weight))).permute(0, 3, 1, 2)

    def bucket(self, offset: Tensor) -> Tensor:
        """Half of the buckets for exact small distances, half growing with the logarithm of the distance."""
        n, base = self.cfg.buckets, torch.zeros_like(offset)
        if self.causal:
            distance = (-offset).clamp(min=0)
        else:
            n //= 2
            base, distance = (offset > 0).long() * n, offset.abs()
        exact = n // 2
        growth = (distance.clamp(min=1).float() / exact).log() / math.log(self.cfg.max_distance / exact)
        far = exact + (growth * (n - exact)).long()
        return base + torch.where(distance < exact, distance, far.clamp(max=n - 1))


class Prefix(NamedTuple):
    """Keys and values (n, K, D) that stand before those of every sequence, as if of n tokens already read."""

    keys: Tensor
    values: Tensor

    def shared(self, group: Group) -> "Prefix":
        """Of the heads that this rank has."""
        return Prefix(*(group.channels(t.mT).mT for t in self))

    def before(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(R, L, K, D) each -> (R, n + L, K, D)."""
        keys, values = (t.to(k.dtype).expand(len(k), *t.shape) for t in self)
        return torch.cat([keys, k], dim=1), torch.cat([values, v], dim=1)


class LayerCache:
    """Keys and values that one layer has already computed, (B, L, K, D), grown by doubling."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.memory: tuple[Tensor, Tensor] | None = None  # of the encoder's states, flat

    def extend(self, k: Tensor, v: Tensor, sequences: Sequences, prefix: Prefix | None) -> tuple[Tensor, Tensor]:
        """Put flat k, v (T, K, D) at their places; return all (B, L, K, D), right padded, those of a prefix first."""
        need = sequences.reach
        if self.keys is None or self.values is None:
            room = (len(sequences), max(64, need), *k.shape[1:])
            self.keys, self.values = k.new_zeros(room), v.new_zeros(room)
            if prefix is not None:
                self.keys[:, : len(prefix.keys)] = prefix.keys
                self.values[:, : len(prefix.keys)] = prefix.values
        while self.keys.shape[1] < need:
            self.keys = torch.cat([self.keys, torch.zeros_like(self.keys)], dim=1)
            self.values = torch.cat([self.values, torch.zeros_like(self.values)], dim=1)
        self.keys[sequences.owner, sequences.positions] = k
        self.values[sequences.owner, sequences.positions] = v
        return self.keys[:, :need], self.values[:, :need]

    def select(self, rows: Tensor) -> None:
        """Keep the given sequences, in this order (beam search, finished sequences)."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, cfg: c.Attention, *, mask: Tensor | None, causal: bool, dropout: float
) -> Tensor:
    """(R, L, H, D) each -> (R, L, H, D), through PyTorch's rectangular kernels."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type == "cpu" and (dropout or (q.requires_grad and k.shape[2] <= WRITTEN_OUT)):
        return written_out(q, k, v, cfg, mask=mask, causal=causal, rate=dropout).transpose(1, 2)
    y = F.scaled_dot_product_attention(
        q,
        k,
        v,
        mask,
        dropout,
        is_causal=causal and mask is None,
        scale=cfg.scale,
        enable_gqa=k.shape[1] != q.shape[1],
    )
    return y.transpose(1, 2)


def written_out(
    q: Tensor, k: Tensor, v: Tensor, cfg: c.Attention, *, mask: Tensor | None, causal: bool, rate: float
) -> Tensor:
    """Attention over (R, H, L, D) as its formula says: for short rows and with dropout the fastest on a CPU."""
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    if mask is None and causal:
        mask = no_later(q.shape[-2], k.shape[-2], q.device)
    scores = (q * (cfg.head_dim**-0.5 if cfg.scale is None else cfg.scale)) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return drop(scores.softmax(-1), rate, training=rate > 0) @ v


def no_later(queries: int, keys: int, device: torch.device) -> Tensor:
    """(Lq, Lk), True where a query may look: the last query sees every key, each one before it one key less."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def with_bias(mask: Tensor | None, bias: Tensor, causal: bool) -> Tensor:
    """One additive mask out of a boolean one (or bare causality) and a bias (R, H, Lq, Lk)."""
    if mask is None and causal:
        mask = no_later(bias.shape[-2], bias.shape[-1], bias.device)
    return bias if mask is None else bias.masked_fill(~mask, float("-inf"))


def has_varlen(q: Tensor, bias: RelativeBias | None, dropout: float) -> bool:
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and bias is None and dropout == 0.0


def fills_rectangle(sequences: Sequences, window: int | None) -> bool:
    """Whether no token is beside another text's or out of a window: then kernels for rectangles do it, and on Hopper
    cuDNN's, which torch takes there, are nearly twice as fast as those for variable lengths."""
    n = sequences.longest
    return sequences.tokens == len(sequences) * n and (window is None or window >= n - 1)


def varlen(q: Tensor, k: Tensor, v: Tensor, cfg: c.Attention, sequences: Sequences, *, causal: bool) -> Tensor:
    """Flat (T, H, D) through the variable-length flash kernel."""
    from torch.nn.attention.varlen import varlen_attn

    side = -1 if cfg.window is None else cfg.window
    bounds, longest = sequences.bounds, sequences.longest
    # Its kernel always took fewer heads of keys; torch 2.12 wants to be told that this is meant.
    more: dict[str, Any] = (
        {"enable_gqa": k.shape[1] != q.shape[1]} if "enable_gqa" in signature(varlen_attn).parameters else {}
    )
    y = varlen_attn(
        q, k, v, bounds, bounds, longest, longest,
        scale=cfg.scale, window_size=(side, 0 if causal else side), **more,
    )  # fmt: skip
    assert isinstance(y, Tensor)
    return y


class Attention(nn.Module):
    """Multi-head attention with grouped keys, from a sequence to itself or to an encoder's states."""

    def __init__(self, cfg: c.Attention, dim: int, causal: bool):
        super().__init__()
        self.cfg, self.causal = cfg, causal
        self.group = Group()  # of the ranks that divide the rows of x
        self.q = Linear(dim, cfg.heads * cfg.head_dim, bias=cfg.bias)
        self.k = Linear(dim, cfg.kv * cfg.head_dim, bias=cfg.bias)
        self.v = Linear(dim, cfg.kv * cfg.head_dim, bias=cfg.bias)
        self.out = Linear(cfg.heads * cfg.head_dim, dim, bias=cfg.out_bias)
        self.q_norm = make_norm(cfg.qk_norm, cfg.head_dim)
        self.k_norm = make_norm(cfg.qk_norm, cfg.head_dim)

    @property
    def rate(self) -> float:
        return self.cfg.dropout if self.training else 0.0

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.cfg.head_dim))  # (T, H, D)

    def angles(self, sequences: Sequences) -> tuple[Tensor, Tensor] | None:
        """Of the rotary positions, where it has some."""
        rotary, size = self.cfg.rotary, self.cfg.head_dim
        if rotary is None:
            return None
        found: tuple[Tensor, Tensor] = sequences.memo(rotary, lambda: rotary_angles(rotary, size, sequences.positions))
        return found

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sequences: Sequences,
        bias: RelativeBias | None,
        cache: LayerCache | None,
        prefix: Prefix | None,
    ) -> Tensor:
        """What each token takes from those it sees, (T, H, D) each -> (T, H D).

        With a prefix the positions of `sequences` begin behind it, and the layer must have no window.
        """
        prefix = None if prefix is None else prefix.shared(self.group)
        if cache is not None:
            y = self.attend_cached(q, k, v, sequences, bias, cache, prefix)
        elif prefix is None and has_varlen(q, bias, self.rate) and not fills_rectangle(sequences, self.cfg.window):
            y = varlen(q, k, v, self.cfg, sequences, causal=self.causal)
        else:
            y = self.attend(q, k, v, sequences, bias, prefix)
        return y.flatten(-2)

    def close(self, y: Tensor) -> Tensor:
        """(rows, H D) -> (rows, C)."""
        return self.out(self.group.rows(y))

    def project(self, x: Tensor, tokens: int, angles: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (T, H or K, D) of the first T rows, with their norms and rotary positions."""
        maps = self.group.heads(self.cfg.head_dim, *merged(x, self.q, self.k, self.v))
        q, k, v = (self.split(y[:tokens]) for y in maps)
        return *placed(self.q_norm(q), self.k_norm(k), angles), v

    def project_read(
        self, x: Tensor, tokens: int, angles: tuple[Tensor, Tensor] | None, reads: Reads
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same with queries of zeros where nobody reads: scores are computed for every token even then, and what is
        saved are the products that grow with C squared."""
        few = self.group.split(reads.pick(self.group.join(x)))
        (q,) = self.group.heads(self.cfg.head_dim, self.q(few))
        q = self.q_norm(self.split(q))
        maps = self.group.heads(self.cfg.head_dim, *merged(x, self.k, self.v))
        k, v = (self.split(y[:tokens]) for y in maps)
        return *placed(reads.spread(q), self.k_norm(k), angles), v

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sequences: Sequences,
        bias: RelativeBias | None,
        prefix: Prefix | None,
    ) -> Tensor:
        view, ahead = sequences.packed, 0 if prefix is None else len(prefix.keys)
        mask = sequences.mask(view, causal=self.causal, window=self.cfg.window)
        if ahead:
            bare = mask
            mask = sequences.memo(("ahead", self.causal), lambda: seen_ahead(bare, view, ahead, self.causal))
        if bias is not None:
            mask = with_bias(mask, relative(bias, sequences, q.dtype, ahead), self.causal)
        q, k, v = view.spread(q), view.spread(k), view.spread(v)
        if prefix is not None:
            k, v = prefix.before(k, v)
        return view.gather(sdpa(q, k, v, self.cfg, mask=mask, causal=self.causal, dropout=self.rate))

    def attend_cached(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sequences: Sequences,
        bias: RelativeBias | None,
        cache: LayerCache,
        prefix: Prefix | None,
    ) -> Tensor:
        keys, values = cache.extend(k, v, sequences, prefix)
        view = sequences.padded
        place = torch.arange(keys.shape[1], device=q.device)
        distance = view.position[:, :, None] - place  # (B, L, keys)
        mask = (distance >= 0)[:, None]
        if self.cfg.window is not None:
            mask = mask & (distance <= self.cfg.window)[:, None]
        if bias is not None:
            mask = with_bias(mask, bias(view.position, place.expand(len(sequences), -1)).to(q.dtype), causal=False)
        y = sdpa(view.spread(q), keys, values, self.cfg, mask=mask, causal=False, dropout=0.0)
        return view.gather(y)

    def cross(
        self,
        x: Tensor,
        sequences: Sequences,
        memory: Tensor,
        source: Sequences,
        cache: LayerCache | None = None,
        reads: Reads | None = None,
    ) -> Tensor:
        """Sequence i of x (rows, C) reads sequence i of the encoder's states (S, C); x may be what `reads` picks."""
        (q,) = self.group.heads(self.cfg.head_dim, self.q(x))
        q = self.q_norm(self.split(q))
        q = q[: sequences.tokens] if reads is None else reads.spread(q)
        if cache is not None and cache.memory is not None:
            k, v = cache.memory
        else:
            maps = self.group.heads(self.cfg.head_dim, *merged(self.group.split(source.widen(memory)), self.k, self.v))
            k, v = (self.split(y[: source.tokens]) for y in maps)
            k = self.k_norm(k)
            if cache is not None:
                cache.memory = (k, v)
        rows, columns = sequences.padded, source.padded
        mask = None if columns.slots is None else (columns.sequence >= 0)[:, None, None, :]
        y = sdpa(
            rows.spread(q), columns.spread(k), columns.spread(v), self.cfg,
            mask=mask, causal=False, dropout=self.rate,
        )  # fmt: skip
        y = rows.gather(y).flatten(-2)
        return self.close(sequences.widen(y) if reads is None else reads.pick(y))


def relative(bias: RelativeBias, sequences: Sequences, dtype: torch.dtype, ahead: int) -> Tensor:
    """The bias of the packed view and what stands before each of its sequences, (R, H, L, ahead + L), or (1, ...) where
    every row counts its positions from the same start; made once for all blocks."""

    def made() -> Tensor:
        view = sequences.packed
        positions = view.position
        if view.single:
            positions = torch.arange(ahead, ahead + view.columns, device=positions.device)[None]
        before = torch.arange(ahead, device=positions.device).expand(len(positions), ahead)
        return bias(positions, torch.cat([before, positions], dim=1)).to(dtype)

    # With gradients apart: what was made without is no way back to the table.
    made_once: Tensor = sequences.memo((bias, dtype, torch.is_grad_enabled()), made)
    return made_once


def seen_ahead(mask: Tensor | None, view: View, ahead: int, causal: bool) -> Tensor | None:
    """The mask of a view (R or 1, 1, L, L) with keys in front that every cell sees, (..., L, ahead + L)."""
    if mask is None:
        return no_later(view.columns, ahead + view.columns, view.position.device) if causal else None
    return torch.cat([mask.new_ones(*mask.shape[:-1], ahead), mask], dim=-1)
