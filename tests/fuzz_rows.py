"""Broken records by the thousand: does a task ever end in anything but examples or a RonnaError?

    python -m tests.fuzz_rows [TASK ...] [--seconds 600] [--seed 0]

Each try takes sound records in a layout that a task reads, damages some values in them (gone, of another type, of
another row, out of range, odd characters) and reads the file as `data inspect` and `finetune` do, up to the samples of
training. An uncaught exception is printed with the seed that makes the records again, and the exit code is 1. The
seconds are of processor time, for each task.
"""

import contextlib
import io
import json
import random
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from ronna.assemble import read_labelled
from ronna.base.errors import RonnaError
from ronna.model.families import preset
from ronna.model.folder import save_folder
from ronna.model.init import build
from ronna.runfile import FinetuneRun, InspectRun
from ronna.text.tokenizer import TokenizerConfig, train_tokenizer
from ronna.verbs.inspect import inspect

from .fuzz import command, tries

Rows = list[dict[str, Any]]
TEXT = "Peter Müller flew from Berlin to 北京市 on Monday , and the film was 👩\u200d🚀 good ."


def span(text: str, part: str) -> dict[str, Any]:
    return {"start": text.index(part), "end": text.index(part) + len(part)}


PETER = {"text": "Peter", "answer_start": 0}


def squad(answer: Any) -> dict[str, Any]:
    return {"question": "who flew ?", "id": "q1", "answers": answer}


SAID = [{"role": "user", "content": "was it good"}, {"role": "assistant", "content": "the plot was bad"}]
CHAT = [{"from": "human", "value": "was it good"}, {"from": "gpt", "value": "dull"}, {"from": "human", "value": "so"}]
LAYOUTS: dict[str, list[Rows]] = {
    "classify": [
        [{"text": TEXT, "label": "good"}, {"text": "so dull", "label": "bad"}],
        [{"sentence1": TEXT, "sentence2": "a film", "label": 2.5}, {"sentence1": "a", "sentence2": "b", "label": -1}],
        [{"text": TEXT, "labels": ["good", "long"]}, {"text": "so dull", "labels": []}],
    ],
    "tag": [
        [{"tokens": ["Peter", "flew", "北", "京"], "tags": ["B-PER", "O", "B-LOC", "I-LOC"]}],
        [{"text": TEXT, "entities": [span(TEXT, "Berlin") | {"label": "LOC"}]}],
        [{"text": TEXT, "label": {"LOC": {"北京市": [[33, 35]]}}}],
        [{"text": "Peter flew", "tags": "B-PER O"}],
    ],
    "relation": [
        [{"text": "<e1>Peter</e1> flew to <e2>Berlin</e2> .", "relation": "to(e1,e2)"}],
        [{"text": TEXT, "head": span(TEXT, "Peter"), "tail": span(TEXT, "Berlin"), "relation": "to"}],
        [{"text": TEXT, "h": {"pos": [0, 5]}, "t": {"pos": [18, 24]}, "relation": "to"}],
    ],
    "span_qa": [
        [{"data": [{"title": "t", "paragraphs": [{"context": TEXT, "qas": [squad([PETER])]}]}]}],
        [{"context": TEXT} | squad({"text": ["Berlin"], "answer_start": [TEXT.index("Berlin")]})],
        [{"context": TEXT * 9, "query": "where", "answer": "北京市"}, {"context": "a", "query": "?", "answer": ""}],
    ],
    "embed": [
        [{"sentence1": TEXT, "sentence2": "a film", "score": 0.5}, {"sentence1": "a", "sentence2": "b", "score": 1}],
        [{"anchor": TEXT, "positive": "a film", "negative": "dull"}],
        [{"premise": TEXT, "hypothesis": "a film", "label": "entailment"}],
    ],
    "seq2seq": [
        [{"text": TEXT, "translation": "Peter flog"}],
        [{"source": TEXT, "target": "Peter flog"}],
        [{"dialogue": TEXT, "summary": "a film"}],
        [{"translation": {"source": TEXT, "target": "北京"}}],
    ],
    "dialogue": [
        [{"messages": [{"role": "system", "content": "be good"}, *SAID]}],
        [{"conversations": CHAT}],
        [{"instruction": "was it good", "input": TEXT, "output": "dull"}],
        [{"dialog": ["was it good", "no", "so"]}],
        [{"prompt": SAID[:1], "completion": SAID[1:]}],
    ],
    "dpo": [
        [{"prompt": "was it good", "chosen": "no", "rejected": "yes"}],
        [{"chosen": SAID, "rejected": [SAID[0], {"role": "assistant", "content": "dull"}]}],
        [{"prompt": SAID[:1], "chosen": SAID[1:], "rejected": [SAID[1] | {"content": "so"}]}],
    ],
}  # fmt: skip
MODELS = {"seq2seq": "chat", "dialogue": "chat", "dpo": "chat"}
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 5, 10**6, 2**63, 10**400, 0.5, -0.0, 1e308, "", " ", "\n", "a", "Peter", "0", "--1",
    "²", "nan", "inf", "NA", "\u200b", "\u00ad", "\ufeff", "\u0301", "e\u0301", "\u202e", "\ufffd", "😀", "北京",
    "[SEP]", "[CLS]", "[PAD]", "<|im_start|>", "<|im_end|>", "<e1>", "</e2>", "@", "#", "{{ 1 }}", "{% raw %}", "B-PER",
    "I-LOC", "O", "B-", "-", "E-LOC", "assistant", "user", "word " * 400, "字" * 600, "x" * 3000, [], {}, [[]],
    [None], [""], ["a"], [0, 1], [0, 1, "LOC"], [5, 3], {"": ""}, {"text": "a"}, {"text": []}, {"text": ["a"]},
    {"start": 0}, {"role": "assistant", "content": "a"}, {"pos": [0, 1]}, [["a"]], [{"text": "a", "answer_start": 0}],
]  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every value within, as what holds it and its key there."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(inner):
        yield value, key
        yield from places(part)


