import numpy as np

from ronna.objectives.clm import CausalLM
from ronna.objectives.documents import PackedDocuments

BOS, EOS = 0, 1


def test_every_token_is_predicted_from_the_one_before(make_shards):
    shards = make_shards([5, 100, 31, 32, 64, 1])
    data = PackedDocuments(shards, 32, CausalLM.overhead)
    objective = CausalLM(BOS, EOS)
    predicted = []
    for i in range(len(data)):
        samples = objective.samples(data[i], np.random.default_rng(0))
        assert sum(len(s.tokens) for s in samples) <= 32
        for sample, piece in zip(samples, data[i], strict=True):
            document = [BOS, *shards[piece.document].tolist(), EOS]
            place = 0 if piece.before is None else find(document, sample.tokens)
            assert document[place : place + len(sample.tokens)] == sample.tokens.tolist()
            assert document[place + 1 : place + 1 + len(sample.labels)] == sample.labels.tolist()
            predicted += [(piece.document, place + 1 + k) for k in range(len(sample.labels))]
    everything = {(d, k) for d, n in enumerate(shards.lengths) for k in range(1, n + 2)}
    assert set(predicted) == everything  # the end mark of each document included


def find(document: list[int], tokens: np.ndarray) -> int:
    n = len(tokens)
    return next(i for i in range(len(document)) if document[i : i + n] == tokens.tolist())
