"""A conditional random field over tags: its sums by trying all sequences, its folders, and what it can learn."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ronna import load
from ronna.cli import main
from ronna.data.sources import Record
from ronna.model.families import classifier_for, preset, read_config
from ronna.model.folder import load_folder, save_folder
from ronna.model.init import build
from ronna.model.sequences import Sequences
from ronna.objectives.base import collate
from ronna.tasks.crf import Chains, Steps, batched, log_partition, marginals, negative_log_likelihood, path_scores
from ronna.tasks.schema import Columns
from ronna.tasks.tag import Tag, TagConfig, WordScores
from ronna.tasks.tags import best_tags, rules_of, tag_names
from ronna.text.tokenizer import load_tokenizer

LENGTHS = (4, 1, 3, 2)
SCHEMES = {"bio": tag_names("AB", "bio"), "bioes": tag_names("A", "bioes"), "open": ["O", "I-A", "I-B"]}
TOKENS = Columns("tokens", None, "tags")


def sequences(length, rules, begins=True, ends=True):
    """Every legal one."""
    for path in itertools.product(range(len(rules.first)), repeat=length):
        legal = all(rules.follow[a, b] for a, b in itertools.pairwise(path))
        if legal and (not begins or rules.first[path[0]]) and (not ends or rules.last[path[-1]]):
            yield path


def total(path, s, transitions, begins=True, ends=True) -> float:
    steps = sum(transitions[a, b] for a, b in itertools.pairwise(path))
    edges = begins * transitions[-2, path[0]] + ends * transitions[-1, path[-1]]
    return float(sum(s[i, t] for i, t in enumerate(path)) + steps + edges)


@pytest.fixture(params=SCHEMES)
def case(request):
    """Rules, transitions and scores of four sentences, the third of which is a window without its ends."""
    rules, rng = rules_of(SCHEMES[request.param]), np.random.default_rng(0)
    size = len(rules.first)
    scores = [rng.normal(size=(n, size)).astype(np.float32) for n in LENGTHS]
    transitions = rng.normal(size=(size + 2, size)).astype(np.float32)
    whole = torch.tensor([[True, True], [True, True], [False, False], [True, False]])
    return rules, transitions, scores, Chains(Sequences.of(list(LENGTHS)), whole)


def test_sums_and_probabilities_by_trying_all(case):
    rules, transitions, scores, chains = case
    steps, flat = Steps.of(torch.from_numpy(transitions), rules), torch.from_numpy(np.concatenate(scores))
    sums, probabilities = log_partition(flat, chains, steps), marginals(flat, chains, steps)
    gold = []
    for s, ends, found, p in zip(scores, chains.whole.tolist(), sums, probabilities.split(LENGTHS), strict=True):
        every = list(sequences(len(s), rules, *ends))
        weights = [math.exp(total(path, s, transitions, *ends)) for path in every]
        assert float(found) == pytest.approx(math.log(sum(weights)), abs=1e-4)
        wanted = np.zeros_like(s)
        for path, weight in zip(every, weights, strict=True):
            wanted[range(len(s)), path] += weight / sum(weights)
        np.testing.assert_allclose(p, wanted, atol=1e-5)
        gold.append(every[len(every) // 2])
    along = path_scores(flat, torch.tensor([t for path in gold for t in path]), chains, steps)
    rows = zip(along, gold, scores, chains.whole.tolist(), strict=True)
    assert all(float(x) == pytest.approx(total(path, s, transitions, *ends), abs=1e-5) for x, path, s, ends in rows)
    shifted = negative_log_likelihood(
        flat + torch.arange(len(flat))[:, None], torch.tensor(sum(gold, ())), chains, steps
    )
    torch.testing.assert_close(shifted, sums - along, atol=1e-4, rtol=1e-5)


def test_the_best_sequence_by_trying_all(case):
    rules, transitions, scores, _ = case
    plain = best_tags(scores, rules)
    found = best_tags(scores, rules, transitions, batch=3)
    for path, s in zip(found, scores, strict=True):
        assert tuple(path) == max(sequences(len(s), rules), key=lambda p, s=s: total(p, s, transitions))
    assert any(a.tolist() != b.tolist() for a, b in zip(plain, found, strict=True))
    lured = np.where(rules.follow, 0, np.float32(1e4))  # however much is promised for a step that is forbidden
    lured = np.concatenate([lured, np.where([rules.first, rules.last], 0, np.float32(1e4))])
    assert all(tuple(path) in set(sequences(len(path), rules)) for path in best_tags(scores, rules, lured))


def test_sentences_of_a_batch_do_not_touch_and_gradients_are_finite(case):
    rules, transitions, scores, chains = case
    legal = [next(iter(sequences(n, rules))) for n in LENGTHS]
    learnt = torch.from_numpy(transitions * 30).requires_grad_()
    flat = torch.from_numpy(np.concatenate(scores) * 30).requires_grad_()
    tags = torch.tensor([t for path in legal for t in path])
    loss = negative_log_likelihood(flat, tags, chains, Steps.of(learnt, rules))
    whole = torch.autograd.grad(loss.sum(), (flat, learnt))
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in whole)
    barred = np.concatenate([~rules.follow, [~rules.first, ~rules.last]])
    assert not whole[1][torch.from_numpy(barred)].any()
    alone, summed = [], torch.zeros_like(learnt)
    for path, s, ends in zip(legal, flat.split(LENGTHS), chains.whole, strict=True):
        one = Chains(Sequences.of([len(s)]), ends[None])
        alone.append(negative_log_likelihood(s, torch.tensor(path), one, Steps.of(learnt, rules)))
        summed += torch.autograd.grad(alone[-1].sum(), learnt, retain_graph=True)[0]
    torch.testing.assert_close(loss, torch.cat(alone), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(whole[1], summed, atol=1e-5, rtol=1e-4)


def test_batches_of_some_words_hold_every_sentence_once():
    scores = [np.full((n, 3), i, np.float32) for i, n in enumerate((2, 0, 5, 4, 1))]
    seen = []
    for some, rows, chains in batched(scores, words=6):
        assert rows.tolist() == np.concatenate([scores[i] for i in some]).tolist() and len(rows) <= 6
        assert chains.words.lengths.tolist() == [len(scores[i]) for i in some] and chains.whole.all()
        seen += some
    assert sorted(seen) == [0, 2, 3, 4]


# The task


def tagger(folder: Path, **config) -> tuple[Tag, torch.nn.Module]:
    own = TagConfig(crf=True, **config)
    task = Tag(own, load_tokenizer(folder), tag_names(("LOC", "PER"), own.scheme), 16)
    family, cfg = read_config(folder)
    model = load_folder(folder, head=False, classifier=task.classifier(family, cfg), seed=1).model.eval()
    model.classifier.transitions.data.normal_(generator=torch.Generator().manual_seed(5))
    return task, model


def rows(*pairs):
    return [Tag.row(Record({"tokens": w.split(" "), "tags": t.split()}, Path("f"), 1), TOKENS) for w, t in pairs]


@pytest.mark.parametrize("scheme", ["bio", "bioes"])
def test_the_loss_is_of_sentences_and_of_windows(tiny_bert, scheme):
    task, model = tagger(tiny_bert, scheme=scheme)
    short = rows(("good film was bad", "B-PER I-PER O B-LOC"), ("a", "O"), ("the plot", "O B-LOC"))
    examples = task.encode(short)
    scores = task.infer(model, examples)
    np.testing.assert_array_equal(scores.transitions, model.classifier.transitions.detach())
    batch = collate(task, [s for e in examples for s in task.samples(e, np.random.default_rng(0))])
    loss = task.loss(model, batch).sums["tag"].detach()
    assert batch.targets.all() and batch.counts == {"tag": 7}
    assert task.mean_loss(examples, scores) == pytest.approx(float(loss) / 7, rel=1e-5)
    wanted = 0.0
    for example, s in zip(examples, scores.words, strict=True):
        weights = [math.exp(total(p, s, scores.transitions)) for p in sequences(len(s), task.rules)]
        wanted -= total(example.target, s, scores.transitions) - math.log(sum(weights))
    assert float(loss) == pytest.approx(wanted, rel=1e-4)

    [long] = task.encode(rows((" ".join(["good", "bad", "film"] * 15), "B-PER I-PER I-PER " * 15)))
    samples = task.samples(long, np.random.default_rng(0))
    assert [s.target for s in samples] == [(True, False)] + [(False, False)] * (len(samples) - 2) + [(False, True)]
    windowed = task.loss(model, collate(task, samples)).sums["tag"].detach()
    assert 0 < float(windowed) < 100 * 45  # though windows begin and end within entities
    assert 0 < task.mean_loss([long], task.infer(model, [long])) < 100


@pytest.mark.parametrize("scheme", ["bio", "bioes"])
def test_an_entity_begins_at_a_word_that_the_model_sees(tiny_bert, scheme):
    """The tokenizer leaves nothing of a zero-width space: the chain that is learnt goes from film to was."""
    task, model = tagger(tiny_bert, scheme=scheme)
    unseen = rows(("\u200b film \u200b was \u200b", "B-PER I-PER I-PER I-PER I-PER"), ("\u200b", "B-LOC"))
    examples = task.encode(unseen)
    said = [task.labels[i] for i in examples[0].target]
    assert said == ["O", "B-PER", "O", {"bio": "I-PER", "bioes": "E-PER"}[scheme], "O"]
    assert 0 < task.mean_loss(examples, task.infer(model, examples)) < 100
    assert len(task.decode(unseen, examples, task.infer(model, examples))[0]["tags"]) == 5


def test_answers_are_probabilities_of_whole_sequences(tiny_bert):
    task, _ = tagger(tiny_bert)
    rng = np.random.default_rng(0)
    scores = WordScores([rng.normal(size=(2, 5)).astype(np.float32)], 3 * rng.normal(size=(7, 5)).astype(np.float32))
    weights = {p: math.exp(total(p, scores.words[0], scores.transitions)) for p in sequences(2, task.rules)}
    best = max(weights, key=lambda p: weights[p])
    [answer] = task.decode(task.rows([["Phil", "S"]], None), [], scores)
    assert answer["tags"] == [task.labels[i] for i in best]
    for entity in answer["entities"]:
        inside = range(*entity["words"])
        p = [sum(w for path, w in weights.items() if path[i] == best[i]) / sum(weights.values()) for i in inside]
        assert entity["probability"] == pytest.approx(math.exp(np.log(p).mean()), abs=1e-5)
    assert answer["entities"]


# Folders


@pytest.mark.parametrize("name", ["bert-tiny", "roberta-base", "modernbert-tiny", "gpt2-tiny", "llama-tiny"])
def test_transitions_are_saved_with_every_family(tmp_path, name):
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    family, cfg = preset(name, **sizes, intermediate_size=48, max_position_embeddings=16)
    plain = tagged(family, cfg, 5)
    model = build(tagged(family, cfg, 5, transitions=True), seed=0)
    assert model.cfg.params() == sum(p.numel() for p in model.parameters())
    save_folder(model, family, tmp_path / "crf")
    again = load_folder(tmp_path / "crf")
    assert again.model.cfg == model.cfg and again.notes == []
    assert torch.equal(again.model.classifier.transitions, model.classifier.transitions)
    without = load_folder(tmp_path / "crf", classifier=plain.classifier)
    assert without.model.classifier.transitions is None and "crf.transitions" in without.notes[0]
    save_folder(without.model, family, tmp_path / "plain", extra_config=again.config)
    assert load_folder(tmp_path / "plain").model.cfg.classifier.transitions is False
    fresh = load_folder(tmp_path / "plain", classifier=model.cfg.classifier)
    assert "drawn anew: classifier.transitions" in fresh.notes[0]
    other = load_folder(tmp_path / "crf", classifier=tagged(family, cfg, 3, transitions=True).classifier)
    assert "crf.transitions" in other.notes[0] and "another number of labels" in other.notes[0]
    body = load_folder(tmp_path / "crf", head=False)
    assert body.model.classifier is None and "crf.transitions" in body.notes[0]


def tagged(family, cfg, labels, transitions=False):
    made = classifier_for(family, cfg, labels, "tokens")
    return replace(cfg, head=None, classifier=replace(made, transitions=transitions))


@pytest.fixture(scope="module")
def coins(tmp_path_factory) -> Path:
    """Sentences with two entities whose type is the throw of a coin, the same for both: nothing in the words tells."""
    folder, rng = tmp_path_factory.mktemp("coins"), np.random.default_rng(0)
    for split, n in (("train", 320), ("validation", 64)):
        lines = []
        for i in range(n):
            kind = rng.choice(["LOC", "PER"])
            words = [*rng.choice(["the", "film", "was", "a"], i % 3), "great", "story", split, str(i)]
            tags = ["O"] * len(words)
            tags[i % 3 : i % 3 + 2] = [f"B-{kind}"] * 2
            lines.append(json.dumps({"tokens": words, "tags": tags}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def held_out_loss(out: Path) -> float:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return min(line["loss"] for line in lines if line["kind"] == "validation")


def call(base: Path, coins: Path, *more: str) -> list[str]:
    settings = ["--length", "32", "--batch", "16", "--precision", "fp32", "--set", "model.dropout=0.0"]
    return ["finetune", "--task", "tag", "--model", str(base), "--train", str(coins), *settings, *more]


def test_what_only_transitions_can_say_is_learnt_and_kept(tiny_bert, coins, tmp_path, capsys):
    run = call(tiny_bert, coins, "--lr", "2e-2", "--epochs", "8")
    assert main([*run, "--set", "task.crf=true", "--out", f"{tmp_path}/crf"]) == 0
    assert main([*run, "--out", f"{tmp_path}/plain"]) == 0
    # One coin a sentence is what cannot be known. Tags that do not know of each other pay for two.
    coin = math.log(2) * 64 / sum(4 + i % 3 for i in range(64))
    assert coin < held_out_loss(tmp_path / "crf") < 1.5 * coin
    assert held_out_loss(tmp_path / "plain") > 1.9 * coin
    report = json.loads((tmp_path / "crf/report.json").read_text())
    capsys.readouterr()
    use = ["--model", f"{tmp_path}/crf/model", "--data", f"{coins}/validation.jsonl", "--json", "--precision", "fp32"]
    assert main(["evaluate", *use]) == 0
    assert json.loads(capsys.readouterr().out)["test"] == report["validation"]
    loaded = load(f"{tmp_path}/crf/model", precision="fp32", device="cpu")
    assert loaded.task.config.crf
    held = [json.loads(line)["tokens"] for line in (coins / "validation.jsonl").read_text().splitlines()]
    for answer in loaded.predict(held):
        first, second = answer["entities"]
        assert first["type"] == second["type"] and 0.2 < first["probability"] < 0.8
    others_read_the_rest(tmp_path / "crf/model", tiny_bert, loaded)


@pytest.mark.parametrize(("peft", "key"), [("lora", "base_model.model.crf"), ("houlsby", "classifier")])
def test_transitions_are_trained_and_kept_with_an_adapter(tiny_bert, coins, tmp_path, peft, key, capsys):
    run = call(tiny_bert, coins, "--lr", "1e-2", "--epochs", "2", "--peft", peft, "--set", "task.crf=true")
    assert main([*run, "--out", str(tmp_path)]) == 0
    report, folder = json.loads((tmp_path / "report.json").read_text()), tmp_path / "model"
    capsys.readouterr()
    use = ["--model", str(folder), "--data", f"{coins}/validation.jsonl", "--json", "--precision", "fp32"]
    assert main(["evaluate", *use]) == 0
    assert json.loads(capsys.readouterr().out)["test"] == report["validation"]
    loaded = load(str(folder), precision="fp32", device="cpu")
    kept = load_file(folder / "adapter_model.safetensors")[f"{key}.transitions"]
    assert torch.equal(loaded.model.classifier.transitions, kept) and kept.abs().max() > 0.1
    if peft == "lora":
        assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
        others_read_the_rest(folder, tiny_bert, loaded)


def others_read_the_rest(folder: Path, base: Path, loaded) -> None:
    """transformers and the peft library pass the transitions over; the scores of the tokens are ours."""
    hf = pytest.importorskip("transformers")
    model = hf.AutoModelForTokenClassification
    if (folder / "adapter_config.json").exists():
        peft, settings = pytest.importorskip("peft"), hf.AutoConfig.from_pretrained(folder)
        theirs = peft.PeftModel.from_pretrained(model.from_pretrained(base, config=settings), folder).eval()
    else:
        theirs = model.from_pretrained(folder).eval()
    ids = hf.AutoTokenizer.from_pretrained(folder)("the great story was", return_tensors="pt")
    with torch.no_grad():
        ours = loaded.model.scores(ids["input_ids"][0], Sequences.of([ids["input_ids"].shape[1]]))
        torch.testing.assert_close(ours, theirs(**ids).logits[0], atol=1e-4, rtol=1e-4)