def change(value: Any, rng: random.Random) -> Any:
    kind = rng.randrange(8)
    if kind == 0 and isinstance(value, str) and value:
        at = rng.randrange(len(value) + 1)
        return value[:at] + str(rng.choice(VALUES)) + value[at + rng.randrange(3) :]
    if kind == 1 and isinstance(value, int | float) and abs(value) < 10**300:
        return value + rng.choice([-1, 1, 0.5, 100, -(10**9)])
    if kind == 2 and isinstance(value, list) and value:
        return [*value, *value] if rng.random() < 0.5 else rng.sample(value, rng.randrange(len(value)))
    if kind == 3:
        return rng.choice(([value], {"text": value}, {"label": value}, str(value), json.dumps(value)))
    return deepcopy(rng.choice(VALUES))


def damaged(rows: Rows, rng: random.Random) -> Rows:
    rows = [deepcopy(row) for row in rows]  # one by one: they may be one object many times
    for _ in range(rng.randint(1, 4)):
        found = list(places(rows[rng.randrange(len(rows))]))
        if not found:
            continue
        holder, key = rng.choice(found)
        if rng.random() < 0.15:
            del holder[key]
        elif rng.random() < 0.1:
            other, there = rng.choice(list(places(rows)))
            if isinstance(there, str):
                holder[key] = deepcopy(other[there])
        elif isinstance(key, str) and rng.random() < 0.1:
            holder[rng.choice(["label", "labels", "text", "id", "context", "answer", "tags", "score", "", "a.b"])] = (
                holder.pop(key)
            )
        else:
            holder[key] = change(holder[key], rng)
    return rows


def models(folder: Path) -> dict[str, Path]:
    """An encoder and a decoder of a few thousand random weights."""
    texts = [TEXT, "user assistant system @ # $ was it good the plot was bad dull so a film"] * 5
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    made = {}
    for name, shape, config, more in (
        ("bert", "bert-tiny", TokenizerConfig(kind="wordpiece", vocab=300), {"max_position_embeddings": 64}),
        (
            "chat",
            "llama-tiny",
            TokenizerConfig(kind="bpe", vocab=300, extra_special=("<|im_start|>", "<|im_end|>")),
            {"num_key_value_heads": 2},
        ),
    ):
        tokenizer = train_tokenizer(texts, config)
        family, cfg = preset(shape, vocab_size=tokenizer.vocab_size, **sizes, **more)
        made[name] = folder / name
        save_folder(build(cfg, seed=0), family, made[name])
        tokenizer.save(made[name])
    return made


def attempt(task: str, model: Path, rows: Rows, sound: Rows, folder: Path) -> str:
    """What reading came to: `examples`, `refused`, or what was wrong with it."""
    for name, some in (("train", rows), ("validation", sound)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    data = {"train": str(folder), "allow_overlap": True, "max_bad_rows": 10**6}
    run = {"out": str(folder / "out"), "model": {"name": str(model)}, "data": data, "task": {"kind": task}}
    looked = InspectRun(input=(str(folder),), tokenizer=str(model))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            with contextlib.suppress(RonnaError):
                inspect(looked)
            read = read_labelled(FinetuneRun.model_validate(run | {"train": {"length": 96}}))
    except RonnaError:
        return "refused"
    except Exception:
        return traceback.format_exc()
    split = read.account["splits"]["train"]
    whole = split["rows_in"] == split["kept"] + split["quarantined"]
    return "examples" if whole and len(read.lengths) else f"{split}"


def fuzz(task: str, seconds: float, seed: int, folder: Path) -> Counter[str]:
    model = models(folder)[MODELS.get(task, "bert")]

    def once(rng: random.Random) -> str:
        sound = rng.choice(LAYOUTS[task]) * 8
        return attempt(task, model, damaged(sound, rng), sound, folder)

    return tries(once, task, seconds, seed, expected={"examples", "refused"})


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(command(str(__doc__), LAYOUTS, fuzz))
