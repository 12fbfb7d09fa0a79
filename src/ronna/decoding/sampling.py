"""From logits to the next token: how to generate, as data, and the filters and draws that follow it.

Legend: B sequences, V vocabulary, L columns of the tokens so far.
"""

from typing import Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from ronna.base.config import Config
from ronna.base.device import seed_for

# Below this a temperature can only mean greedy, and dividing by it could leave fp32's range.
COLD = 1e-5


class GenerateConfig(Config):
    """How to continue a prompt. Each value means what it means in `transformers`.

    Scores of beams are sums of log-probabilities / tokens ** length_penalty. Temperature 0
    takes the likeliest token and leaves top_k, top_p, min_p and seed without effect; beams above 1 search for
    the likeliest sequence, and so refuse a temperature and stop strings.
    """

    max_tokens: int | None = Field(default=None, ge=1, le=2**20)  # None: up to 256, less where the model is short
    temperature: float = Field(default=0.0, ge=0.0, le=100.0)
    top_k: int = Field(default=0, ge=0)  # 0: all
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0)
    no_repeat_ngram: int = Field(default=0, ge=0)  # 0: repeat freely
    beams: int = Field(default=1, ge=1, le=256)
    length_penalty: float = Field(default=1.0, ge=-5.0, le=5.0)
    early_stopping: bool | Literal["never"] = False
    seed: int = Field(default=0, ge=0, lt=2**63)
    stop: tuple[str, ...] = ()

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("an empty stop string stands everywhere; leave it out")
        return stop

    @model_validator(mode="after")
    def _beams_are_exact(self) -> "GenerateConfig":
        if self.beams > 1 and self.temperature >= COLD:
            raise ValueError("beam search draws nothing: set temperature = 0 or beams = 1")
        if self.beams > 1 and self.stop:
            raise ValueError("beam search does not look at text: set beams = 1 or leave stop out")
        return self


def penalise(scores: Tensor, tokens: Tensor, lengths: Tensor, config: GenerateConfig) -> Tensor:
    """Scores (B, V) fp32 with repetition made less likely or impossible.

    tokens (B, L): the sequences so far, -1 behind their ends; lengths (B,). The penalty is CTRL's (Keskar et
    al. 2019, section 4.1), prompt included; blocked n-grams are those of Paulus et al. 2017, section 2.5. A
    sequence whose every token is blocked is left as it is.
    """
    if config.repetition_penalty != 1.0:
        penalty = config.repetition_penalty
        worse = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores = torch.where(_marked(tokens, scores), worse, scores)
    if 0 < config.no_repeat_ngram <= tokens.shape[1]:
        repeats = _marked(_repeats(tokens, lengths, config.no_repeat_ngram), scores)
        scores = scores.masked_fill(repeats & ~repeats.all(-1, keepdim=True), float("-inf"))
    return scores


def _marked(tokens: Tensor, scores: Tensor) -> Tensor:
    """Bool (B, V), True at the tokens (B, N) named; -1 names none."""
    vocab = scores.shape[1]
    marks = torch.zeros(len(scores), vocab + 1, dtype=torch.bool, device=scores.device)
    return marks.scatter_(1, torch.where(tokens < 0, vocab, tokens), True)[:, :vocab]


def _repeats(tokens: Tensor, lengths: Tensor, n: int) -> Tensor:
    """(B, N) what followed each earlier occurrence of a sequence's last n - 1 tokens, -1 elsewhere."""
    windows = tokens.unfold(1, n, 1)
    suffix = lengths[:, None] + torch.arange(1 - n, 0, device=tokens.device)
    again = (windows[..., :-1] == tokens.gather(1, suffix.clamp(min=0))[:, None]).all(-1)
    return windows[..., -1].masked_fill(~again, -1)


def warp(scores: Tensor, config: GenerateConfig) -> Tensor:
    """Scores (B, V) fp32 after temperature, top-k, top-p and min-p, in this order; -inf where a token is out.

    Top-p is nucleus sampling (Holtzman et al. 2020), min-p Nguyen et al. 2024.
    """
    out = float("-inf")
    scores = scores / config.temperature
    if 0 < config.top_k < scores.shape[1]:
        least = scores.topk(config.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, out)
    if config.top_p < 1.0:
        ranked, order = scores.sort()
        tail = ranked.softmax(-1).cumsum(-1) <= 1 - config.top_p
        tail[:, -1] = False
        scores = scores.masked_fill(tail.scatter(1, order, tail), out)
    if config.min_p > 0.0:
        p = scores.softmax(-1)
        scores = scores.masked_fill(p < config.min_p * p.amax(-1, keepdim=True), out)
    return scores


def draw_keys(seed: int, indices: list[int]) -> np.ndarray:
    """(B,) uint64: what a sequence draws depends on the seed and its own index, not on its neighbours."""
    return np.array([seed_for(seed, index) for index in indices], dtype=np.uint64)


def uniforms(keys: np.ndarray, step: int) -> np.ndarray:
    """(B,) float64 in (0, 1], a function of key and step alone (SplitMix64, Steele et al. 2014)."""
    z = keys + np.uint64((step + 1) * 0x9E3779B97F4A7C15 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return ((z >> np.uint64(11)) + np.uint64(1)) * 2.0**-53


def choose(scores: Tensor, config: GenerateConfig, keys: np.ndarray, step: int) -> Tensor:
    """Next tokens (B,) from penalised scores (B, V) fp32: the likeliest, or drawn at `config.temperature`."""
    if config.temperature < COLD:
        return scores.argmax(-1)
    # Summing a large vocabulary needs more than fp32; mps has no more.
    wide = torch.float32 if scores.device.type == "mps" else torch.float64
    ladder = warp(scores, config).softmax(-1).to(wide).cumsum(-1)
    height = torch.from_numpy(uniforms(keys, step)).to(scores.device, wide)[:, None]
    # Heights lie in (0, 1], so the first rung at or above one has a probability above zero.
    return torch.searchsorted(ladder, height * ladder[:, -1:])[:, 0]
