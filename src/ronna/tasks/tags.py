"""Tag sequences: the entities that BIO, BIOES, BMES or BILOU tags mean, and the best legal sequence for scores.

Legend: W words, K tags, N sentences.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

Scheme = Literal["bio", "bioes"]

# What a prefix means, over all schemes: M is I (BMES), L is E and U is S (BILOU).
TAG = re.compile(r"([BIMESLU])[-_](.+)", re.DOTALL)
BEGINS, CONTINUES, ENDS = set("BSU"), set("IMEL"), set("SUEL")
IMPOSSIBLE = np.float32(-1e9)


class Span(NamedTuple):
    """An entity: words [start, end) and its type."""

    start: int
    end: int
    type: str


def parse(tag: str) -> tuple[str, str] | None:
    """Prefix and type; None for O. Raises ValueError for a tag that is neither."""
    if tag == "O":
        return None
    found = TAG.fullmatch(tag)
    if found is None:
        raise ValueError(f"tag {tag!r} is neither O nor a prefix and a type, such as B-PER")
    return found[1], found[2]


def spans_of(tags: Sequence[str]) -> tuple[list[Span], int]:
    """The entities of W tags of any of the schemes, and how many began without B or S.

    What continues nothing, or something of another type, begins an entity (as conlleval counts it).
    """
    spans: list[Span] = []
    opened: tuple[int, str] | None = None  # start and type
    repaired = 0

    def close(end: int) -> None:
        nonlocal opened
        if opened is not None:
            spans.append(Span(opened[0], end, opened[1]))
            opened = None

    for i, tag in enumerate(tags):
        found = parse(tag)
        if found is None:
            close(i)
            continue
        prefix, kind = found
        goes_on = prefix in CONTINUES and opened is not None and opened[1] == kind
        if not goes_on:
            close(i)
            opened = (i, kind)
            repaired += prefix in CONTINUES
        if prefix in ENDS:
            close(i + 1)
    close(len(tags))
    return spans, repaired


def tags_of(spans: Sequence[Span], words: int, scheme: Scheme) -> list[str]:
    """W tags that mean these spans, which must not overlap."""
    tags = ["O"] * words
    for start, end, kind in spans:
        for i in range(start, end):
            prefix = "B" if i == start else "I"
            if scheme == "bioes" and i == end - 1:
                prefix = "S" if i == start else "E"
            tags[i] = f"{prefix}-{kind}"
    return tags


def tag_names(types: Sequence[str], scheme: Scheme) -> list[str]:
    """O, then every tag of every type."""
    prefixes = {"bio": "BI", "bioes": "BIES"}[scheme]
    return ["O", *(f"{prefix}-{kind}" for kind in types for prefix in prefixes)]


class Rules(NamedTuple):
    """Which tags may begin, follow one another and end: booleans (K,), (K, K) from row to column, (K,)."""

    first: np.ndarray
    follow: np.ndarray
    last: np.ndarray


def rules_of(tags: Sequence[str]) -> Rules:
    """The rules of the scheme that the tags themselves show. Raises ValueError for a tag that is none."""
    parsed = [parse(tag) for tag in tags]
    marked = any(found is not None and found[0] in BEGINS for found in parsed)  # else I begins too
    closing = any(found is not None and found[0] in "EL" for found in parsed)

    def opens(i: int) -> bool:
        """Whether what comes after must go on: after B, I or M of a scheme that marks ends."""
        found = parsed[i]
        return closing and found is not None and found[0] not in ENDS

    def may_follow(i: int, j: int) -> bool:
        before, after = parsed[i], parsed[j]
        if marked and after is not None and after[0] in CONTINUES:
            return before is not None and before[1] == after[1] and before[0] not in ENDS
        return not opens(i)

    size = range(len(tags))
    return Rules(
        np.array([not marked or found is None or found[0] in BEGINS for found in parsed]),
        np.array([[may_follow(i, j) for j in size] for i in size]),
        np.array([not opens(i) for i in size]),
    )


def best_tags(
    scores: Sequence[np.ndarray], rules: Rules, transitions: np.ndarray | None = None, batch: int = 256
) -> list[np.ndarray]:
    """The legal sequence of the highest sum for each of N sentences' scores (W, K): Viterbi's algorithm.

    scores: log probabilities, or any numbers to add up. transitions: (K + 2, K) further ones, from the tag of the row
    to that of the column, then of beginning and of ending with it. Returns N arrays (W,) of tag ids.
    """
    if transitions is None:
        transitions = np.zeros((len(rules.first) + 2, len(rules.first)), np.float32)
    found: list[np.ndarray] = [np.zeros(0, np.int64)] * len(scores)
    order = sorted((i for i in range(len(scores)) if len(scores[i])), key=lambda i: len(scores[i]))
    for at in range(0, len(order), batch):
        some = order[at : at + batch]
        for i, path in zip(some, _viterbi([scores[i] for i in some], rules, transitions), strict=True):
            found[i] = path
    return found


def _viterbi(scores: Sequence[np.ndarray], rules: Rules, transitions: np.ndarray) -> list[np.ndarray]:
    lengths = np.array([len(s) for s in scores])
    padded = np.zeros((len(scores), lengths.max(), scores[0].shape[1]), np.float32)
    for row, s in zip(padded, scores, strict=True):
        row[: len(s)] = s
    follow = np.where(rules.follow, transitions[:-2], IMPOSSIBLE)
    best = padded[:, 0] + np.where(rules.first, transitions[-2], IMPOSSIBLE)
    came = np.zeros(padded.shape, np.int64)
    ended = best.copy()  # the scores at each sentence's last word
    for t in range(1, padded.shape[1]):
        through = best[:, :, None] + follow  # (N, from, to)
        came[:, t] = through.argmax(1)
        best = through.max(1) + padded[:, t]
        ended[lengths == t + 1] = best[lengths == t + 1]
    ended = ended + np.where(rules.last, transitions[-1], IMPOSSIBLE)
    paths = []
    for n, length in enumerate(lengths):
        path = np.empty(length, np.int64)
        path[-1] = ended[n].argmax()
        for t in range(length - 1, 0, -1):
            path[t - 1] = came[n, t, path[t]]
        paths.append(path)
    return paths
