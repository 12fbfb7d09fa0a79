"""`ronna plan`: laptop users' questions, silly ones, and run files that it writes."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ronna import asked as asking
from ronna import trial as trials
from ronna.asked import RANKS, PlanRun, adapter_for
from ronna.base.config import build, read_toml
from ronna.base.errors import RonnaError
from ronna.cli import main
from ronna.model.families import preset
from ronna.peft import houlsby
from ronna.peft.adalora import AdaLoraConfig
from ronna.peft.houlsby import HoulsbyConfig
from ronna.peft.lora import LoraConfig
from ronna.peft.prefix import PrefixConfig
from ronna.peft.prompt import PromptConfig
from ronna.plan.hardware import PROCESS, cpu, parse_bytes
from ronna.plan.memory import estimate
from ronna.plan.search import search
from ronna.planned import adapter_of, expected, peft_of, with_plan, work_of
from ronna.runfile import FinetuneRun, PretrainRun
from ronna.text.tokenizer import load_tokenizer
from ronna.trial import Taken
from ronna.verbs.plan import plan


def ask(**question: Any) -> dict[str, Any]:
    return plan(build(PlanRun, question, where="plan()"))


def refused(**question: Any) -> str:
    with pytest.raises(RonnaError) as error:
        ask(**question)
    return str(error.value)


@pytest.mark.parametrize(
    "question",
    [
        {"model": "llama-3-8b", "peft": "lora", "hardware": "gpu", "memory": "24GB"},
        {"model": "qwen3-0.6b", "task": "dialogue", "hardware": "gpu", "memory": "8GB"},
        {"model": "bert-base", "hardware": "cpu", "memory": "16GB", "hours": 10},
        {"model": "gpt2-xl", "hardware": "h200", "hours": 24},
        {"model": "t5-base", "hardware": "a10", "task": "seq2seq", "peft": "houlsby"},
        {"model": "llama-1b", "largest": True, "hours": 48, "hardware": "4xa100-80gb"},
        {"model": "modernbert-base", "hardware": "gpu", "memory": "6GiB", "task": "tag", "length": 1024},
        {"model": "llama-3-8b", "peft": "lora", "quantize": "nf4", "hardware": "gpu", "memory": "12GiB"},
    ],
    ids=str,
)
def test_questions_of_users(question: dict[str, Any]) -> None:
    answer = ask(**question)
    best = answer["plans"][0]
    assert best["fits"]
    assert 0 < best["peak_bytes"] <= answer["memory_bytes"]
    assert best["step_seconds"] > 0
    assert json.loads(json.dumps(answer)) == answer


def test_an_answer_takes_no_torch() -> None:
    code = (
        "import sys; from ronna.cli import main; main(['plan', '--model', 'gpt2', '--hardware', 'h200']); "
        "sys.exit(3 if 'torch' in sys.modules else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_hours_and_tokens_are_two_ways_to_say_it(capsys: pytest.CaptureFixture[str]) -> None:
    rate = ask(model="gpt2", hardware="h200", hours=2.0, price=3.0)["plans"][0]["tokens_per_second"]
    said = capsys.readouterr().err
    assert "tokens take 2.0 h" in said.replace("120 min", "2.0 h")
    assert "6.00 to pay" in said
    ask(model="gpt2", hardware="h200", tokens=rate * 7200 * 3)
    assert "6.0 h" in capsys.readouterr().err


def test_the_largest_grows_with_memory_and_fits_only_just() -> None:
    sizes = [
        ask(model="llama-130m", largest=True, memory=memory, hardware="cpu", batch=4, length=128)
        for memory in ("1GiB", "2GiB", "4GiB")
    ]
    params = [answer["parameters"] for answer in sizes]
    assert params == sorted(params)
    assert params[2] > 2 * params[0]
    for answer, memory in zip(sizes, ("1GiB", "2GiB", "4GiB"), strict=True):
        peaks = [p["peak_bytes"] for p in answer["plans"] if p["fits"]]
        assert 0.93 * parse_bytes(memory) < min(peaks) <= parse_bytes(memory)


def test_more_hours_make_a_larger_model_best() -> None:
    hours = [1, 100]
    small, large = (ask(model="llama-130m", largest=True, hardware="h200", hours=h)["parameters"] for h in hours)
    assert 3 < large / small < 100  # about the root of it


def test_several_devices_share_a_step() -> None:
    one, four = (ask(model="gpt2", hardware=f"{n}xa100-80gb", batch=64) for n in (1, 4))
    assert four["plans"][0]["peak_bytes"] < one["plans"][0]["peak_bytes"]
    assert 2 < four["plans"][0]["tokens_per_second"] / one["plans"][0]["tokens_per_second"] <= 4.1


def test_several_devices_in_several_ways() -> None:
    question: dict[str, Any] = {"model": "qwen3-0.6b", "batch": 16, "length": 1024}
    answer = ask(**question, hardware="16xa100-80gb")
    ranks = [p["ranks"] for p in answer["plans"]]
    degrees = ("replicate", "shard", "pipeline", "context", "tensor")
    assert all(math.prod(r[name] for name in degrees) == 16 for r in ranks) and len(ranks) > 4
    seconds = [p["step_seconds"] for p in answer["plans"] if p["fits"]]
    assert seconds == sorted(seconds) and len(seconds) == len(ranks)
    assert all(0 <= p["waiting"] < 1 for p in answer["plans"])
    slow = ask(**question, hardware="16xa100-80gb", network=1.0)["plans"][0]
    assert slow["tokens_per_second"] < answer["plans"][0]["tokens_per_second"]
    apart = ask(**question, hardware="16xa100-80gb", machine=2)
    assert max(p["ranks"]["tensor"] for p in apart["plans"]) == 2


def test_a_long_text_for_several_devices() -> None:
    question: dict[str, Any] = {"model": "qwen3-0.6b", "hardware": "4xrtx4090", "batch": 1}
    assert all(p["ranks"]["context"] == 1 for p in ask(**question, length=2048)["plans"])
    plans = ask(**question, length=32768)["plans"]
    assert plans[0]["fits"] and plans[0]["ranks"]["context"] == 4


def test_what_one_device_cannot_hold_many_can(capsys: pytest.CaptureFixture[str]) -> None:
    question: dict[str, Any] = {"model": "llama-3-8b", "exact": True, "length": 2048, "memory": "32GiB"}
    said = refused(**question, hardware="a100-80gb")
    assert "nothing fits" in said and "--hardware 2xa100-80gb" in said
    assert "more devices" not in refused(model="llama-3-8b", memory="2GiB", hardware="cpu")
    answer = ask(**question, hardware="8xa100-80gb")
    assert answer["plans"][0]["fits"] and not answer["plans"][-1]["fits"]
    said = capsys.readouterr().err
    assert "8 shards" in said and "for others" in said and "lacks" in said


def test_the_run_file_of_several_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    answer = ask(model="llama-1b", hardware="4xa100-80gb", batch=8, write=str(path), data="shards")
    assert "--nproc 4" in capsys.readouterr().err
    run = build(PretrainRun, read_toml(str(path)), where="run.toml")
    best = answer["plans"][0]
    assert run.train.batch == 8
    assert run.parallel.replicate == best["ranks"]["replicate"] and run.parallel.tensor == best["ranks"]["tensor"]
    ask(model=str(path), hardware="4xa100-80gb")  # which can be asked about again
    ask(model="llama-1b", hardware="16xa100-80gb", machine=4, batch=16, write=str(path), data="shards")
    assert "torchrun with 4 processes on each of 4 machines" in capsys.readouterr().err
    path.write_text(path.read_text().replace('weights = "fp32"', 'weights = "bf16"'))
    assert "weights held in bf16" in refused(model=str(path), hardware="4xa100-80gb")


def test_exact_and_optimizers() -> None:
    question: dict[str, Any] = {"model": "gpt2", "hardware": "gpu", "memory": "5GiB"}
    assert all(p["exact"] for p in ask(**question, exact=True)["plans"])
    assert not all(p["exact"] for p in ask(**question)["plans"])
    held = [ask(**question, optim=kind)["plans"][0]["held"]["optimizer"] for kind in ("adamw", "adafactor")]
    assert held[1] < 0.1 * held[0]


def test_precision_vocabulary_and_rank() -> None:
    base: dict[str, Any] = {"model": "gpt2", "hardware": "a100-80gb"}
    fp32, bf16 = (ask(**base, precision=p)["plans"][0] for p in ("fp32", "bf16"))
    assert fp32["step_seconds"] > bf16["step_seconds"]
    assert ask(**base, vocab=1000)["parameters"] < ask(**base)["parameters"]
    low, high = (ask(**base, peft="lora", rank=r)["plans"][0]["held"]["optimizer"] for r in (4, 64))
    assert high == pytest.approx(16 * low, rel=0.01)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ({"model": "gpt2", "hardware": "h2000"}, ["h2000", "h200", "memory"]),
        ({"model": "gpt2", "hardware": "gpu"}, ["--memory"]),
        ({"model": "gpt2", "memory": "0GiB"}, ["memory", "above 0"]),
        ({"model": "gpt2", "memory": "-3GiB"}, ["memory"]),
        ({"model": "gpt2", "memory": "lots"}, ["lots", "24GiB"]),
        ({"model": "gpt2", "memory": "100MiB", "hardware": "cpu"}, ["less than a process takes", "more memory"]),
        ({"model": "llama-3-8b", "memory": "2GiB", "hardware": "cpu"}, ["nothing fits", "lacks", "--peft lora"]),
        ({"model": "llama-3-8b", "memory": "3GiB", "hardware": "gpu", "peft": "lora"}, ["--quantize nf4"]),
        ({"model": "gpt3"}, ["gpt3", "gpt2"]),
        ({"model": "./nowhere"}, ["nowhere", "no such folder"]),
        ({"model": "gpt2", "hours": -3}, ["hours", "greater than 0"]),
        ({"model": "gpt2", "task": "mlm"}, ["cannot be trained by mlm", "clm"]),
        ({"model": "gpt2", "length": 4096}, ["4096", "1024"]),
        ({"model": "gpt2", "quantize": "nf4"}, ["4 bits", "--peft"]),
        ({"model": "llama-tiny", "peft": "bitfit"}, ["no bias", "lora"]),
        ({"model": "modernbert-tiny", "peft": "prefix"}, ["window", "prompt"]),
        ({"model": "gpt2", "peft": "prompt", "rank": 2000}, ["2000 virtual tokens", "1024", "fewer"]),
        ({"model": "bert-base", "peft": "prefix", "rank": 512}, ["512 virtual tokens", "rank"]),
        ({"model": "t5-small", "task": "classify"}, ["no classifier"]),
        ({"model": "gpt2", "precision": "bf16", "hardware": "t4"}, ["t4", "bf16", "fp32"]),
        ({"model": "gpt2", "write": "run.toml"}, ["--data"]),
        ({"model": "gpt2", "write": "run.txt", "data": "d"}, ["run.txt", ".toml"]),
        ({"model": "gpt2", "hardware": "2xh200", "optim": "muon"}, ["muon", "several devices"]),
        ({"model": "llama-3-8b", "hardware": "2xh200", "peft": "lora", "quantize": "nf4"}, ["4 bits", "one device"]),
        ({"model": "gpt2", "hardware": "64xh200", "batch": 2}, ["2 sequences", "64 devices", "at least"]),
        ({"model": "bert-base", "hardware": "2xh200", "task": "embed"}, ["embed", "several devices"]),
        ({"model": "bert-base", "hardware": "2xh200", "peft": "adalora"}, ["adalora", "several devices"]),
        ({"model": "gpt2", "hardware": "2xh200", "machine": 0}, ["machine"]),
        ({"model": "gpt2", "hardware": "2xh200", "network": -1}, ["network"]),
        ({"model": "./x", "largest": True}, ["family"]),
        ({"model": "gpt2", "tokenizer": "./nowhere"}, ["nowhere"]),
        ({"model": "gpt2", "tokenizer": "t", "vocab": 100}, ["vocab", "one of the two"]),
        ({"model": "nowhere.toml"}, ["nowhere.toml", "cannot be read"]),
    ],
    ids=str,
)
def test_silly_questions(question: dict[str, Any], words: list[str]) -> None:
    said = refused(**question)
    assert "fix:" in said
    for word in words:
        assert word in said


def test_it_writes_runs_that_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.toml"
    ask(model="llama-60m", memory="1200MiB", hardware="cpu", data="shards/train", write=str(path), tokens=1e6, out="o")
    run = build(PretrainRun, read_toml(path), where=str(path))
    assert (run.out, run.data.train, run.train.tokens, run.train.batch) == ("o", "shards/train", 10**6, 32)
    assert run.train.micro_batch is not None or run.train.recompute.feeds or run.train.recompute.blocks
    again = ask(model=str(path), memory="1200MiB", hardware="cpu")
    assert again["plans"][0]["name"] == "as asked for"


@pytest.mark.parametrize("decay", [None, 0.3])
def test_another_optimizer_has_the_rates_and_decay_of_the_one_in_its_place(decay: float | None) -> None:
    own: dict[str, Any] = {"lr": 2e-4, "rates": {"norm": 0.5}, "betas": [0.8, 0.9], "eps": 1e-6}
    own |= {"kind": "adam"} if decay is None else {"kind": "adamw", "weight_decay": decay}
    tree = {"out": "o", "model": {"name": "llama-60m"}, "data": {"train": "d"}, "objective": {"kind": "clm"}}
    run = build(PretrainRun, tree | {"optim": own}, where="here")
    family, cfg = preset("llama-60m")
    work = work_of(run, *expected(run, family, cfg), kind="cpu", compute="fp32")
    plans = [p for p in search(work, 2**40, lambda step: 1.0) if p.step.optimizer != work.step.optimizer]
    found = [with_plan(run, plan, work).optim for plan in plans]
    assert {optim.kind for optim in found} >= {"apollo"}
    kept = {key: own.get(key, 0.0) for key in ("lr", "rates", "betas", "eps", "weight_decay")}
    assert all(optim.model_dump(mode="json", include=set(kept)) == kept for optim in found)


def test_the_largest_is_written_with_its_shape(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    answer = ask(model="llama-60m", largest=True, memory="1GiB", hardware="cpu", batch=2, data="d", write=str(path))
    run = build(PretrainRun, read_toml(path), where=str(path))
    assert run.model.settings == answer["settings"] != {}
    again = ask(model=str(path), memory="1GiB", hardware="cpu")
    assert again["parameters"] == answer["parameters"]
    assert again["plans"][0]["name"] == "as asked for"


def test_a_written_adapter_has_a_base(tiny_bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    ask(model=str(tiny_bert), peft="houlsby", rank=4, data="rows.csv", write=str(path), length=32)
    run = build(FinetuneRun, read_toml(path), where=str(path))
    assert run.peft == HoulsbyConfig(size=4)
    assert "weights to fine-tune" in refused(model="bert-base", peft="lora", data="rows.csv", write=str(path))


def test_new_weights_are_tuned_with_a_tokenizer(tiny_bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    asked: dict[str, Any] = {"model": "bert-base", "task": "classify", "data": "rows.csv", "write": str(path)}
    said = refused(**asked)
    assert "weights to fine-tune" in said and "--tokenizer" in said
    assert "new ones" not in refused(**asked, peft="lora", tokenizer=str(tiny_bert))
    asked |= {"largest": True, "memory": "2GiB", "hardware": "cpu", "batch": 4, "length": 64}
    answer = ask(**asked, tokenizer=str(tiny_bert))
    run = build(FinetuneRun, read_toml(path), where=str(path))
    assert (run.model.name, run.model.settings, run.model.tokenizer) == (
        "bert-base",
        answer["settings"],
        str(tiny_bert),
    )
    assert (run.task.kind, run.train.length, run.peft) == ("classify", 64, None)
    vocab = load_tokenizer(tiny_bert).vocab_size
    assert answer["parameters"] == ask(**asked | {"write": None}, vocab=vocab)["parameters"]


def test_a_run_file_says_the_rest_itself(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    ask(model="gpt2-tiny", data="shards", write=str(path), hardware="cpu", length=128)
    assert "batch" in refused(model=str(path), batch=4)


def test_ranks_are_those_of_the_methods() -> None:
    own = {"lora": LoraConfig().rank, "adalora": AdaLoraConfig().rank, "houlsby": HoulsbyConfig().size}
    assert own | {"prompt": PromptConfig().tokens, "prefix": PrefixConfig().tokens} == RANKS
    assert adapter_for("houlsby", None).targets == houlsby.PLACES


@pytest.mark.parametrize("method", ["lora", "houlsby", "bitfit", "prompt", "prefix"])
def test_a_method_is_planned_as_what_it_is(method: Any) -> None:
    asked = adapter_for(method, None)
    assert adapter_of(peft_of(asked)) == asked
    other = replace(asked, rank=3, act="relu", hidden=7) if method != "bitfit" else asked
    kept = {"lora": {"rank": 3}, "houlsby": {"rank": 3, "act": "relu"}, "bitfit": {}, "prompt": {"rank": 3},
            "prefix": {"rank": 3, "hidden": 7}}[method]  # fmt: skip
    assert adapter_of(peft_of(other)) == replace(asked, **kept)


@pytest.mark.parametrize(("method", "text", "held"), [("prompt", 492, 512), ("prefix", 492, 492), ("lora", 512, 512)])
def test_virtual_tokens_take_positions_of_a_text(method: str, text: int, held: int) -> None:
    """As in a run, where a text of BERT's has at most 512 of them."""
    question = build(PlanRun, {"model": "bert-base", "peft": method, "length": 512}, where="plan()")
    work = asking.asked(question, *asking.published(question, "bert-base"), "cpu", "fp32").work
    assert work.shape(1).lengths.length == text and work.step.lengths.length == held


