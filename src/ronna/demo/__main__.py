"""`python -m ronna.demo --out demo`: the whole way once, on text that every Python installation carries."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ronna import api
from ronna.base.errors import RonnaError
from ronna.base.track import say
from ronna.demo.corpus import build_corpus
from ronna.report import Sample, Section, read_run, write_comparison

PROMPTS = ("def read(self, path):", "import os\n", "Return the number of")
SHOWN = 8  # predictions on the page


class Demo:
    """The steps in order; each is what a command of the same name does, with the same settings."""

    def __init__(self, out: Path, minutes: float):
        self.out, self.scale = out, minutes / 5.0

    def path(self, *parts: str) -> str:
        return str(self.out.joinpath(*parts))

    def steps(self, usual: int) -> int:
        return max(20, round(usual * self.scale))

    def corpus(self) -> None:
        summary = build_corpus(self.out / "corpus")
        say(f"Python {summary.python}: {summary.text_bytes['train'] / 1e6:.1f} MB of text to train on")

    def inspect(self) -> None:
        api.inspect(input=[self.path("corpus", "areas")])

    def tokenizers(self) -> None:
        text = [self.path("corpus", "text")]
        bert = {"kind": "wordpiece", "vocab": 8000, "lowercase": True}
        api.train_tokenizer(out=self.path("tokenizer-bert"), input=text, tokenizer=bert)
        api.train_tokenizer(out=self.path("tokenizer-gpt"), input=text, tokenizer={"kind": "bpe", "vocab": 8000})

    def prepare(self) -> None:
        for kind in ("bert", "gpt"):
            api.prepare(
                out=self.path(f"shards-{kind}"),
                input=[self.path("corpus", "text")],
                tokenizer=self.path(f"tokenizer-{kind}"),
            )

    def pretrain_bert(self) -> None:
        api.pretrain(
            out=self.path("bert"),
            model={"name": "bert-tiny", "dropout": 0.0},
            data={"train": self.path("shards-bert", "train"), "validation_rows": 64},
            objective={"kind": "mlm"},
            optim={"kind": "adamw", "lr": 2e-3},
            train={"steps": self.steps(1000), "batch": 32, "length": 128},
        )

    def pretrain_gpt(self) -> None:
        api.pretrain(
            out=self.path("gpt"),
            model={"name": "gpt2-tiny", "dropout": 0.0},
            data={"train": self.path("shards-gpt", "train"), "validation_rows": 32},
            objective={"kind": "clm"},
            optim={"kind": "adamw", "lr": 2e-3},
            train={"steps": self.steps(500), "batch": 16, "length": 256},
        )

    def finetune(self, scratch: bool) -> None:
        api.finetune(
            out=self.path("areas-scratch" if scratch else "areas"),
            model={"name": self.path("bert", "model"), "scratch": scratch},
            data={"train": self.path("corpus", "areas")},
            optim={"kind": "adamw", "lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0.01},
            train={"epochs": max(1.0, 4 * self.scale), "batch": 32, "length": 96},
        )

    def evaluate(self) -> None:
        api.evaluate(
            model=self.path("areas", "model"),
            data=[self.path("corpus", "areas", "test.jsonl")],
            out=self.path("areas-evaluated"),
        )

    def predict(self) -> list[Sample]:
        rows = read_jsonl(self.out / "corpus" / "areas" / "test.jsonl")[:SHOWN]
        model = api.load(self.path("areas", "model"))
        made = []
        for row, answer in zip(rows, model.predict([r["text"] for r in rows]), strict=True):
            first = row["text"].split("\n")[0][:90]
            output = f"{answer['label']} ({answer['probability']:.2f})"
            say(f"  {first}\n    -> {output}; it is {row['label']}")
            made.append(Sample(input=row["text"], output=output, gold=row["label"], run="areas"))
        return made

    def generate(self) -> list[Sample]:
        from ronna.decoding.sampling import GenerateConfig

        model = api.load(self.path("gpt", "model"))
        config = GenerateConfig(max_tokens=60, temperature=0.7, top_p=0.9, seed=1)
        made = []
        for prompt, written in zip(PROMPTS, model.generate(PROMPTS, config), strict=True):
            say(f"  {prompt!r} -> {written.text!r}")
            made.append(Sample(input=prompt, output=written.text or "", run="gpt"))
        return made

    def report(self, predicted: list[Sample], generated: list[Sample]) -> Path:
        names = {"bert": "BERT", "areas": "pre-trained", "areas-scratch": "from scratch", "gpt": "GPT"}
        bert, tuned, scratch, gpt = (read_run(self.out / folder, name) for folder, name in names.items())
        sections = [
            Section(title="Pre-training BERT", text="Masked words and next sentence.", runs=(bert,)),
            Section(
                title="Which area of the library does a docstring belong to?",
                text="The pre-trained BERT beside the same model from scratch; intervals are 95% bootstrap.",
                runs=(tuned, scratch),
                samples=tuple(predicted),
            ),
            Section(title="Pre-training GPT", text="Next token.", runs=(gpt,), samples=tuple(generated)),
        ]
        return write_comparison(self.out, "Ronna: from raw text to models in use", sections)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ronna.demo", description=__doc__)
    parser.add_argument("--out", default="demo", help="folder to write (must not exist)")
    parser.add_argument("--minutes", type=float, default=5.0, help="about how long to train on two cores")
    arguments = parser.parse_args(argv)
    out = Path(arguments.out)
    try:
        if out.exists() and any(out.iterdir()):
            raise RonnaError("this folder is not empty", where=str(out), fix="remove it, or choose another --out")
        run(Demo(out, arguments.minutes))
    except RonnaError as error:
        print(f"ronna: {error}", file=sys.stderr)
        return 2
    return 0


def run(demo: Demo) -> None:
    began = time.perf_counter()

    def part(title: str, work: Callable[[], Any]) -> Any:
        say(f"\n== {title} ({time.perf_counter() - began:.0f} s)")
        return work()

    part("Text that every Python installation carries", demo.corpus)
    part("Look at the data", demo.inspect)
    part("Train tokenizers: WordPiece and byte-level BPE", demo.tokenizers)
    part("Clean, deduplicate, tokenize", demo.prepare)
    part("Pre-train a BERT: masked words and next sentence", demo.pretrain_bert)
    part("Pre-train a GPT", demo.pretrain_gpt)
    part(
        "Fine-tune the BERT: to which area of the library does a docstring belong?",
        lambda: demo.finetune(False),
    )
    part("The same model from scratch, to compare", lambda: demo.finetune(True))
    part("Evaluate the saved model", demo.evaluate)
    predicted = part("Predict", demo.predict)
    generated = part("Generate", demo.generate)
    page = part("Report", lambda: demo.report(predicted, generated))
    say(f"\nDone in {time.perf_counter() - began:.0f} s. Open {page}")
    say(
        "Next, with your own files:\n"
        "  ronna data inspect reviews.csv\n"
        "  ronna finetune --model demo/bert/model --train reviews.csv --out my-run\n"
        "  ronna predict --model my-run/model --input new.csv --output answers.jsonl"
    )


if __name__ == "__main__":
    sys.exit(main())
