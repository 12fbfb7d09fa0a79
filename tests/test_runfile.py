"""Run files: what may be said in short."""

from typing import Any

import pytest

from ronna.base.config import Config, build
from ronna.base.errors import RonnaError
from ronna.runfile import NORMS, EvaluateRun, FinetuneRun, GenerateRun, InspectRun, PrepareRun, TokenizerRun

SEVERAL: list[tuple[type[Config], str, dict[str, Any]]] = [
    (EvaluateRun, "data", {"model": "m"}),
    (GenerateRun, "prompt", {"model": "m"}),
    (InspectRun, "input", {}),
    (PrepareRun, "input", {"out": "o", "tokenizer": "t"}),
    (TokenizerRun, "input", {"out": "o"}),
]


@pytest.mark.parametrize(("kind", "key", "rest"), SEVERAL, ids=lambda x: x.__name__ if isinstance(x, type) else None)
def test_one_of_several_needs_no_list(kind, key, rest):
    assert getattr(build(kind, rest | {key: "a.txt"}, where="x"), key) == ("a.txt",)
    assert getattr(build(kind, rest | {key: ["a.txt", "b.txt"]}, where="x"), key) == ("a.txt", "b.txt")
    for wrong in ([], 5, [5]):
        with pytest.raises(RonnaError, match=key):
            build(kind, rest | {key: wrong}, where="x")


def test_norms_that_houlsby_trains_learn_slower_unless_a_run_says_otherwise():
    def rates(peft: dict[str, Any] | None, **optim: Any) -> dict[str, float]:
        tree = {"out": "o", "model": {"name": "m"}, "data": {"train": "t"}, "peft": peft, "optim": optim}
        return build(FinetuneRun, tree, where="x").optim.rates

    assert rates({"kind": "houlsby"}) == {"norm": NORMS} == rates({"kind": "houlsby"}, lr=0.1)
    assert rates({"kind": "houlsby"}, rates={}) == {} == rates({"kind": "lora"}) == rates(None)
