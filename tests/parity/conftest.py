"""One model of transformers per case, saved, and read by us."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers

from ronna.model.families import Family
from ronna.model.folder import load_folder
from ronna.model.transformer import Transformer

from .cases import CASES, Case


@dataclass(frozen=True)
class Pair:
    name: str
    case: Case
    theirs: Any
    ours: Transformer
    family: Family
    folder: Path


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session", params=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, quiet: None) -> Pair:
    case = CASES[request.param]
    theirs = case.build()
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    loaded = load_folder(folder)
    assert loaded.notes == []
    return Pair(request.param, case, theirs, loaded.model.eval(), loaded.family, folder)
