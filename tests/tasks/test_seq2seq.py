"""Texts to texts: what is read, what is learnt, what is never cut, and what comes out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import ronna
from ronna.base.errors import RonnaError
from ronna.cli import main
from ronna.data.badrows import BadRow
from ronna.data.sources import Record
from ronna.decoding.sampling import GenerateConfig
from ronna.model.families import read_config
from ronna.model.folder import load_folder
from ronna.objectives.base import collate
from ronna.tasks.schema import Columns
from ronna.tasks.seq2seq import Pair, Seq2Seq, Seq2SeqConfig, references
from ronna.tasks.truncation import UNFIT
from ronna.text.tokenizer import load_tokenizer

GERMAN = {"the": "der", "film": "Film", "was": "war", "good": "gut", "bad": "schlecht", "plot": "Plan", "great": "groß"}


def record(**fields) -> Record:
    return Record(fields, Path("f"), 1)


def task(folder: Path, length: int = 32, **config) -> Seq2Seq:
    made = Seq2Seq(load_tokenizer(folder), length, Seq2SeqConfig(**config), "13a")
    return made.on(read_config(folder)[1], {})


def pair(text: str, label: str | None = "bad plot") -> Pair:
    return Pair(text, label, () if label is None else (label,))


# Rows


def test_columns_are_guessed_or_named_and_must_differ():
    found = Seq2Seq.columns(record(document="a", summary="b"), text=None, pair=None, label=None)
    assert found == Columns("document", None, "summary")
    named = Seq2Seq.columns(record(zh="a", en="b"), text="zh", pair=None, label="en")
    assert named == Columns("zh", None, "en")
    with pytest.raises(RonnaError, match="no column looks like a source"):
        Seq2Seq.columns(record(zh="a", en="b"), text=None, pair=None, label=None)
    with pytest.raises(RonnaError, match="both source and target"):
        Seq2Seq.columns(record(zh="a", en="b"), text="zh", pair=None, label="zh")
    nested = record(translation={"en": "a", "de": "b"})
    assert [r.fields for r in Seq2Seq.unfold(nested)] == [{"en": "a", "de": "b"}]
    assert list(Seq2Seq.unfold(record(text="a", translation="b"))) == [record(text="a", translation="b")]


def test_references_beside_the_target_count_too():
    assert references(record(de="a"), "de") == ("a",)
    assert references(record(de="a", refs_de=["a", "b"]), "de") == ("a", "b")
    assert references(record(summary="a", references=["b", "c"]), "summary") == ("a", "b", "c")
    assert references(record(de=["a", "b"]), "de") == ("a", "b")
    for bad in ({"de": ""}, {"de": 3}, {"de": []}, {"de": ["a", 1]}, {}):
        with pytest.raises(BadRow):
            references(record(**bad), "de")


# Examples


def test_an_encoder_decoder_reads_the_source_and_learns_the_target_and_its_end(tiny_t5):
    own = task(tiny_t5, prefix="translate: ")
    example = own.encode([pair("the film was good")])[0]
    tokenizer = own.tokenizer
    assert tokenizer.decode(example.sample.source) == "translate: the film was good"
    assert example.sample.source[-1] == tokenizer.eos_id and (example.prompt == example.sample.source).all()
    assert example.sample.tokens[0] == tokenizer.pad_id == own.start
    assert example.sample.labels[-1] == tokenizer.eos_id
    assert tokenizer.decode(example.sample.labels) == "bad plot"
    assert (example.sample.tokens[1:] == example.sample.labels[:-1]).all()


def test_a_decoder_continues_the_source_and_learns_the_target_alone(tiny_gpt):
    own = task(tiny_gpt)
    example = own.encode([pair("the film was good")])[0]
    sample, n = example.sample, len(example.prompt)
    assert sample.source is None and (sample.tokens[:n] == example.prompt).all()
    assert own.tokenizer.decode(example.prompt) == "the film was good\n\n"
    assert sample.predict.tolist() == list(range(n - 1, len(sample.tokens)))
    assert own.tokenizer.decode(sample.labels) == "bad plot" and sample.labels[-1] == own.tokenizer.eos_id
    assert (sample.tokens[sample.predict[1:]] == sample.labels[:-1]).all()


@pytest.mark.parametrize("folder", ["tiny_t5", "tiny_gpt"])
def test_long_sources_are_cut_and_targets_never(folder, request):
    own = task(request.getfixturevalue(folder), length=16, target_length=8)
    account: dict[str, int] = {}
    rows = [pair("good " * 40), pair("good", "bad " * 40), pair("good")]
    cut, lost, whole = own.encode(rows, account)
    assert account == {"cut": 1, UNFIT: 1}
    assert lost.sample is None and whole.sample is not None and not own.samples(lost, np.random.default_rng(0))
    size = len(cut.sample.tokens) if cut.sample.source is None else len(cut.sample.source)
    assert size <= 16 and own.tokenizer.decode(cut.sample.labels) == "bad plot"
    assert cut.prompt[-1] == whole.prompt[-1]  # the end mark, or the separator, is still there
    asked = own.encode([pair("good " * 40, None), pair("good", None)])
    assert all((a.prompt == b.prompt).all() for a, b in zip(asked, (cut, whole), strict=True))
    with pytest.raises(RonnaError, match="no room for a source"):
        task(request.getfixturevalue(folder), length=1, target_length=1).encode(rows)


def test_rows_too_long_are_dropped_or_refused_if_asked(tiny_t5):
    account: dict[str, int] = {}
    rows = [pair("good " * 40), pair("good", "bad " * 40), pair("good")]
    own = task(tiny_t5, length=16, truncation="drop")
    [kept] = own.encode(rows, account, training=True)
    assert kept.sample is not None and account == {"dropped": 2}
    held_out = own.encode(rows, account)
    assert len(held_out) == 3 and account == {"dropped": 2, "cut": 1, UNFIT: 1}
    assert max(len(e.prompt) for e in held_out) == 16 and held_out[1].text == "bad " * 40
    with pytest.raises(RonnaError, match=f"2 rows are too long for 16 tokens .cut 1, {UNFIT} 1."):
        task(tiny_t5, length=16, truncation="refuse").encode(rows)


def test_smoothing_is_for_training_alone(tiny_t5):
    own, plain = task(tiny_t5, label_smoothing=0.2), task(tiny_t5, label_smoothing=0.0)
    model = load_folder(tiny_t5).model.eval()
    batch = collate(own, [own.encode([pair("the film")])[0].sample])
    with torch.no_grad():
        torch.testing.assert_close(own.loss(model, batch).sums, plain.loss(model, batch).sums)
    assert not torch.allclose(own.loss(model, batch).sums["seq2seq"], plain.loss(model, batch).sums["seq2seq"])


def test_a_task_to_write_needs_a_decoder_and_an_end(tiny_bert, tiny_t5):
    with pytest.raises(RonnaError, match="needs a model with a decoder"):
        task(tiny_bert)
    with pytest.raises(RonnaError, match="no token to end"):
        Seq2Seq(load_tokenizer(tiny_bert), 32, Seq2SeqConfig(), "13a").on(read_config(tiny_t5)[1], {})
    with pytest.raises(RonnaError, match="a tokenizer of its own"):
        ronna.finetune(out="x", model={"name": str(tiny_t5), "tokenizer": str(tiny_bert)}, data={"train": "y"})


# Runs


@pytest.fixture(scope="module")
def translations(tmp_path_factory) -> Path:
    """Word by word, orders of four."""
    folder = tmp_path_factory.mktemp("translations")
    words = list(GERMAN)
    rng = np.random.default_rng(0)
    rows = sorted({tuple(rng.permutation(words)[:4].tolist()) for _ in range(260)})[:210]
    rng.shuffle(rows)
    lines = [json.dumps({"en": " ".join(r), "de": " ".join(GERMAN[w] for w in r)}) for r in rows]
    (folder / "train.jsonl").write_text("\n".join(lines[:170]))
    (folder / "validation.jsonl").write_text("\n".join(lines[170:190]))
    (folder / "test.jsonl").write_text("\n".join(lines[190:]))
    return folder


@pytest.fixture(scope="module")
def translator(translations, tmp_path_factory) -> Path:
    """A small transformer that learnt them from scratch, through the command line."""
    out = tmp_path_factory.mktemp("translator")
    tokenizer = ["tokenizer", "train", "--input", str(translations), "--text", "en", "de", "--vocab", "320"]
    sets = ["tokenizer.kind=bpe", "tokenizer.specials=t5", "tokenizer.sentinels=0"]
    assert main([*tokenizer, "--out", str(out / "tok"), *(x for s in sets for x in ("--set", s))]) == 0
    sets = ["train.batch_tokens=400", "task.monitor=chrf", "model.dropout=0.0"]
    sets += ["model.settings={num_hidden_layers=1, hidden_size=64, intermediate_size=128}"]
    flags = ["--model", "transformer-tiny", "--tokenizer", str(out / "tok"), "--train", str(translations)]
    flags += ["--text", "en", "--label", "de", "--epochs", "40", "--lr", "3e-3", "--precision", "fp32"]
    code = main(
        ["finetune", "--task", "seq2seq", "--out", str(out / "run"), *flags, *(x for s in sets for x in ("--set", s))]
    )
    assert code == 0
    return out / "run" / "model"


def test_a_small_model_learns_to_translate(translator, translations, capsys):
    report = json.loads((translator.parent / "report.json").read_text())
    assert report["test"]["bleu_13a"]["value"] > 90
    assert main(["evaluate", "--model", str(translator), "--data", str(translations / "test.jsonl"), "--text", "en",
                 "--label", "de", "--precision", "fp32", "--json"]) == 0  # fmt: skip
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["test"]["bleu_13a"] == report["test"]["bleu_13a"]


def test_predict_generate_and_transformers_write_the_same(translator, translations, tmp_path):
    transformers = pytest.importorskip("transformers")
    lines = translations.joinpath("test.jsonl").read_text().splitlines()[:5]
    sources = [json.loads(line)["en"] for line in lines]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"en": s}) for s in sources))
    out = tmp_path / "out.jsonl"
    assert main(["predict", "--model", str(translator), "--input", str(tmp_path / "in.jsonl"), "--text", "en",
                 "--output", str(out), "--precision", "fp32"]) == 0  # fmt: skip
    said = [json.loads(line)["prediction"]["text"] for line in out.read_text().splitlines()]
    loaded = ronna.load(str(translator), precision="fp32")
    assert [g.text for g in loaded.generate(sources)] == said
    tokenizer = transformers.AutoTokenizer.from_pretrained(translator)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(translator).eval()
    assert model.generation_config.num_beams == 4
    theirs = [tokenizer.decode(model.generate(**tokenizer(s, return_tensors="pt"))[0], skip_special_tokens=True)
              for s in sources]  # fmt: skip
    assert theirs == said
    greedy = loaded.generate(sources, GenerateConfig(beams=1))
    assert [g.text for g in greedy] == said  # it is that sure
    with pytest.raises(RonnaError, match="the preset t5-tiny has no tokenizer"):
        ronna.finetune(out=str(tmp_path / "x"), model={"name": "t5-tiny"}, data={"train": str(translations)},
                       task={"kind": "seq2seq"})  # fmt: skip


def test_a_decoder_s_folder_remembers_how_it_was_asked(tiny_gpt, translations, tmp_path):
    model = {"name": str(tiny_gpt)}
    task_ = {"kind": "seq2seq", "prefix": "say: ", "separator": " =", "decoding": {"beams": 2, "max_tokens": 6}}
    data = {"train": str(translations), "text": "en", "label": "de", "limit": 40}
    peft = {"kind": "lora", "rank": 2}
    ronna.finetune(out=str(tmp_path), model=model, task=task_, data=data, train={"steps": 3}, peft=peft)
    loaded = ronna.load(str(tmp_path / "model"))
    assert isinstance(loaded.task, Seq2Seq) and loaded.task.decoding.beams == 2
    prompt = loaded.task.prompts(["good"])[0]
    assert loaded.tokenizer.decode(prompt) == "say: good ="
    made = loaded.predict(["good"])[0]
    assert made["finish"] in ("eos", "length") and isinstance(made["text"], str)
    assert loaded.generate(["good"])[0].text == made["text"]
