"""How near written texts are to what people wrote: BLEU (Papineni et al. 2002), chrF (Popović 2015), ROUGE (Lin 2004).

BLEU and chrF are as sacreBLEU (Post 2018) counts them, in points of a hundred; ROUGE is F1 between 0 and 1, of words,
or of characters where the script writes no spaces. How texts were cut stands in each score's name.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from sacrebleu.metrics.bleu import BLEU

from ronna.tasks.bootstrap import Counts, Metric, bootstrap
from ronna.tasks.metrics import Scores, mean_scores
from ronna.tasks.words import PIECE, UNSPACED, is_wordlike

Cut = Literal["13a", "zh"]
CHRF_ORDER = 6


def cut_of(texts: Sequence[str]) -> Cut:
    """How BLEU is to cut texts: "zh" where most of them have characters of a script without spaces."""
    return "zh" if 2 * sum(bool(UNSPACED.search(text)) for text in texts) > len(texts) else "13a"


def rouge_tokens(text: str) -> list[str]:
    """Lower case, each character of a script without spaces alone, others by what is no letter or digit."""
    return PIECE.findall("".join(c if is_wordlike(c) else " " for c in text.lower()))


def overlap_f1(common: int, said: int, gold: int) -> float:
    return 2 * common / (said + gold) if said + gold else 1.0


def rouge_n(said: Sequence[str], gold: Sequence[str], n: int) -> float:
    a, b = (Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for tokens in (said, gold))
    return overlap_f1((a & b).total(), a.total(), b.total()) if a or b else float(said == gold)


def rouge_l(said: Sequence[str], gold: Sequence[str]) -> float:
    return overlap_f1(longest_common(said, gold), len(said), len(gold))


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, by dynamic programming over one row (numpy does a row at a time)."""
    ids: dict[str, int] = {}
    x, y = (np.array([ids.setdefault(token, len(ids)) for token in tokens], np.int64) for tokens in (a, b))
    row = np.zeros(len(y) + 1, np.int64)
    for token in x:
        reached = np.maximum(row[1:], row[:-1] + (y == token))
        row[1:] = np.maximum.accumulate(reached)
    return int(row[-1])


ROUGE: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "rouge1": lambda said, gold: rouge_n(said, gold, 1),
    "rouge2": lambda said, gold: rouge_n(said, gold, 2),
    "rougeL": rouge_l,
}


def metric_names(cut: Cut) -> dict[str, str]:
    """Each score's name, by what users call it."""
    unit = "chars" if cut == "zh" else "words"
    return {"bleu": f"bleu_{cut}", "chrf": "chrf2", **{name.lower(): f"{name}_{unit}" for name in ROUGE}}


def text_scores(said: Sequence[str], references: Sequence[Sequence[str]], cut: Cut) -> Scores:
    """BLEU, chrF and ROUGE of N texts, each against one or more references (for ROUGE the nearest counts).

    Raises RonnaError when there is none, ValueError where one has no reference.
    """
    names = metric_names(cut)
    pairs = [(rouge_tokens(s), [rouge_tokens(r) for r in some]) for s, some in zip(said, references, strict=True)]
    rouge = {names[k.lower()]: [max(f(s, r) for r in some) for s, some in pairs] for k, f in ROUGE.items()}
    means = mean_scores(rouge)
    bleu = corpus_metrics(names["bleu"], bleu_counts(said, references, cut), bleu_of)
    chrf = corpus_metrics(names["chrf"], chrf_counts(said, references), chrf_of)
    return Scores(means.rows, {**bleu, **chrf, **means.metrics}, notes=means.notes)


def corpus_metrics(name: str, counts: np.ndarray, score: Callable[[Counts], np.ndarray]) -> dict[str, Metric]:
    """A score of summed counts (N, K) and its interval."""
    rows, times = np.unique(counts, axis=0, return_counts=True)
    metrics, _ = bootstrap(lambda drawn: {name: score(drawn @ rows)}, times)
    return metrics


def bleu_counts(said: Sequence[str], references: Sequence[Sequence[str]], cut: Cut) -> np.ndarray:
    """(N, 10): n-grams of each order that a reference has too, n-grams at all, words, the nearest reference's words."""
    bleu = BLEU(tokenize=cut, effective_order=True)  # of one sentence at a time: no warning
    found = [bleu.sentence_score(s, list(some)) for s, some in zip(said, references, strict=True)]
    return np.array([[*f.counts, *f.totals, f.sys_len, f.ref_len] for f in found], np.int64)


def bleu_of(sums: np.ndarray) -> np.ndarray:
    """(B, 10) -> (B,)."""
    rows = [[round(x) for x in row] for row in sums.tolist()]
    return np.array([BLEU.compute_bleu(r[:4], r[4:8], r[8], r[9], smooth_method="exp").score for r in rows])


def chrf_counts(said: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(N, 18): n-grams of characters for each order in the text (where the reference has any), in its best
    reference, and in both."""
    rows = []
    for text, some in zip(said, references, strict=True):
        own = character_ngrams(text)
        every = [
            [(a.total() if b else 0, b.total(), (a & b).total()) for a, b in zip(own, character_ngrams(r), strict=True)]
            for r in some
        ]
        flat = np.array(every).reshape(len(every), -1)
        rows.append(flat[chrf_of(flat.astype(np.float64)).argmax()])
    return np.array(rows, np.int64)


def character_ngrams(text: str) -> list[Counter[str]]:
    plain = "".join(text.split())
    return [Counter(plain[i : i + n] for i in range(len(plain) - n + 1)) for n in range(1, CHRF_ORDER + 1)]


def chrf_of(sums: np.ndarray) -> np.ndarray:
    """(B, 18) -> (B,): F2 of precision and recall, each on average over the orders that both texts have."""
    said, gold, common = sums.reshape(len(sums), CHRF_ORDER, 3).transpose(2, 0, 1)
    there = (said > 0) & (gold > 0)
    precision, recall = (
        np.where(there, common / np.maximum(n, 1), 0).sum(1) / np.maximum(there.sum(1), 1) for n in (said, gold)
    )
    return 100 * 5 * precision * recall / np.maximum(4 * precision + recall, 1e-300)
