"""BLEU, chrF and ROUGE: the figures of sacreBLEU and of rouge-score, and Chinese that counts."""

import random

import pytest
from sacrebleu import corpus_bleu, corpus_chrf

from ronna.tasks.ngrams import ROUGE, cut_of, longest_common, metric_names, rouge_tokens, text_scores

WORDS = "the a cat dog sat ran on under mat hat big small and, but. it's 3.5 U.S.".split()


def sentences(seed: int, n: int = 60) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 14))) for _ in range(n)]


def test_bleu_and_chrf_are_sacrebleu_s():
    said, gold = sentences(0), sentences(1)
    found = text_scores(said, [(g,) for g in gold], "13a").metrics
    assert found["bleu_13a"].value == corpus_bleu(said, [gold]).score
    assert found["chrf2"].value == pytest.approx(corpus_chrf(said, [gold]).score, rel=1e-12)
    assert found["bleu_13a"].low < found["bleu_13a"].value < found["bleu_13a"].high


def test_several_references_count_as_in_sacrebleu():
    said, streams = sentences(0), [sentences(1), sentences(4)]
    found = text_scores(said, list(zip(*streams, strict=True)), "13a").metrics
    assert found["bleu_13a"].value == corpus_bleu(said, streams).score
    assert found["chrf2"].value == pytest.approx(corpus_chrf(said, streams).score, rel=1e-12)


def test_rouge_is_rouge_score_s():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(list(ROUGE))
    for said, gold in zip(sentences(2), sentences(3), strict=True):
        theirs = scorer.score(gold, said)
        for name, measure in ROUGE.items():
            assert measure(rouge_tokens(said), rouge_tokens(gold)) == pytest.approx(theirs[name].fmeasure, abs=1e-12)


def test_identical_chinese_is_right_and_the_cut_is_named():
    texts = ["今天天气很好。", "基于平方和的方法", "A股上涨"]
    assert cut_of(texts) == "zh" and cut_of(["a", "b", "今"]) == "13a"
    found = text_scores(texts, [(t,) for t in texts], "zh").metrics
    assert set(found) == {"bleu_zh", "chrf2", "rouge1_chars", "rouge2_chars", "rougeL_chars"}
    assert found["rouge1_chars"].value == found["rouge2_chars"].value == found["rougeL_chars"].value == 1.0
    assert found["bleu_zh"].value == pytest.approx(100.0)
    assert set(metric_names("zh").values()) == set(found)
    assert text_scores(["今天"], [("明天",)], "zh").metrics["rouge1_chars"].value == 0.5


def test_the_nearest_of_several_references_counts():
    found = text_scores(["a b", "c d"], [("x y", "a b"), ("c d",)], "13a").metrics
    assert found["rougeL_words"].value == 1.0


def test_one_letter_has_no_pairs_and_is_still_right():
    found = text_scores(["好"], [("好",)], "zh").metrics
    assert found["rouge2_chars"].value == 1.0
    assert text_scores(["好"], [("坏",)], "zh").metrics["rouge2_chars"].value == 0.0


@pytest.mark.parametrize(
    ("a", "b", "n"), [("abcbdab", "bdcaba", 4), ("", "a", 0), ("abc", "abc", 3), ("abc", "cba", 1)]
)
def test_longest_common_subsequence(a, b, n):
    assert longest_common(a, b) == n
