"""Tag sequences: what they mean, which are legal, which is the best."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ronna.tasks.metrics import span_scores
from ronna.tasks.tags import Span, best_tags, rules_of, spans_of, tag_names, tags_of


@pytest.mark.parametrize(
    ("tags", "spans", "repaired"),
    [
        ("B-PER I-PER O B-LOC", [(0, 2, "PER"), (3, 4, "LOC")], 0),
        ("B-PER B-PER I-PER", [(0, 1, "PER"), (1, 3, "PER")], 0),
        ("B-PER I-LOC I-LOC", [(0, 1, "PER"), (1, 3, "LOC")], 1),
        ("O I-PER I-PER", [(1, 3, "PER")], 1),
        ("B-PER I-PER E-PER S-LOC", [(0, 3, "PER"), (3, 4, "LOC")], 0),
        ("B-PER M-PER E-PER I-PER", [(0, 3, "PER"), (3, 4, "PER")], 1),
        ("B_PER L_PER U_LOC", [(0, 2, "PER"), (2, 3, "LOC")], 0),
        ("B-work-of-art I-work-of-art", [(0, 2, "work-of-art")], 0),
        ("B-PER E-LOC", [(0, 1, "PER"), (1, 2, "LOC")], 1),
        ("", [], 0),
    ],
)
def test_spans_of_every_scheme(tags, spans, repaired):
    assert spans_of(tags.split()) == ([Span(*s) for s in spans], repaired)


@pytest.mark.parametrize("tag", ["PER", "o", "", "B-", "X-PER", "0", "B PER"])
def test_a_tag_without_prefix_is_refused(tag):
    with pytest.raises(ValueError, match="neither O nor"):
        spans_of(["O", tag])


@st.composite
def sentences(draw):
    """Words, and spans that do not overlap."""
    sizes = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4), st.sampled_from("ABC")), max_size=6))
    at, spans = 0, []
    for gap, size, kind in sizes:
        spans.append(Span(at + gap, at + gap + size, kind))
        at += gap + size
    return at + draw(st.integers(0, 3)), spans


@given(sentences(), st.sampled_from(["bio", "bioes"]))
def test_spans_become_tags_and_come_back(sentence, scheme):
    words, spans = sentence
    tags = tags_of(spans, words, scheme)
    assert len(tags) == words and set(tags) <= set(tag_names("ABC", scheme))
    assert spans_of(tags) == (spans, 0)
    rules, names = rules_of(tag_names("ABC", scheme)), tag_names("ABC", scheme)
    assert not words or is_legal([names.index(t) for t in tags], rules)


def is_legal(path, rules):
    return bool(
        rules.first[path[0]] and rules.last[path[-1]] and all(rules.follow[a, b] for a, b in itertools.pairwise(path))
    )


@pytest.mark.parametrize("scheme", ["bio", "bioes"])
def test_the_best_legal_sequence_by_trying_all(scheme):
    names = tag_names("AB" if scheme == "bio" else "A", scheme)
    rules, rng = rules_of(names), np.random.default_rng(0)
    scores = [np.log(rng.dirichlet([0.3] * len(names), size=n)).astype(np.float32) for n in (5, 1, 3, 4, 2)]
    changed = 0
    for found, s in zip(best_tags(scores, rules, batch=2), scores, strict=True):
        every = [p for p in itertools.product(range(len(names)), repeat=len(s)) if is_legal(p, rules)]
        best = max(every, key=lambda p, s=s: sum(s[i, t] for i, t in enumerate(p)))
        assert found.tolist() == list(best)
        changed += found.tolist() != s.argmax(-1).tolist()
    assert changed >= 2  # the rules had something to forbid


def test_what_is_legal():
    names = ["O", "B-A", "I-A", "B-B", "I-B"]
    rules = rules_of(names)
    assert rules.first.tolist() == [True, True, False, True, False] and rules.last.all()
    assert [names[j] for j in np.flatnonzero(rules.follow[1])] == ["O", "B-A", "I-A", "B-B"]
    ends = rules_of(["O", "B-A", "I-A", "E-A", "S-A"])
    assert ends.last.tolist() == [True, False, False, True, True]
    assert ends.follow[1].tolist() == ends.follow[2].tolist() == [False, False, True, True, False]
    assert rules_of(["O", "I-A"]).first.all()  # a scheme without B


def test_no_words_have_no_tags():
    assert [p.tolist() for p in best_tags([np.zeros((0, 3), np.float32)], rules_of(["O", "B-A", "I-A"]))] == [[]]


def test_scores_are_those_of_seqeval():
    seqeval = pytest.importorskip("seqeval.metrics")
    from seqeval.scheme import IOB2, IOBES

    rng = random.Random(0)
    for scheme, theirs in (("bio", IOB2), ("bioes", IOBES)):
        names, gold, found = tag_names(["LOC", "ORG", "PER"], scheme), [], []
        rules, noise = rules_of(names), np.random.default_rng(1)
        for _ in range(120):
            words = rng.randint(1, 12)
            true = best_tags([noise.normal(size=(words, len(names))).astype(np.float32)], rules)[0]
            near = np.eye(len(names), dtype=np.float32)[true] * 2 + noise.normal(size=(words, len(names)))
            gold.append([names[i] for i in true])
            found.append([names[i] for i in best_tags([near.astype(np.float32)], rules)[0]])
        scores = span_scores([spans_of(t)[0] for t in gold], [spans_of(t)[0] for t in found], ["LOC", "ORG", "PER"])
        strict = {"mode": "strict", "scheme": theirs, "zero_division": 0}
        assert 0.1 < scores.metrics["f1"].value < 0.95
        for name, measure in (("precision", seqeval.precision_score), ("recall", seqeval.recall_score)):
            assert scores.metrics[name].value == pytest.approx(measure(gold, found, **strict), abs=1e-12)
        assert scores.metrics["f1"].value == pytest.approx(seqeval.f1_score(gold, found, **strict), abs=1e-12)
        table = seqeval.classification_report(gold, found, output_dict=True, **strict)
        for row in scores.classes:
            want = table[row.label]
            assert (row.precision, row.recall, row.f1, row.support) == pytest.approx(tuple(want.values()))
        for kind in ("macro", "weighted"):
            assert scores.metrics[f"{kind}_f1"].value == pytest.approx(table[f"{kind} avg"]["f1-score"])


def test_nothing_found_is_a_score_of_zero_and_said():
    scores = span_scores([[Span(0, 1, "A")], []], [[], []], ["A", "B"])
    assert scores.metrics["f1"].value == 0.0 and scores.metrics["f1"].low == 0.0
    assert any("never predicted" in note and "A" in note for note in scores.notes)
    assert any("in neither" in note and "B" in note for note in scores.notes)
