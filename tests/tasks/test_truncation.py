"""Every task has one policy for rows over the length, and one account of what it did."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from ronna.assemble import assemble_finetune
from ronna.base.errors import RonnaError
from ronna.runfile import FinetuneRun
from ronna.tasks.table import TASKS
from ronna.tasks.truncation import UNFIT, keep_rows

LONG, LENGTH = "the film was good and the plot great " * 5, 24


def turns(text: str, answer: str) -> list[dict[str, str]]:
    said = [text, "bad", "good", answer]
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(said)]


# Of each task: the folder it starts from, what befalls a long row that is kept, and how a row of a text is recorded.
CASES: dict[str, tuple[str, str, Any]] = {
    "classify": ("tiny_bert", "cut", lambda text: {"text": text, "label": 1}),
    "tag": (
        "tiny_bert",
        "windowed",
        lambda text: {"tokens": text.split(), "tags": ["B-X", *["O"] * (len(text.split()) - 1)]},
    ),
    "relation": ("marked_bert", "cut", lambda text: {"text": f"<e1>a</e1> {text} <e2>b</e2>", "label": "r"}),
    "span_qa": (
        "tiny_bert",
        "windowed",
        lambda text: {"question": "good", "context": text, "answers": [text.split()[0]]},
    ),
    "embed": ("tiny_bert", "cut", lambda text: {"anchor": "bright", "positive": text}),
    "seq2seq": ("tiny_t5", "cut", lambda text: {"source": text, "target": "bad plot"}),
    "dialogue": ("tiny_gpt", "cut", lambda text: {"dialog": [text, "bad", "good", "dull"]}),
    "dpo": ("tiny_gpt", "cut", lambda text: {"chosen": turns(text, "dull"), "rejected": turns(text, "fun")}),
}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
POLICIES = [(task, policy) for task, (_, word, _) in CASES.items() for policy in (word, "drop", "refuse")]


def assembled(task: str, folder: Path, out: Path, truncation: str):
    """Of four training rows, two of them long, and two to validate with, one of them long."""
    record = CASES[task][2]
    texts = {"train": ["dull film", f"bad {LONG}", "awful plot", f"fun {LONG}"], "validation": ["fun", f"a {LONG}"]}
    for split, some in texts.items():
        (out / f"{split}.jsonl").write_text("".join(json.dumps(record(text)) + "\n" for text in some))
    (out / "short.jinja").write_text(TEMPLATE)
    own = {"template": str(out / "short.jinja")} if task in ("dialogue", "dpo") else {}
    tree = {
        "out": f"{out}/run",
        "model": {"name": str(folder)},
        "data": {"train": str(out), "allow_overlap": True},
        "task": {"kind": task, "truncation": {"windowed": "window"}.get(truncation, truncation), **own},
        "train": {"length": LENGTH},
    }
    return assemble_finetune(FinetuneRun.model_validate(tree))


def test_every_task_is_here_with_every_policy_it_has():
    assert CASES.keys() == TASKS.keys()
    for task in TASKS:
        tree = {"out": "x", "model": {"name": "m"}, "data": {"train": "t"}, "task": {"kind": task}}
        config = FinetuneRun.model_validate(tree).task
        said = set(get_args(type(config).model_fields["truncation"].annotation))
        assert said == {{"windowed": "window"}.get(p, p) for t, p in POLICIES if t == task}


@pytest.mark.parametrize(("task", "policy"), POLICIES)
def test_what_is_done_to_long_rows_is_counted_by_split(task, policy, request, tmp_path):
    name, word, _ = CASES[task]
    folder = request.getfixturevalue(name)
    if policy == "refuse":
        with pytest.raises(RonnaError, match=rf"2 rows are too long for {LENGTH} tokens \({word} 2\).* is row 2"):
            assembled(task, folder, tmp_path, policy)
        return
    parts = assembled(task, folder, tmp_path, policy)
    train, validation = (parts.account["splits"][split] for split in ("train", "validation"))
    assert {w: parts.account.get(w) for w in train} == train and train["kept"] == 4
    assert validation[word] == 1 and "dropped" not in validation  # held-out rows are never dropped
    if policy == "drop":
        assert train["dropped"] == 2 and word not in train and len(parts.data) == len(parts.lengths) == 2
    else:
        assert train[word] == 2 and "dropped" not in train and len(parts.data) == len(parts.lengths)
        windows = len(parts.data) > 4  # each learnt by itself
        assert windows if word == "windowed" else len(parts.data) == 4
    assert max(len(s.tokens) for item in parts.data for s in parts.objective.samples(item, None)) <= LENGTH


def test_nothing_left_is_refused(tiny_bert, tmp_path):
    record = CASES["classify"][2]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record(f"{LONG} {i}")) + "\n" for i in range(40)))
    tree = {"out": f"{tmp_path}/run", "model": {"name": str(tiny_bert)}, "data": {"train": f"{tmp_path}/train.jsonl"}}
    run = FinetuneRun.model_validate(
        {**tree, "task": {"kind": "classify", "truncation": "drop"}, "train": {"length": 16}}
    )
    with pytest.raises(RonnaError, match="no training row gives anything to learn"):
        assemble_finetune(run)


def test_rows_are_kept_and_counted_by_hand():
    long = {"cut": [True, False, True], UNFIT: [True, False, False]}
    account = {"cut": 5}
    assert keep_rows("cut", long, 9, account, training=True) == [True] * 3
    assert account == {"cut": 7, UNFIT: 1}
    account = {}
    assert keep_rows("drop", long, 9, account, training=True) == [False, True, False] and account == {"dropped": 2}
    account = {}
    assert keep_rows("drop", long, 9, account, training=False) == [True] * 3 and account == {"cut": 2, UNFIT: 1}
    assert keep_rows("refuse", {"cut": [False]}, 9, None, training=True) == [True]
    with pytest.raises(RonnaError, match=rf"2 rows .* \(cut 2, {UNFIT} 1\), the first is row 1"):
        keep_rows("refuse", long, 9, None, training=False)
