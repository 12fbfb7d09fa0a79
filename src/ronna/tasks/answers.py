"""How near an answer is to those people gave: exact match and F1 as SQuAD (Rajpurkar et al. 2016) counts them, and
for Chinese as CMRC 2018 (Cui et al. 2019) does, by characters and the longest common run.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from ronna.tasks.words import PIECE, UNSPACED

Counting = Literal["squad", "cmrc"]

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def counting_of(texts: Sequence[str]) -> Counting:
    """By the script that most of the texts are written in."""
    unspaced = sum(bool(UNSPACED.search(text)) for text in texts)
    return "cmrc" if 2 * unspaced > len(texts) else "squad"


def squad_tokens(text: str) -> list[str]:
    """Lower case, without punctuation and articles."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def cmrc_tokens(text: str) -> list[str]:
    """Lower case, each character of a script without spaces alone, other runs by their spaces; no punctuation."""
    kept = "".join(" " if c.isspace() else c for c in text.lower() if not is_mark(c))
    return PIECE.findall(kept)


def is_mark(char: str) -> bool:
    return unicodedata.category(char)[0] in "PS"


def exact(said: str, gold: str, counting: Counting) -> float:
    split = squad_tokens if counting == "squad" else cmrc_tokens
    return float(split(said) == split(gold))


def f1(said: str, gold: str, counting: Counting) -> float:
    """Of tokens in common: all of them (SQuAD), or those of the longest run that both have (CMRC)."""
    split = squad_tokens if counting == "squad" else cmrc_tokens
    a, b = split(said), split(gold)
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values()) if counting == "squad" else longest_run(a, b)
    return 2 * common / (len(a) + len(b))


def longest_run(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest sequence of neighbours that stands in both."""
    best, before = 0, [0] * (len(b) + 1)
    for x in a:
        row = [0] * (len(b) + 1)
        for j, y in enumerate(b):
            if x == y:
                row[j + 1] = before[j] + 1
                best = max(best, row[j + 1])
        before = row
    return best


def best_of(said: str, golds: Sequence[str], counting: Counting) -> tuple[float, float]:
    """Exact match and F1 against the nearest of the given answers; none given means that there is none."""
    golds = golds or [""]
    return max(exact(said, g, counting) for g in golds), max(f1(said, g, counting) for g in golds)