def test_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["plan", "--model", "gpt2", "--hardware", "h200", "--tokens", "1e9", "--json"])
    out = capsys.readouterr()
    assert code == 0
    assert json.loads(out.out)["device"] == "h200"
    assert "best" in out.err and "tokens take" in out.err
    assert main(["plan", "--model", "gpt2", "--hours", "-1"]) == 2


@pytest.mark.parametrize("ratio", [0.8, 1.0, 1.3])
def test_a_plan_is_corrected_by_what_its_steps_take(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every step took so many times what the formulas say."""

    def trial(model: Any, step: Any) -> Taken:
        return Taken(int(ratio * estimate(model.shape()[1], step).peak), 1.0)

    monkeypatch.setattr(trials, "trial", trial)
    monkeypatch.setattr(asking, "measured_here", lambda kind: cpu(2, ["avx2"], 2**40))
    limit = parse_bytes("1500MiB")
    question: dict[str, Any] = {"model": "llama-60m", "memory": "1500MiB", "hardware": "cpu", "probe": True}
    usual = ask(**question, batch=8, length=256)
    assert usual["tried"]["grown"] <= limit
    peak = usual["plans"][0]["peak_bytes"]
    assert peak == pytest.approx(usual["tried"]["grown"] / min(ratio, 1) + PROCESS, rel=0.02)
    most = ask(**question, batch=4, length=128, largest=True)
    assert 0.93 * limit < most["tried"]["grown"] + PROCESS <= 0.98 * limit


def test_what_ends_for_want_of_memory_is_planned_leaner(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def trial(model: Any, step: Any) -> Taken | None:
        asked.append(estimate(model.shape()[1], step).peak)
        return None if len(asked) < 3 else Taken(asked[-1], 1.0)

    monkeypatch.setattr(trials, "trial", trial)
    monkeypatch.setattr(asking, "measured_here", lambda kind: cpu(2, ["avx2"], 2**40))
    answer = ask(model="llama-60m", memory="1500MiB", hardware="cpu", probe=True, batch=8, length=256)
    assert asked[0] > asked[1] > asked[2]
    assert answer["tried"]["grown"] == asked[2]


def test_the_largest_lies_between_what_fits_and_what_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the formulas were too low for every second width and too high for the others."""
    took: list[tuple[int, int]] = []

    def trial(model: Any, step: Any) -> Taken:
        shape = model.shape()[1]
        odd = model.settings["hidden_size"] // 64 % 2
        took.append((shape.params(), int((1.15 if odd else 0.92) * estimate(shape, step).peak)))
        return Taken(took[-1][1], 1.0)

    monkeypatch.setattr(trials, "trial", trial)
    monkeypatch.setattr(asking, "measured_here", lambda kind: cpu(2, ["avx2"], 2**40))
    between = 0
    for mebibytes in (900, 1200, 1500):
        took.clear()
        answer = ask(model="llama-60m", memory=f"{mebibytes}MiB", hardware="cpu", probe=True, batch=4, length=128,
                     largest=True)  # fmt: skip
        room = int(0.98 * mebibytes * 2**20) - PROCESS
        fitting = [size for size, grown in took if grown <= room]
        assert len(dict(took)) == len(took), "a size was tried twice"
        assert all(size < least for i, (size, _) in enumerate(took) for least, grown in took[:i] if grown > room)
        assert answer["parameters"] == max(fitting)
        between += any(size < least for i, (size, grown) in enumerate(took) if grown <= room for least, _ in took[:i])
    assert between, "none of these was tried below one that does not fit"
