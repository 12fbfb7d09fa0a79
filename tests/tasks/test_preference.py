"""Preferences: which pairs are read, that the loss is DPO's, and that the reference is the model as it was."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ronna
from ronna.base.config import build
from ronna.base.errors import RonnaError
from ronna.data.badrows import BadRow
from ronna.data.sources import Record
from ronna.model.families import read_config
from ronna.model.folder import load_folder
from ronna.objectives.base import collate
from ronna.peft.changes import bare
from ronna.peft.methods import LoraConfig, adapt
from ronna.run import prepare_run
from ronna.runfile import FinetuneRun
from ronna.tasks.preference import Choice, Preference, PreferenceConfig
from ronna.text.tokenizer import load_tokenizer

GOOD, BAD = "the plot was good", "bad"
ASKED = {"role": "user", "content": "was the film good"}


def record(**fields) -> Record:
    return Record(fields, Path("f"), 1)


def read(**fields) -> Choice:
    columns = Preference.columns(record(**fields), text=None, pair=None, label=None)
    return Preference.row(record(**fields), columns)


def told(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def task(folder: Path, length: int = 128, **config) -> Preference:
    own = Preference.learn(PreferenceConfig(**config), [], load_tokenizer(folder), length)
    return own.on(read_config(folder)[1], {})


def test_every_layout_is_the_same_choice():
    rows = [
        read(prompt=ASKED["content"], chosen=GOOD, rejected=BAD),
        read(prompt=[ASKED], chosen=[told(GOOD)], rejected=[told(BAD)]),
        read(chosen=[ASKED, told(GOOD)], rejected=[ASKED, told(BAD)]),
        read(question=ASKED["content"], chosen=GOOD, rejected=BAD),
    ]
    assert all(row == rows[0] for row in rows) and rows[0].label == GOOD
    assert rows[0].rejected.messages == (ASKED, told(BAD))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "no preference"),
        ({"chosen": [ASKED, told("a")], "rejected": [told("x"), ASKED, told("b")]}, "two conversations"),
        ({"chosen": "b", "rejected": "c"}, "no prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "message is not a text"),
    ],
)
def test_bad_rows_say_why(fields, reason):
    with pytest.raises(BadRow) as error:
        read(**fields)
    assert error.value.reason == reason


def test_columns_without_a_rejected_answer_are_refused():
    with pytest.raises(RonnaError, match="a chosen and a rejected"):
        read(prompt="a", chosen="b")


@pytest.fixture
def pairs(tiny_gpt):
    own = task(tiny_gpt, beta=0.3)
    return own, own.encode([read(prompt=p, chosen=GOOD, rejected=BAD) for p in ("was it good", "a film and a story")])


def test_the_loss_is_dpo_s(pairs, tiny_gpt):
    """Against the formula, worked out from whole logits of one sequence at a time."""
    own, examples = pairs
    model = load_folder(tiny_gpt).model.double().eval()
    model.compute = torch.float64
    own.prepare(model, examples)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05)

    def log_prob(sample) -> torch.Tensor:
        batch = collate(own, [sample, sample])
        logits = model(batch.tokens, batch.sequences)[: len(sample.tokens)][sample.predict].double()
        return -F.cross_entropy(logits, torch.from_numpy(sample.labels.astype(np.int64)), reduction="sum")

    margins = []
    for pair in examples:
        gained = [log_prob(s) - r for s, r in zip(own.samples(pair, None), pair.reference, strict=True)]
        margins.append(gained[0] - gained[1])
    expected = -F.logsigmoid(0.3 * torch.stack(margins))
    batch = collate(own, [s for pair in examples for s in own.samples(pair, None)])
    loss = own.loss(model, batch)
    torch.testing.assert_close(loss.sums["dpo"], expected.sum(), rtol=1e-6, atol=0, check_dtype=False)
    assert batch.counts == {"dpo": 2} and float(loss.stats["dpo_accuracy"]) == sum(m > 0 for m in margins)
    wanted = torch.autograd.grad(expected.sum(), list(model.parameters()))
    found = torch.autograd.grad(loss.sums["dpo"], list(model.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    scores = own.infer(model, examples)
    assert own.mean_loss(examples, scores) == pytest.approx(float(expected.mean()), rel=1e-6)
    measured = own.measure(examples, scores).metrics
    assert measured["margin"].value == pytest.approx(0.3 * float(torch.stack(margins).mean()), rel=1e-5)


def test_before_training_the_loss_is_that_of_a_coin(pairs, tiny_gpt):
    own, examples = pairs
    model = load_folder(tiny_gpt).model.eval()
    own.prepare(model, examples)
    assert own.mean_loss(examples, own.infer(model, examples)) == pytest.approx(np.log(2), abs=1e-5)


def test_the_reference_is_the_base_without_its_adapter(pairs, tiny_gpt):
    own, examples = pairs
    model = load_folder(tiny_gpt).model.eval()
    own.prepare(model, examples)
    before = [pair.reference for pair in examples]
    adapt(model, LoraConfig(rank=2))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3)
    own.prepare(model, examples)
    assert [pair.reference for pair in examples] != before
    with bare(model):
        own.prepare(model, examples)
    assert [pair.reference for pair in examples] == before


def test_a_pair_with_an_answer_too_long_is_counted_and_not_learnt(tiny_gpt):
    own = task(tiny_gpt, length=48)
    account: dict[str, int] = {}
    rows = [read(prompt="a film", chosen="good " * 60, rejected=BAD), read(prompt="a film", chosen=GOOD, rejected=BAD)]
    lost, kept = own.encode(rows, account)
    assert own.samples(lost, None) == [] and len(own.samples(kept, None)) == 2
    assert account == {"cut": 0, "answers that do not fit": 1}
    drops = task(tiny_gpt, length=48, truncation="drop")
    account = {}
    assert len(drops.encode(rows, account, training=True)) == 1 and account == {"dropped": 1}


def test_both_answers_follow_the_same_turns(tiny_gpt):
    own = task(tiny_gpt, length=110, system="always fun")
    before = [ASKED, told(GOOD), ASKED, told(GOOD)]
    pair = read(prompt=[*before, ASKED], chosen=[told("good " * 5)], rejected=[told(BAD)])
    cut = own.encode([pair])[0]
    whole = task(tiny_gpt, length=512, system="always fun").encode([pair])[0]
    assert (cut.chosen.prompt == cut.rejected.prompt).all() and cut.whole
    assert len(cut.chosen.prompt) < len(whole.chosen.prompt)
    own.encode([pair], account := {})
    assert account == {"cut": 1, "answers that do not fit": 0}
    assert own.tokenizer.decode(cut.rejected.prompt).startswith("always fun")


@pytest.mark.parametrize(
    ("peft", "least"),
    [
        (None, 0.2),
        ({"kind": "lora", "rank": 4}, 0.2),
        ({"kind": "houlsby", "size": 4}, 0.2),
        ({"kind": "prompt", "tokens": 4}, 0.0),  # four vectors can turn a model of two random blocks but little
    ],
)
def test_a_run_moves_towards_what_was_chosen(tiny_gpt, tmp_path, peft, least):
    rows = [{"prompt": f"was the {w}", "chosen": GOOD, "rejected": BAD} for w in ("film", "plot", "music", "story")]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = {"out": str(tmp_path / "o"), "model": {"name": str(tiny_gpt)}, "task": {"kind": "dpo"}, "peft": peft,
           "data": {"train": str(tmp_path), "allow_overlap": True}, "optim": {"lr": 1e-2},
           "train": {"steps": 20, "precision": "fp32", "micro_batch": 2, "length": 64}}  # fmt: skip
    training = prepare_run(build(FinetuneRun, run, where="test"))
    assert all(pair.reference < (0.0, 0.0) for pair in training.parts.data)
    assert all(check.ok for check in training.check())
    report = ronna.finetune(**run)
    assert report["test"]["accuracy"]["value"] >= 0.75 and report["test"]["margin"]["value"] > least
    # What is left is a folder to converse with.
    loaded = ronna.load(str(tmp_path / "o" / "model"))
    assert loaded.task.kind == "dialogue" and loaded.generate(["was the film"])[0].finish in ("eos", "length")
