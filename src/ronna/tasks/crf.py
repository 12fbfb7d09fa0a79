"""A conditional random field over the tags of a sentence (Lafferty et al. 2001; Lample et al. 2016).

The probability of a sequence of tags is the softmax, over all legal sequences, of the sum of its words' scores and of
the transitions between neighbours. Sequences that the scheme forbids have none, in training as in use (Wei et al. 2021,
arXiv:2103.10682). A constant added to all scores of a word changes nothing, so that log probabilities do as well.

Legend: N sentences, W words of the longest, M words in all, K tags.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ronna.model.sequences import Sequences
from ronna.tasks.base import like_lengths
from ronna.tasks.tags import IMPOSSIBLE, Rules


class Steps(NamedTuple):
    """Scores of beginning with a tag (K,), of going from one to another (K, K), of ending with one (K,), in fp32."""

    first: Tensor
    follow: Tensor
    last: Tensor

    @classmethod
    def of(cls, transitions: Tensor, rules: Rules) -> Self:
        """The learnt transitions (K + 2, K), as a classifier has them, where the rules allow them."""

        def legal(scores: Tensor, allowed: np.ndarray) -> Tensor:
            return scores.float().where(torch.from_numpy(allowed).to(scores.device), float(IMPOSSIBLE))

        return cls(
            legal(transitions[-2], rules.first),
            legal(transitions[:-2], rules.follow),
            legal(transitions[-1], rules.last),
        )


class Chains(NamedTuple):
    """N sentences end to end, each of at least one word.

    whole: (N, 2) whether the first word begins its sentence, and the last one ends it. In a window of a longer sentence
    they do not: any tag may stand there, and there is no transition from or to it.
    """

    words: Sequences
    whole: Tensor

    def ends(self, steps: Steps) -> tuple[Tensor, Tensor]:
        """Scores (N, K) of beginning and of ending with each tag."""
        begins, ends = self.whole[:, :1], self.whole[:, 1:]
        return steps.first.where(begins, 0.0), steps.last.where(ends, 0.0)


def log_partition(scores: Tensor, chains: Chains, steps: Steps) -> Tensor:
    """The log of the sum over all legal sequences (N,), of scores (M, K) in fp32: the forward algorithm."""
    padded = chains.words.padded.spread(scores)  # (N, W, K)
    lengths = chains.words.lengths.to(scores.device)[:, None]
    first, last = chains.ends(steps)
    total = padded[:, 0] + first
    for t in range(1, padded.shape[1]):
        further = (total[:, :, None] + steps.follow).logsumexp(1) + padded[:, t]
        total = further.where(lengths > t, total)
    return (total + last).logsumexp(-1)


def path_scores(scores: Tensor, tags: Tensor, chains: Chains, steps: Steps) -> Tensor:
    """The sum (N,) of scores (M, K) and transitions along the tags (M,)."""
    words = chains.words
    first, last = chains.ends(steps)
    inside = words.positions[1:] > 0
    total = scores.gather(1, tags[:, None])[:, 0]
    total = total + torch.cat([total.new_zeros(1), steps.follow[tags[:-1], tags[1:]].where(inside, 0.0)])
    ends = first.gather(1, tags[words.starts, None]) + last.gather(1, tags[words.last, None])
    return ends[:, 0].index_add(0, words.owner, total)


def negative_log_likelihood(scores: Tensor, tags: Tensor, chains: Chains, steps: Steps) -> Tensor:
    """Of each sentence's tags, which must be legal: (N,)."""
    return log_partition(scores, chains, steps) - path_scores(scores, tags, chains, steps)


def marginals(scores: Tensor, chains: Chains, steps: Steps) -> Tensor:
    """The probability (M, K) of each tag at each word: the derivative of the log partition by its score."""
    with torch.inference_mode(False), torch.enable_grad():
        inputs = scores.clone().requires_grad_()
        fixed = Steps(*(s.clone() for s in steps))
        (found,) = torch.autograd.grad(log_partition(inputs, chains, fixed).sum(), inputs)
    return found


def batched(scores: Sequence[np.ndarray], words: int = 8192) -> Iterator[tuple[list[int], Tensor, Chains]]:
    """Whole sentences of some words, those of like length together: which they are, their scores (M, K), and chains."""
    filled = [i for i, s in enumerate(scores) if len(s)]
    for some in like_lengths([len(scores[i]) for i in filled], words):
        indices = [filled[i] for i in some]
        lengths = [len(scores[i]) for i in indices]
        chains = Chains(Sequences.of(lengths), torch.ones(len(lengths), 2, dtype=torch.bool))
        yield indices, torch.from_numpy(np.concatenate([scores[i] for i in indices])), chains
