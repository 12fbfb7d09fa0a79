"""A knowledge graph out of texts: entities that one model finds, and what another says of any two of a sentence."""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import combinations, permutations
from typing import Any, NamedTuple

from ronna.tasks.labels import named_relation
from ronna.tasks.relation import Pair
from ronna.tasks.words import Extent, Sentence

# What ends a sentence: a mark with what closes after it and, where words have spaces, a first character behind them.
END = re.compile(r"""([.!?…]+)["'’”)\]]*(?=\s+["'‘“(\[]*([^\W_]))|[。！？]+["'’”」』）]*|\n\s*\n""")
# Before a full stop that is of an abbreviation, titles and companies among them; of initials too.
SHORT = re.compile(
    r"(?<!\w)(?:[^\W\d_]|Mrs?|Ms|Dr|Prof|St|Mt|Gen|Gov|Sen|Rep|Col|Capt|Lt|Sgt|Jr|Sr|Inc|Ltd|Corp|Co|vs)$"
)

Answers = Callable[[Sequence[Any]], list[dict[str, Any]]]  # what a task says of each of its rows


@dataclass
class Account:
    """What became of the pairs of entities."""

    records: int = 0
    pairs: int = 0  # that the relation model was asked of
    left_out: int = 0  # for a record had too many of them
    cut_records: int = 0  # that had too many
    triples: int = 0

    def text(self, most: int) -> str:
        said = f"{self.triples:,} triples out of {self.pairs:,} pairs of entities in {self.records:,} records"
        if not self.left_out:
            return said
        cut = f"{self.cut_records:,} records had more than {most:,} pairs, of which the nearest were asked"
        return f"{said}; {cut} ({self.left_out:,} left out: --set pairs=N)"


class Asked(NamedTuple):
    """Two entities of a record, by their numbers, and what the relation model reads of them."""

    record: int
    first: int
    second: int
    pair: Pair


@dataclass
class Triples:
    """Two models as one: `answer` gives what the first says of each row, and triples beside it.

    labels: what the second one says. Where each relation among them names its direction, R(e1,e2) or R(e2,e1), two
    entities are asked of once, in the order of the text; else twice, once in each order. most: pairs of a record.
    """

    entities: Answers
    relations: Answers
    labels: Sequence[str]
    most: int
    account: Account = field(default_factory=Account)

    @property
    def directed(self) -> bool:
        return all(name.order for name in map(named_relation, self.labels) if name.kind is not None)

    def answer(self, rows: Sequence[Sentence]) -> list[dict[str, Any]]:
        answers = self.entities(rows)
        asked = [a for i, row in enumerate(rows) for a in self.asked(i, row, answers[i])]
        found: list[dict[tuple[int, str, int], float]] = [{} for _ in rows]
        for a, said in zip(asked, self.relations([a.pair for a in asked]) if asked else [], strict=True):
            kind, order = named_relation(said["relation"])
            if kind is not None:
                head, tail = (a.second, a.first) if order == "e2,e1" else (a.first, a.second)
                # Asked of twice, the surer answer counts.
                p = max(said["probability"], found[a.record].get((head, kind, tail), 0.0))
                found[a.record][head, kind, tail] = p
        for answer, some in zip(answers, found, strict=True):
            own = [{k: v for k, v in entity.items() if k != "probability"} for entity in answer["entities"]]
            answer["triples"] = [
                {"head": own[head], "relation": kind, "tail": own[tail], "probability": p}
                for (head, kind, tail), p in some.items()
            ]
            self.account.triples += len(some)
        self.account.records += len(rows)
        self.account.pairs += len(asked)
        return answers

    def asked(self, record: int, row: Sentence, answer: dict[str, Any]) -> list[Asked]:
        """The pairs of entities of each sentence, the nearest if they are too many, which `answer` then says."""
        extents = [extent(row, entity) for entity in answer["entities"]]
        groups = list(sentences(row, extents))
        sizes = [len(numbers) * (len(numbers) - 1) // (2 if self.directed else 1) for _, numbers in groups]
        pairs = (
            Asked(record, i, j, Pair(row.text[start:end], shifted(extents[i], start), shifted(extents[j], start), None))
            for (start, end), numbers in groups
            for i, j in (combinations if self.directed else permutations)(numbers, 2)
        )
        if sum(sizes) <= self.most:
            return list(pairs)
        left_out = sum(sizes) - self.most
        answer["pairs_left_out"] = left_out
        self.account.left_out += left_out
        self.account.cut_records += 1
        nearest = nsmallest(self.most, pairs, key=lambda a: (gap(a.pair), a.first, a.second))
        return sorted(nearest, key=lambda a: (a.first, a.second))


def extent(row: Sentence, entity: Mapping[str, Any]) -> Extent:
    """Characters of an entity, which stands by words where words were given."""
    if "words" not in entity:
        return entity["start"], entity["end"]
    first, last = entity["words"]
    return row.words[first][0], row.words[last - 1][1]


def shifted(extent: Extent, by: int) -> Extent:
    return extent[0] - by, extent[1] - by


def gap(pair: Pair) -> int:
    """Characters between two entities."""
    return max(pair.first[0], pair.second[0]) - min(pair.first[1], pair.second[1])


def sentences(row: Sentence, entities: Sequence[Extent]) -> Iterator[tuple[Extent, list[int]]]:
    """The sentences of a text, by their characters, that have entities, and which; words that were given are one."""
    breaks = [] if row.given else [b for b in ends(row.text) if not any(start < b < end for start, end in entities)]
    within: dict[int, list[int]] = {}
    for number, (start, _) in enumerate(entities):
        within.setdefault(bisect_right(breaks, start), []).append(number)
    edges = [0, *breaks, len(row.text)]
    for sentence, numbers in within.items():
        yield (edges[sentence], edges[sentence + 1]), numbers


def ends(text: str) -> Iterator[int]:
    """Where sentences end. In doubt, as after an abbreviation, they go on."""
    for found in END.finditer(text):
        marks, following = found.groups()
        goes_on = following is not None and following.islower()
        abbreviated = marks == "." and SHORT.search(text[max(0, found.start() - 6) : found.start()])
        if not goes_on and not abbreviated:
            yield found.end()
