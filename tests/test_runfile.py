"""Run files: what may be said in short."""

from typing import Any

import pytest

from ronna.base.config import Config, build
from ronna.base.errors import RonnaError
from ronna.runfile import EvaluateRun, GenerateRun, InspectRun, PrepareRun, TokenizerRun

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
