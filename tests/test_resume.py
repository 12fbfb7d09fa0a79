"""A run may be cut at any step, or killed at any moment, and end in the same bits."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ronna.base.errors import RonnaError
from ronna.run import Interrupted, Training, prepare_run
from ronna.runfile import FinetuneRun, PretrainRun
from ronna.train import portions, shelf
from ronna.verbs.evaluate import load

STEPS = 6
MODELS = {"mlm": ("bert-tiny", "wordpiece"), "clm": ("gpt2-tiny", "bpe"), "denoise": ("t5-tiny", "unigram")}


def settings(objective: str, shards: dict[str, Path], out: Path, **train: Any) -> PretrainRun:
    model, tokenizer = MODELS[objective]
    config = {"steps": STEPS, "batch": 4, "micro_batch": 3, "length": 32, "log_every": 1, "save_every": 100, **train}
    return PretrainRun.model_validate(
        {
            "out": str(out),
            "seed": 3,
            "device": "cpu",
            "model": {"name": model, "dropout": 0.1},
            "data": {"train": str(shards[tokenizer]), "validation_rows": 4},
            "objective": {"kind": objective},
            "train": config,
        }
    )


def digest(out: Path) -> str:
    return hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()


def cut_at(training: Training, step: int) -> None:
    """Run, and be asked to stop once `step` steps are done."""
    feed = training.feed

    class Cut:
        def __call__(self, now: int):
            if now == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return feed(now)

        def samples(self, now: int):
            return feed.samples(now)

    training.feed = Cut()  # type: ignore[assignment]
    with pytest.raises(Interrupted):
        training.execute()


@pytest.mark.parametrize("objective", MODELS)
def test_resuming_at_every_step_gives_the_same_weights(objective, shards, tmp_path):
    prepare_run(settings(objective, shards, tmp_path / "whole")).execute()
    wanted = digest(tmp_path / "whole")
    metrics = [line for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    for k in range(1, STEPS):
        out = tmp_path / str(k)
        cut_at(prepare_run(settings(objective, shards, out)), k)
        assert [p.name for p in (out / "checkpoints").glob("step-*")] == [f"step-{k:08d}"]
        torch.manual_seed(999 + k)  # whatever the process drew in between must not matter
        prepare_run(settings(objective, shards, out), resume=True).execute()
        assert digest(out) == wanted, f"cut at step {k}"
        assert len((out / "metrics.jsonl").read_text().splitlines()) == len(metrics)


LEAN = [
    {"train": {"weights": "bf16"}},
    {"train": {"fused_backward": True}},
    {"train": {"weights": "bf16", "fused_backward": True, "recompute": {"blocks": "all"}}, "optim": {"kind": "apollo"}},
    {"train": {"fused_backward": True, "clip": 0}, "optim": {"kind": "adamw8bit"}},
    {"train": {"offload": ["optimizer"]}},
]


def frugal(shards: dict[str, Path], out: Path, ways: dict[str, Any]) -> PretrainRun:
    tree = settings("clm", shards, out, **{"micro_batch": None, **ways["train"]}).model_dump(mode="json")
    return PretrainRun.model_validate(tree | {"optim": ways.get("optim", tree["optim"])})


@pytest.mark.parametrize("ways", LEAN)
def test_ways_to_save_memory_resume_to_the_bit(ways, shards, tmp_path):
    if ways.get("optim", {}).get("kind") == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    report = prepare_run(frugal(shards, tmp_path / "whole", ways)).execute()
    assert report["train"]["steps"] == STEPS
    stored = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    lean = ways["train"].get("weights") == "bf16"
    assert {t.dtype for t in stored.values() if t.ndim == 2} == {torch.bfloat16 if lean else torch.float32}
    cut_at(prepare_run(frugal(shards, tmp_path / "cut", ways)), 3)
    torch.manual_seed(999)
    prepare_run(frugal(shards, tmp_path / "cut", ways), resume=True).execute()
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


SAME = [
    {"fused_backward": True},
    {"recompute": {"blocks": 1, "feeds": "all"}},
    {"offload": ["optimizer", "activations"]},
    {"offload": ["activations"], "recompute": {"blocks": "all"}, "fused_backward": True},
]


@pytest.mark.parametrize("train", SAME)
def test_ways_that_change_no_weight(train, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(shelf, "LEAST", 64)
    monkeypatch.setattr(portions, "LEAST", 64)
    for name, more in (("plain", {}), ("frugal", train)):
        prepare_run(settings("clm", shards, tmp_path / name, **{"micro_batch": None, "clip": 0.3, **more})).execute()
    assert digest(tmp_path / "frugal") == digest(tmp_path / "plain")


def test_recomputing_may_begin_at_a_resumption(shards, tmp_path):
    prepare_run(settings("clm", shards, tmp_path / "plain")).execute()
    cut_at(prepare_run(settings("clm", shards, tmp_path / "cut")), 3)
    prepare_run(settings("clm", shards, tmp_path / "cut", recompute={"blocks": "all"}), resume=True).execute()
    assert digest(tmp_path / "cut") == digest(tmp_path / "plain")


def test_ways_that_do_not_go_together_are_refused(shards, tiny_bert, tmp_path):
    with pytest.raises(RonnaError, match=r"train\.fused_backward: (.|\n)*micro-batches"):
        prepare_run(settings("clm", shards, tmp_path / "a", fused_backward=True))
    for name, value in (("weights", "bf16"), ("fused_backward", True), ("offload", ["optimizer"])):
        run = tuning(tiny_bert, tmp_path / "b", train={"epochs": 1, name: value}, peft={"kind": "lora"})
        with pytest.raises(RonnaError, match=rf"train\.{name}: what an adapter trains is small"):
            prepare_run(run)


def test_dropout_is_on_in_these_runs(shards, tmp_path):
    prepare_run(settings("clm", shards, tmp_path / "a")).execute()
    run = settings("clm", shards, tmp_path / "b")
    prepare_run(run.model_copy(update={"model": run.model.model_copy(update={"dropout": 0.0})})).execute()
    assert digest(tmp_path / "a") != digest(tmp_path / "b")


def test_a_used_folder_is_refused_and_another_config_too(shards, tmp_path):
    run = settings("clm", shards, tmp_path / "run")
    prepare_run(run).execute()
    with pytest.raises(RonnaError, match="holds a run already"):
        prepare_run(run)
    with pytest.raises(RonnaError, match="another config"):
        prepare_run(settings("clm", shards, tmp_path / "run", clip=0.5), resume=True).execute()


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_newest_checkpoint_is_noticed_and_the_one_before_used(damage, shards, tmp_path, capsys):
    prepare_run(settings("clm", shards, tmp_path / "whole", save_every=2)).execute()
    out = tmp_path / "cut"
    cut_at(prepare_run(settings("clm", shards, out, save_every=2)), 5)
    file = out / "checkpoints" / "step-00000005" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
    else:
        del data[-100:]
    file.write_bytes(bytes(data))
    prepare_run(settings("clm", shards, out, save_every=2), resume=True).execute()
    said = capsys.readouterr().err
    assert "step-00000005" in said and "resuming from step-00000004" in said
    assert digest(out) == digest(tmp_path / "whole")


def test_kill_9_at_random_moments_loses_nothing(shards, tmp_path):
    """Ten kills over the life of one run, saving at every step; then it ends as if nothing had happened."""
    many = {"steps": 40, "save_every": 1, "evaluate_every": 40}
    prepare_run(settings("clm", shards, tmp_path / "whole", **many)).execute()
    out, rng = tmp_path / "killed", random.Random(7)
    from ronna.base.config import dump_toml

    out.mkdir()
    file = tmp_path / "run.toml"
    file.write_text(dump_toml(settings("clm", shards, out, **many)))
    command = [sys.executable, "-m", "ronna", "pretrain", str(file), "--resume"]
    kills = 0
    while kills < 10:
        child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        before = newest(out)
        while child.poll() is None and newest(out) <= before:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.15)
        if child.poll() is not None:
            break
        child.send_signal(signal.SIGKILL)
        child.wait()
        kills += 1
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert kills == 10, "the run ended before it could be killed ten times"
    assert digest(out) == digest(tmp_path / "whole")


def newest(out: Path) -> int:
    steps = [int(p.name.removeprefix("step-")) for p in (out / "checkpoints").glob("step-????????")]
    return max(steps, default=0)


def tuning(model: Path, out: Path, quantize: str | None = None, **more: Any) -> FinetuneRun:
    rng = random.Random(1)
    train = out.parent / "train.jsonl"
    rows = [
        {"text": " ".join(rng.choices("the film was good bad".split(), k=5 + i % 3)), "label": i % 2} for i in range(40)
    ]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FinetuneRun.model_validate(
        {
            "out": str(out),
            "device": "cpu",
            "model": {"name": str(model), "dropout": 0.1, "quantize": quantize},
            "data": {"train": str(train)},
            "train": {"steps": STEPS, "batch": 8, "micro_batch": 5, "length": 32, "evaluate_every": 2},
            **more,
        }
    )


def test_fine_tuning_resumes_with_the_same_weights_and_leaves_unused_rows_alone(tiny_bert, tmp_path):
    whole = prepare_run(tuning(tiny_bert, tmp_path / "whole"))
    used = set(whole.parts.used.tolist())
    assert 5 < len(used) < 0.5 * whole.parts.model.cfg.embedding.vocab
    whole.execute()
    tables = [load_file(folder / "model.safetensors") for folder in (tiny_bert, tmp_path / "whole" / "model")]
    before, after = (next(t for n, t in table.items() if "word_embeddings" in n) for table in tables)
    assert {i for i in range(len(before)) if not torch.equal(before[i], after[i])} == used
    for k in range(1, STEPS):
        cut_at(prepare_run(tuning(tiny_bert, tmp_path / str(k))), k)
        prepare_run(tuning(tiny_bert, tmp_path / str(k)), resume=True).execute()
        assert digest(tmp_path / str(k)) == digest(tmp_path / "whole"), f"cut at step {k}"


@pytest.mark.parametrize("kind", ["lora", "adalora", "houlsby", "bitfit", "lora, nf4", "bitfit, nf4_double"])
def test_an_adapter_resumes_with_the_same_weights_from_the_adapter_alone(kind, tiny_bert, tmp_path):
    kind, _, quantize = kind.partition(", ")
    if quantize:
        pytest.importorskip("bitsandbytes")

    def run(name: str | int) -> FinetuneRun:
        allocated = {"rank": 4, "target_rank": 2, "every": 1, "warmup": 0.0, "dropout": 0.1}
        more = {"lora": {"dropout": 0.1, "dora": True}, "adalora": allocated}.get(kind, {})
        return tuning(tiny_bert, tmp_path / str(name), quantize or None, peft={"kind": kind, **more})

    prepare_run(run("whole")).execute()
    wanted = load_file(tmp_path / "whole" / "model" / "adapter_model.safetensors")
    for k in range(1, STEPS):
        cut_at(prepare_run(run(k)), k)
        checkpoint = tmp_path / str(k) / "checkpoints" / f"step-{k:08d}"
        files = {"adapter_model", "optimizer", "trained"} | ({"allocator"} if kind == "adalora" else set())
        assert {p.stem for p in checkpoint.rglob("*.safetensors")} == files
        prepare_run(run(k), resume=True).execute()
        found = load_file(tmp_path / str(k) / "model" / "adapter_model.safetensors")
        assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted), f"cut at {k}"
    base = load_file(tiny_bert / "model.safetensors")
    moved = tmp_path / "other"
    shutil.copytree(tiny_bert, moved)
    save_file({n: t + 1e-3 for n, t in base.items()}, moved / "model.safetensors", metadata={"format": "pt"})
    other = run(1).model_copy(update={"model": run(1).model.model_copy(update={"name": str(moved)})})
    with pytest.raises(RonnaError, match="base"):
        prepare_run(other, resume=True).execute()


@pytest.mark.parametrize("adapted", [False, True])
def test_a_contrastive_run_in_micro_batches_resumes_with_the_same_weights(adapted, tiny_bert, tmp_path):
    words = "the film was good bad plot music story".split()
    rows = [{"anchor": f"{words[i % 8]} {i}", "positive": f"a {words[i % 8]}", "negative": "dull"} for i in range(40)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"peft": {"kind": "adalora", "every": 1, "dropout": 0.1}} if adapted else {}
    file = "adapter_model.safetensors" if adapted else "model.safetensors"

    def run(name: str | int) -> FinetuneRun:
        return tuning(tiny_bert, tmp_path / str(name), task={"kind": "embed"}, data={"train": str(data)}, **more)

    prepare_run(run("whole")).execute()
    wanted = (tmp_path / "whole" / "model" / file).read_bytes()
    for k in (2, 5):
        cut_at(prepare_run(run(k)), k)
        prepare_run(run(k), resume=True).execute()
        assert (tmp_path / str(k) / "model" / file).read_bytes() == wanted, f"cut at step {k}"


WRITING = {
    "seq2seq": ("tiny_t5", lambda text: {"source": text, "target": "bad plot"}, None),
    "seq2seq, lora": ("tiny_t5", lambda text: {"source": text, "target": "bad plot"}, {"kind": "lora", "dropout": 0.1}),
    "dialogue": ("tiny_gpt", lambda text: {"dialog": [text, "bad plot"]}, None),
    "dpo": ("tiny_gpt", lambda text: {"prompt": text, "chosen": "good", "rejected": "bad"}, None),
    "dpo, lora": ("tiny_gpt", lambda text: {"prompt": text, "chosen": "good", "rejected": "bad"}, {"kind": "lora"}),
}


@pytest.mark.parametrize("case", WRITING)
def test_runs_that_learn_to_write_resume_with_the_same_weights(case, request, tmp_path):
    """Batches of so many tokens, dropout, and a reference that is asked again."""
    folder, record, peft = WRITING[case]
    rng = random.Random(1)
    texts = [" ".join(rng.choices("the film was good bad".split(), k=1 + i % 4)) + f" {i}" for i in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(record(text)) + "\n" for text in texts))
    train = {"steps": STEPS, "batch_tokens": 160, "micro_batch": 2, "length": 64, "evaluate_every": 3}
    task = {"kind": case.partition(",")[0]} | ({"sample": 2} if "seq2seq" in case else {})
    more = {
        "task": task,
        "data": {"train": str(data)},
        "train": train,
        "peft": peft,
        "optim": {"kind": "adamw", "lr": 1e-3},
    }
    file = "adapter_model.safetensors" if peft else "model.safetensors"

    def run(name: str | int) -> FinetuneRun:
        return tuning(request.getfixturevalue(folder), tmp_path / str(name), **more)

    prepare_run(run("whole")).execute()
    wanted = (tmp_path / "whole" / "model" / file).read_bytes()
    for k in (2, 5):
        cut_at(prepare_run(run(k)), k)
        prepare_run(run(k), resume=True).execute()
        assert (tmp_path / str(k) / "model" / file).read_bytes() == wanted, f"cut at step {k}"


def test_what_is_tested_at_the_end_is_what_the_folder_gives(tiny_bert, tmp_path):
    run = tuning(tiny_bert, tmp_path / "run")
    training = prepare_run(run.model_copy(update={"train": run.train.model_copy(update={"precision": "bf16"})}))
    tested = []
    training.parts.test = lambda model: tested.append(model.state_dict()) or {}
    training.execute()
    given = load(str(tmp_path / "run" / "model"), precision="bf16").model.state_dict()
    [found] = tested
    assert found.keys() == given.keys() and all(torch.equal(found[name], given[name]) for name in given)
