"""The verbs as a user meets them: from the command line, with right and wrong input."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from ronna.cli import VERBS, joined, main


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    """A folder of splits whose label is told by one word, so that even a tiny model learns it."""
    folder, rng = tmp_path_factory.mktemp("reviews"), random.Random(0)
    neutral = ["the", "film", "was", "a", "plot", "with", "acting", "and", "music", "story"]
    for split, n in (("train", 240), ("validation", 40), ("test", 40)):
        rows = []
        for i in range(n):
            words = rng.choices(neutral, k=rng.randint(4, 12))
            words.insert(rng.randrange(len(words)), "great" if i % 2 else "awful")
            rows.append({"text": f"{' '.join(words)} {split} {i}", "label": "pos" if i % 2 else "neg"})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def finetune(tiny_bert: Path, train: Path, out: Path, *more: str) -> int:
    settings = ["--set", "model.dropout=0.0", "--length", "32", "--lr", "3e-3", "--epochs", "4", "--precision", "fp32"]
    return main(["finetune", "--model", str(tiny_bert), "--train", str(train), "--out", str(out), *settings, *more])


@pytest.fixture(scope="module")
def tuned(tiny_bert, reviews, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tuned"
    assert finetune(tiny_bert, reviews, out, "--batch", "16") == 0
    return out


def test_finetune_leaves_a_whole_run_folder(tuned):
    report = json.loads((tuned / "report.json").read_text())
    assert report["task"] == "classify" and report["test"]["accuracy"]["value"] > 0.9
    assert report["test"]["accuracy"]["low"] <= report["test"]["accuracy"]["value"]
    assert report["train"]["steps"] == 60 and 0.9 < report["train"]["packing"] <= 1
    assert report["data"]["rows_in"] == report["data"]["kept"] == 240
    assert {p.name for p in tuned.iterdir()} >= {"run.toml", "metrics.jsonl", "report.html", "checkpoints", "model"}


def test_transformers_loads_what_finetune_saved(tuned, reviews):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tuned / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tuned / "model")
    rows = [json.loads(line) for line in (reviews / "test.jsonl").read_text().splitlines()][:8]
    from ronna import load

    ours = load(str(tuned / "model"), precision="fp32").predict([r["text"] for r in rows])
    for row, answer in zip(rows, ours, strict=True):
        p = model(**tokenizer(row["text"], return_tensors="pt")).logits.softmax(-1)[0]
        name = model.config.id2label[int(p.argmax())]
        assert answer["label"] == name and answer["probability"] == pytest.approx(float(p.max()), abs=1e-5)


def test_evaluate_repeats_the_test_report(tuned, reviews, tmp_path, capsys):
    data = str(reviews / "test.jsonl")
    assert main(["evaluate", "--model", f"{tuned}/model", "--data", data, "--out", f"{tmp_path}/e", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = json.loads((tuned / "report.json").read_text())
    assert found["test"]["accuracy"] == wanted["test"]["accuracy"]
    assert (tmp_path / "e" / "report.html").exists()


def test_predict_streams_every_record_in_order(tuned, reviews, tmp_path):
    source, target = reviews / "test.jsonl", tmp_path / "out.jsonl"
    call = ["predict", "--model", f"{tuned}/model", "--input", str(source), "--output", str(target)]
    assert main([*call, "--set", "batch=7"]) == 0
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [r["text"] for r in rows] == [json.loads(x)["text"] for x in source.read_text().splitlines()]
    assert sum(r["prediction"]["label"] == r["label"] for r in rows) / len(rows) > 0.9


def test_predict_says_what_it_has_cut(tuned, tmp_path, capsys):
    rows = [{"text": "the film was great " * many} for many in (1, 30, 2, 40)]
    write(tmp_path / "long.jsonl", *map(json.dumps, rows))
    call = ["predict", "--model", f"{tuned}/model", "--input", str(tmp_path / "long.jsonl"), "--json"]
    assert main([*call, "--output", str(tmp_path / "out"), "--set", "batch=2"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["data"]["cut"] == 2 and "2 cut" in printed.err


def test_predict_reads_standard_input_and_writes_standard_output(tuned):
    command = [sys.executable, "-m", "ronna", "predict", "--model", f"{tuned}/model"]
    line = json.dumps({"text": "the film was great", "id": 7}) + "\n"
    done = subprocess.run(command, input=line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["id"] == 7 and "label" in json.loads(done.stdout)["prediction"]


def test_generate_and_perplexity(tiny_gpt, reviews, capsys):
    call = ["generate", "--model", str(tiny_gpt), "--prompt", "the film", "a plot", "--max-tokens", "5"]
    assert main(call) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [x["prompt"] for x in lines] == ["the film", "a plot"]
    assert main(["evaluate", "--model", str(tiny_gpt), "--data", f"{reviews}/test.jsonl", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["test"]["bits_per_byte"]["value"] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("finetune --lenght 3", "no argument --lenght; did you mean --length?"),
        ("pretrain --optim=muon", "--set optim.kind=muon"),
        ("plan --model gpt2 --what", "no argument --what\n  fix: `ronna plan --help`"),
        ("predict a b c", "no argument b"),
    ],
)
def test_unknown_arguments_are_told_with_what_was_meant(arguments, says, capsys):
    assert main(arguments.split()) == 2
    assert says in capsys.readouterr().err


def test_data_inspect_says_what_is_there(reviews, tiny_bert, capsys):
    assert main(["data", "inspect", str(reviews), "--tokenizer", str(tiny_bert), "--json"]) == 0
    out = capsys.readouterr()
    report = json.loads(out.out)
    assert report["train"]["labels"] == {"neg": 120, "pos": 120} and report["train"]["format"] == "jsonl"
    assert report["train"]["tokens"]["p100"] >= 6 and report["overlap"] == {}
    assert "single labels" in out.err and report["train"]["scripts"] == {"Latin": 1.0}
    assert report["command"].startswith(f"ronna finetune --model {tiny_bert} --train {reviews} --length ")


INSPECTED = {
    "tag": ({"tokens": ["北", "京"], "tags": ["B-LOC", "I-LOC"]}, {"LOC": 1}, "Cjk"),
    "relation": ({"text": "a <e1>b</e1> c <e2>d</e2>", "label": "x(e1,e2)"}, {"x(e1,e2)": 1}, "Latin"),
    "span_qa": ({"context": "a b", "qas": [{"question": "q", "answers": []}]}, {"no answer": 1}, "Latin"),
    "classify": ({"sentence": "a b", "score": 0.5}, {"least": 0.5, "most": 0.5, "mean": 0.5}, "Latin"),
}


@pytest.mark.parametrize("task", INSPECTED)
def test_data_inspect_knows_the_task(task, tmp_path, capsys):
    row, labels, script = INSPECTED[task]
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["data", "inspect", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["train"]["labels"] == labels and script in report["train"]["scripts"]
    assert (f"--task {task} " in report["command"]) == (task != "classify")


TO_TEXT = {
    "a summary": ({"text": "a b c", "summary": "a", "topic": "x"}, "", ("text", "summary")),
    "in and out": ({"source": "a b", "target": "c"}, "", ("source", "target")),
    "two languages": ({"en": "a", "de": "b"}, "", ("en", "de")),
    "the other way": ({"en": "a", "zh-CN": "b", "id": "7"}, "--label en", ("zh-CN", "en")),
    "nested": ({"id": 3, "translation": {"german": "a", "english": "b"}}, "--text english", ("english", "german")),
    "three languages": ({"en": "a", "de": "b", "fr": "c"}, "--text fr --label de", ("fr", "de")),
}
OTHERS = {
    "a summary beside classes": ({"text": "a", "summary": "b", "label": 1}, "", "classify"),
    "another label": ({"text": "a", "summary": "b", "topic": "x"}, "--label topic", "classify"),
    "numbers": ({"source": "a", "target": 3}, "", "classify"),
    "an instruction": ({"instruction": "a", "input": "b", "output": "c", "label": "d"}, "--text output", "classify"),
    "a question": ({"question": "a", "context": "b", "answers": [], "summary": "c"}, "", "span_qa"),
}


TALKS = {
    "messages": ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]}, "dialogue"),
    "sharegpt": ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "bc"}]}, "dialogue"),
    "turns": ({"dialog": ["a", "bc"], "label": 1}, "dialogue"),
    "alpaca": ({"instruction": "a", "input": "", "output": "bc"}, "dialogue"),
    "completion": ({"prompt": "a", "completion": "bc"}, "dialogue"),
    "no context": ({"question": "a", "answer": "bc"}, "dialogue"),
    "choices": ({"prompt": "a", "chosen": "bc", "rejected": "c"}, "dpo"),
}


@pytest.mark.parametrize("case", TALKS)
def test_data_inspect_knows_conversations(case, tmp_path, capsys):
    row, task = TALKS[case]
    report, command = inspected(tmp_path, capsys, row, "")
    assert report["task"] == task and report["labels"]["characters p100"] == 2 and f"--task {task} " in command


def inspected(tmp_path, capsys, row, flags: str) -> tuple[dict, str]:
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["data", "inspect", str(tmp_path), "--json", *flags.split()]) == 0
    report = json.loads(capsys.readouterr().out)
    return report["train"], report["command"]


@pytest.mark.parametrize("case", TO_TEXT)
def test_data_inspect_knows_texts_that_are_made_of_others(case, tiny_t5, tmp_path, capsys):
    row, flags, (text, label) = TO_TEXT[case]
    report, command = inspected(tmp_path, capsys, row, f"{flags} --tokenizer {tiny_t5}")
    assert report["task"] == "seq2seq" and report["columns"] == {"text": text, "pair": None, "label": label}
    assert report["problem"] == "text" and report["labels"]["characters p100"] == 1
    assert report["target_tokens"]["p100"] >= 1
    usual = (text, label) in (("text", "summary"), ("source", "target"))
    assert (f"--text {text} --label {label} " in command) == (not usual) and "--task seq2seq " in command
    words = command.split()[1:]
    given = words[1 : words.index("--out")]  # what it says is taken as it stands
    assert main(["finetune", *given, "--validation", f"{tmp_path}/train.jsonl", "--allow-overlap", "--epochs", "1",
                 "--out", f"{tmp_path}/run"]) == 0  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_data_inspect_does_not_take_every_text_for_one_to_write(case, tmp_path, capsys):
    row, flags, task = OTHERS[case]
    report, command = inspected(tmp_path, capsys, row, flags)
    assert report.get("task", "classify") == task and "seq2seq" not in (command or "")


def test_data_inspect_of_rows_without_use_suggests_nothing(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text('{"text": "", "label": "a"}\n' * 3, encoding="utf-8")
    assert main(["data", "inspect", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["command"] is None and report["train"]["rows"]["reasons"]["empty text"]["count"] == 3


def test_data_inspect_counts_scores_that_are_none(tmp_path, capsys):
    rows = [{"text": f"row {i}", "label": label} for i, label in enumerate([0.5, 2, "good"])]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main(["data", "inspect", str(tmp_path), "--json"]) == 0
    labels = json.loads(capsys.readouterr().out)["train"]["labels"]
    assert labels == {"least": 0.5, "most": 2, "mean": 1.25, "not a number": 1}


def test_data_inspect_finds_bad_rows_and_runs_in_common(tmp_path, capsys):
    run = " ".join(f"word{i}" for i in range(20))
    for split, text in (("train", run), ("test", f"other words before {run[:100]}")):
        lines = [json.dumps({"text": text, "label": 1}), json.dumps({"text": 3, "label": 1})]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    assert main(["data", "inspect", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["overlap"] == {} and report["overlap_13_grams"] == {"train/test": 1}
    assert report["train"]["rows"]["reasons"]["text is not a string"]["places"] == [f"{tmp_path}/train.jsonl:2"]


def test_doctor_names_its_checks(tuned, capsys):
    assert main(["doctor", str(tuned / "run.toml"), "--json"]) == 0
    checks = {c["name"]: c["ok"] for c in json.loads(capsys.readouterr().out)["checks"]}
    assert set(checks) >= {"document leak", "accumulation", "supervision", "tied weights", "vocabulary"}
    assert all(checks.values())


def test_python_door(tuned, reviews, tmp_path):
    import ronna

    report = ronna.evaluate(model=f"{tuned}/model", data=[f"{reviews}/test.jsonl"])
    assert report["test"]["accuracy"]["value"] > 0.9
    with pytest.raises(AttributeError):
        _ = ronna.nothing


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


GOOD = [json.dumps({"text": f"the film was {w} {i}", "label": w}) for i in range(40) for w in ("good", "bad")]
WRONG = {
    "no such folder": (["--model", "nowhere"], ["nowhere", "no such folder", "config.json"]),
    "unknown key": (["--set", "train.epoch=3"], ["train.epoch", "train.epochs"]),
    "unknown value": (["--set", "train.precision=fp64"], ["train.precision", "fp32"]),
    "unknown optimizer": (["--set", "optim.kind=adamm"], ["adamm", "adam"]),
    "not a number": (["--lr", "fast"], ["optim.lr", "fast"]),
    "negative": (["--lr", "-1"], ["optim.lr"]),
    "no such file": (["--train", "missing.jsonl"], ["missing.jsonl"]),
    "no such column": (["--text", "texts"], ["texts", "text"]),
    "pooling that a BERT folder cannot say": (
        ["--set", "task.pool=mean"],
        ["task.pool", "bert folders cannot", "modernbert"],
    ),
    "no such device": (["--device", "gpu7"], ["gpu7", "cpu"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_exit_2_and_say_what_where_and_how(case, tiny_bert, tmp_path, capsys):
    more, words = WRONG[case]
    train = write(tmp_path / "train.jsonl", *GOOD)
    assert finetune(tiny_bert, train, tmp_path / "out", *more) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert "Traceback" not in said and not (tmp_path / "out" / "model").exists()


BAD_DATA = {
    "malformed line": ([*GOOD, "{not json"], ["train.jsonl:81", "--max-bad-rows"]),
    "null label": ([*GOOD, '{"text": "a", "label": null}'], ["train.jsonl:81", "no label"]),
    "nan label": ([*GOOD, '{"text": "a", "label": NaN}'], ["train.jsonl:81"]),
    "missing text": ([*GOOD, '{"label": "good"}'], ["train.jsonl:81", "text"]),
    "empty text": ([*GOOD, '{"text": "", "label": "good"}'], ["train.jsonl:81", "empty text"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_rows_stop_finetune_unless_a_number_is_allowed(case, tiny_bert, tmp_path, capsys):
    lines, words = BAD_DATA[case]
    train = write(tmp_path / "train.jsonl", *lines)
    assert finetune(tiny_bert, train, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert finetune(tiny_bert, train, tmp_path / "out2", "--max-bad-rows", "1", "--epochs", "1") == 0
    data = json.loads((tmp_path / "out2" / "report.json").read_text())["data"]
    assert (data["rows_in"], data["kept"], data["quarantined"]) == (81, 80, 1)
    assert len((tmp_path / "out2" / "quarantine-train.jsonl").read_text().splitlines()) == 1


def test_a_label_only_in_evaluation_is_refused(tiny_bert, tmp_path, capsys):
    train = write(tmp_path / "train.jsonl", *GOOD)
    test = write(tmp_path / "t.jsonl", '{"text": "the music", "label": "ugly"}')
    assert finetune(tiny_bert, train, tmp_path / "out", "--test", str(test)) == 2
    assert "'ugly' is not among the 2 labels" in capsys.readouterr().err


def test_a_training_row_in_the_test_set_is_refused_or_allowed(tiny_bert, tmp_path, capsys):
    train = write(tmp_path / "train.jsonl", *GOOD)
    test = write(tmp_path / "t.jsonl", GOOD[0])
    assert finetune(tiny_bert, train, tmp_path / "out", "--test", str(test)) == 2
    assert "--allow-overlap" in capsys.readouterr().err
    call = ["--test", str(test), "--allow-overlap", "--epochs", "1"]
    assert finetune(tiny_bert, train, tmp_path / "out", *call) == 0


def test_pretrain_refuses_what_cannot_work(tiny_bert, tiny_gpt, reviews, tmp_path, capsys):
    out = str(tmp_path / "shards")
    assert main(["prepare", "--input", str(reviews), "--tokenizer", str(tiny_gpt), "--out", out]) == 0
    call = ["pretrain", "--data", f"{out}/train", "--out", str(tmp_path / "r"), "--steps", "2", "--length", "32"]
    assert main([*call, "--model", str(tiny_gpt), "--objective", "mlm"]) == 2
    assert "needs a cls token" in capsys.readouterr().err
    assert main([*call, "--model", str(tiny_gpt), "--objective", "clm", "--length", "4096"]) == 2
    assert "64 positions" in capsys.readouterr().err
    assert main([*call, "--model", "gpt3-tiny", "--objective", "clm"]) == 2
    assert "gpt2-tiny" in capsys.readouterr().err
    absent = ["pretrain", "--model", "x", "--objective", "clm", "--data", "nowhere", "--out", "o"]
    assert main([*absent, "--memory", "lots"]) == 2  # before anything is looked for
    assert "memory 'lots'" in capsys.readouterr().err
    assert main([*absent, "--memory", "-3GiB"]) == 2
    assert "memory '-3GiB'" in capsys.readouterr().err
    assert main([*call, "--model", str(tiny_gpt), "--objective", "clm", "--batch", "2"]) == 0


def test_prepare_accounts_for_every_row(tiny_gpt, tmp_path, capsys):
    text = write(tmp_path / "t.jsonl", *[json.dumps({"text": f"a story {i} with music"}) for i in range(20)], "{bad")
    call = ["prepare", "--input", str(text), "--tokenizer", str(tiny_gpt), "--out", str(tmp_path / "s")]
    assert main(call) == 2
    assert "t.jsonl:21" in capsys.readouterr().err
    call = [*call[:-1], str(tmp_path / "s2"), "--max-bad-rows", "1", "--validation", "0", "--json"]
    assert main(call) == 0
    rows = json.loads(capsys.readouterr().out)["train"]
    assert rows["rows"]["rows_in"] == 21 and rows["documents"] == rows["cleaning"]["kept"]
    assert rows["cleaning"]["rows_in"] == 20 == rows["cleaning"]["kept"] + sum(rows["cleaning"]["dropped"].values())


def test_a_preset_takes_other_sizes_and_refuses_unknown_ones(tiny_gpt, reviews, tmp_path, capsys):
    out = str(tmp_path / "shards")
    assert main(["prepare", "--input", str(reviews), "--tokenizer", str(tiny_gpt), "--out", out]) == 0
    call = ["pretrain", "--data", f"{out}/train", "--out", str(tmp_path / "r"), "--steps", "2", "--length", "32"]
    call += ["--model", "gpt2-tiny", "--objective", "clm", "--batch", "2"]
    assert main([*call, "--set", "model.settings.hiden_size=64"]) == 2
    assert "hiden_size" in capsys.readouterr().err
    sizes = ["--set", "model.settings.hidden_size=64", "--set", "model.settings.num_attention_heads=2"]
    assert main([*call, *sizes]) == 0
    assert json.loads((tmp_path / "r" / "model" / "config.json").read_text())["n_embd"] == 64


def test_a_text_flag_is_text_even_where_it_looks_like_a_number(tiny_bert, reviews, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert finetune(tiny_bert, reviews, Path("2024"), "--epochs", "1") == 0
    assert (tmp_path / "2024" / "report.json").exists()


def test_a_flipped_bit_in_the_shards_is_found_before_training(tiny_gpt, reviews, tmp_path, capsys):
    out = tmp_path / "shards"
    assert main(["prepare", "--input", str(reviews), "--tokenizer", str(tiny_gpt), "--out", str(out)]) == 0
    file = out / "train" / "tokens-00000.bin"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(bytes(data))
    call = ["pretrain", "--data", f"{out}/train", "--out", str(tmp_path / "r"), "--steps", "2", "--length", "32"]
    assert main([*call, "--model", str(tiny_gpt), "--objective", "clm", "--batch", "2"]) == 2
    assert "tokens-00000.bin" in capsys.readouterr().err


def test_only_what_argparse_would_take_for_a_flag_is_joined():
    several = ["--prompt", "-5", "-.5", "-5 degrees", "a"]
    assert joined([*several, "--memory", "-3GiB", "--nproc", "-1"]) == [*several, "--memory=-3GiB", "--nproc", "-1"]


@pytest.mark.parametrize("verb", [verb for verb, found in VERBS.items() if found.flags[0].name.startswith("-")])
def test_what_a_verb_cannot_do_without_has_a_flag(verb, capsys):
    assert main(verb.split()) == 2
    said = capsys.readouterr().err
    assert "missing" in said
    assert "give --" in said
    assert "add " not in said
