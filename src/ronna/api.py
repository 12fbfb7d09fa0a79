"""The verbs as functions: keyword arguments are the tables of a run file. `ronna.NAME` leads here."""

from typing import Any

from ronna.base.config import build
from ronna.run import execute
from ronna.runfile import (
    DoctorRun,
    EvaluateRun,
    FinetuneRun,
    GenerateRun,
    InspectRun,
    PredictRun,
    PrepareRun,
    PretrainRun,
    TokenizerRun,
)
from ronna.search import finetune as _finetune
from ronna.verbs.doctor import doctor as _doctor
from ronna.verbs.evaluate import Loaded, load
from ronna.verbs.evaluate import evaluate as _evaluate
from ronna.verbs.evaluate import generate_run as _generate
from ronna.verbs.evaluate import predict as _predict
from ronna.verbs.inspect import inspect as _inspect
from ronna.verbs.prepare import prepare as _prepare
from ronna.verbs.prepare import train_tokenizer_run as _train_tokenizer

__all__ = [
    "Loaded", "doctor", "evaluate", "finetune", "generate", "inspect", "load", "predict", "prepare", "pretrain",
    "train_tokenizer",
]  # fmt: skip


def pretrain(*, resume: bool = False, **run: Any) -> dict[str, Any]:
    """Train a language model on shards; returns the report. Raises RonnaError, and Interrupted when stopped."""
    return execute(build(PretrainRun, run, where="pretrain()"), resume=resume)


def finetune(*, resume: bool = False, **run: Any) -> dict[str, Any]:
    """Train a model for a task on labelled records; returns the report."""
    return _finetune(build(FinetuneRun, run, where="finetune()"), resume=resume)


def prepare(**run: Any) -> dict[str, Any]:
    """Text files to token shards."""
    return _prepare(build(PrepareRun, run, where="prepare()"))


def train_tokenizer(**run: Any) -> dict[str, Any]:
    """Train a tokenizer on text files and save its folder."""
    return _train_tokenizer(build(TokenizerRun, run, where="train_tokenizer()"))


def inspect(**run: Any) -> dict[str, Any]:
    """What data files really hold."""
    return _inspect(build(InspectRun, run, where="inspect()"))


def evaluate(**run: Any) -> dict[str, Any]:
    """Measure a model folder on files; returns the report."""
    return _evaluate(build(EvaluateRun, run, where="evaluate()"))


def predict(**run: Any) -> dict[str, Any]:
    """Records in a file to records with predictions in a file."""
    return _predict(build(PredictRun, run, where="predict()"))


def generate(**run: Any) -> dict[str, Any]:
    """What a model folder writes after each prompt."""
    return _generate(build(GenerateRun, run, where="generate()"))


def doctor(**run: Any) -> dict[str, Any]:
    """The checks of a run file before it starts."""
    return _doctor(build(DoctorRun, run, where="doctor()"))
