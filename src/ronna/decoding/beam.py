"""Beam search: the likeliest sequence instead of the likeliest next token.

Legend: B prompts, K beams, M candidates a step, N tokens generated, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ronna.decoding.batch import Batch
from ronna.decoding.sampling import GenerateConfig, penalise

NEVER = float("-inf")


@dataclass
class Hypotheses:
    """The K best finished sequences of each prompt; empty places have `ended` False."""

    tokens: Tensor  # (B, K, N), -1 behind the end
    scores: Tensor  # (B, K) sum of log-probabilities / tokens ** length_penalty, best first
    ended: Tensor  # (B, K)

    @classmethod
    def none(cls, prompts: int, beams: int, device: torch.device) -> "Hypotheses":
        return cls(
            torch.full((prompts, beams, 0), -1, device=device),
            torch.full((prompts, beams), NEVER, device=device),
            torch.zeros(prompts, beams, dtype=torch.bool, device=device),
        )

    def add(self, tokens: Tensor, scores: Tensor, ended: Tensor) -> "Hypotheses":
        """The best K of these and M more: tokens (B, M, N + 1), scores and ended (B, M)."""
        beams = self.scores.shape[1]
        scores, best = torch.cat([self.scores, scores.masked_fill(~ended, NEVER)], 1).topk(beams)
        tokens = torch.cat([F.pad(self.tokens, (0, 1), value=-1), tokens], 1)
        return Hypotheses(take(tokens, best), scores, take(torch.cat([self.ended, ended], 1), best))

    def select(self, prompts: Tensor) -> "Hypotheses":
        return Hypotheses(self.tokens[prompts], self.scores[prompts], self.ended[prompts])


def take(values: Tensor, places: Tensor) -> Tensor:
    """values (B, M, ...) at places (B, K) -> (B, K, ...)."""
    return values[torch.arange(len(values), device=values.device)[:, None], places]


def settled(found: Hypotheses, running: Tensor, length: int, limits: Tensor, config: GenerateConfig) -> Tensor:
    """(B,) whether a prompt needs no further search, by the three rules of `transformers`' early_stopping.

    running (B,): the best score of an open beam; length: its tokens; limits (B,): the most it may get.
    """
    patient = config.early_stopping == "never" and config.length_penalty > 0
    longest = limits if patient else torch.full_like(limits, length)
    attainable = running / longest.float() ** config.length_penalty
    full = found.ended.all(1)
    done = (full & (attainable <= found.scores.amin(1))) | (length >= limits) | (running == NEVER)
    return done | full if config.early_stopping is True else done


def beam_search(batch: Batch, config: GenerateConfig, eos: Tensor, limits: Tensor) -> list[tuple[list[int], float]]:
    """For each sequence of `batch` the best continuation, its closing end token included, and its score.

    eos (E,): tokens that end a sequence; limits (B,): the most tokens each may get. The same sequences and
    scores as `transformers.generate(num_beams=K)` gives.
    """
    beams, device = config.beams, limits.device
    results: list[tuple[list[int], float]] = [([], 0.0)] * len(batch)
    prompts = torch.arange(len(batch), device=device)
    found = Hypotheses.none(len(batch), beams, device)
    logits = batch.logits().repeat_interleave(beams, 0)
    batch.select(prompts.repeat_interleave(beams))
    # All beams of a prompt are still the same, so only the first may be continued.
    running = torch.tensor([0.0] + [NEVER] * (beams - 1), device=device).repeat(len(prompts), 1)
    grown = torch.full((len(prompts), beams, 0), -1, device=device)
    while True:
        log_p = penalise(logits.log_softmax(-1), batch.tokens, batch.lengths, config)
        vocab = log_p.shape[1]
        reached = (running[:, :, None] + log_p.unflatten(0, (-1, beams))).flatten(1)
        # Enough candidates that K can go on even if every beam likes each end token best.
        wanted = min(max(2, 1 + len(eos)) * beams, beams * vocab)
        scores, index = reached.topk(wanted)
        parents, tokens = index // vocab, index % vocab
        candidates = torch.cat([take(grown, parents), tokens[..., None]], 2)
        length = candidates.shape[2]
        ends = torch.isin(tokens, eos) | (length >= limits)[:, None]
        leading = torch.arange(wanted, device=device) < beams
        found = found.add(candidates, scores / length**config.length_penalty, ends & leading)
        running, order = scores.masked_fill(ends, NEVER).topk(beams)
        grown, parents, tokens = take(candidates, order), take(parents, order), take(tokens, order)
        done = settled(found, running[:, 0], length, limits, config)
        if done.any():
            best = zip(found.tokens[done, 0].tolist(), found.scores[done, 0].tolist(), strict=True)
            for prompt, (sequence, score) in zip(prompts[done].tolist(), best, strict=True):
                results[prompt] = [token for token in sequence if token >= 0], score
        rows = (torch.arange(len(done), device=device)[:, None] * beams + parents)[~done].flatten()
        if not len(rows):
            return results
        keep = (~done).nonzero()[:, 0]
        (batch.select if len(keep) < len(done) else batch.reorder)(rows)
        prompts, limits, running, grown = prompts[keep], limits[keep], running[keep], grown[keep]
        found = found.select(keep)
        batch.append(tokens[keep].flatten())
        logits = batch.logits()
