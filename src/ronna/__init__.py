"""Ronna: train larger language models on the compute you have, and carry them all the way to use.

The verbs of the command line are functions here, with the same names for the same settings:

    ronna.finetune(out="run", model={"name": "folder"}, data={"train": "reviews.csv"})
    ronna.load("run/model").predict([{"text": "..."}])
"""

from typing import Any

__version__ = "0.1.0"
FUNCTIONS = (
    "doctor",
    "evaluate",
    "finetune",
    "generate",
    "inspect",
    "load",
    "predict",
    "prepare",
    "pretrain",
    "train_tokenizer",
)


def __getattr__(name: str) -> Any:  # so that `import ronna` costs nothing
    if name in FUNCTIONS:
        from ronna import api

        return getattr(api, name)
    raise AttributeError(f"module 'ronna' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *FUNCTIONS])
