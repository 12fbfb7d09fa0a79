"""Splits of labelled records: what is held out where no file is named for it."""

import json

import pytest

import ronna
from ronna.base.errors import RonnaError
from ronna.labelled import hold_out
from ronna.tasks.classify import Row


def test_twins_are_held_out_together():
    rows = [Row(f"text {i % 100}", None, "a") for i in range(300)]
    kept, held = hold_out(rows)
    assert len(kept) + len(held) == 300 and 9 <= len(held) <= 60
    assert not {row.text for row in kept} & {row.text for row in held}


def test_too_few_rows_to_hold_some_out_are_refused(tiny_bert, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "good", "label": 1}) + "\n")
    with pytest.raises(RonnaError, match="too few to hold a tenth out") as error:
        ronna.finetune(
            out=str(tmp_path / "o"), model={"name": str(tiny_bert)}, data={"train": f"{tmp_path}/train.jsonl"}
        )
    assert "--validation" in str(error.value)
