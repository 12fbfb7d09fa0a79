"""Answers of a task whose batches several look at are those of one that does all."""

import numpy as np
import pytest
import torch

from ronna.model.folder import load_folder
from ronna.tasks.base import like_lengths
from ronna.tasks.classify import Classify, ClassifyConfig, Example
from ronna.text.tokenizer import load_tokenizer

from ..decoding.test_among import together


@pytest.fixture(scope="module")
def task(tiny_bert):
    return Classify(ClassifyConfig(), load_tokenizer(tiny_bert), "single", ["a", "b", "c"], 40).reading(64)


def examples(count):
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, 20, rng.integers(1, 40)).astype(np.int32) for _ in range(count)]
    return [Example(some, np.zeros_like(some), 0) for some in ids]


def scoring(task, tiny_bert):
    loaded = load_folder(tiny_bert, seed=0)
    model = load_folder(tiny_bert, classifier=task.classifier(loaded.family, loaded.model.cfg), seed=0).model
    return model.eval()


@pytest.mark.parametrize("count", [0, 1, 2, 23])
@pytest.mark.parametrize("parts", [2, 3])
def test_shared_scores_are_those_of_one(task, tiny_bert, parts, count):
    some = examples(count)
    wanted = task.infer(scoring(task, tiny_bert), some)
    assert wanted.shape == (count, 3)
    passes = [0] * parts

    def work(among):
        model = scoring(task, tiny_bert)

        def counted(*inputs, inner=model.scores):
            passes[among.part] += 1
            return inner(*inputs)

        model.scores = counted
        return task.shared(among).infer(model, some)

    for found in together(parts, work):
        assert found.dtype == np.float32 and np.array_equal(found, wanted)
    batches = len(list(like_lengths([len(e.tokens) for e in some], 64)))
    assert passes == [-(-batches // parts)] * parts


def test_units_of_several_rows(task, tiny_bert):
    model, lengths = scoring(task, tiny_bert), [3, 1, 2, 50, 60]

    def rows(indices):
        return [np.full((lengths[i] % 4, 2), i, np.float32) for i in indices]

    wanted = task.each(model, lengths, rows)
    assert [len(some) for some in wanted] == [3, 1, 2, 2, 0] and all((a == i).all() for i, a in enumerate(wanted))
    for found in together(2, lambda among: task.shared(among).each(model, lengths, rows)):
        assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not torch.is_inference_mode_enabled()
