"""The run files that we ship are ones that the program takes."""

from pathlib import Path

import pytest

from ronna.base.config import build, dump_toml, read_toml
from ronna.model.families import preset
from ronna.runfile import FinetuneRun, PretrainRun

RUNS = sorted((Path(__file__).parents[1] / "runs").glob("*.toml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_run_file(path, tmp_path):
    tree = read_toml(path)
    kind = {"pretrain": PretrainRun, "finetune": FinetuneRun}[tree["verb"]]
    run = build(kind, tree, where=str(path))
    (tmp_path / "again.toml").write_text(dump_toml(run))
    assert build(kind, read_toml(tmp_path / "again.toml"), where="again") == run
    if isinstance(run, PretrainRun):
        _, cfg = preset(run.model.name)
        assert cfg.params() > 0 and (cfg.max_length or run.train.length) >= run.train.length


def test_there_are_run_files_for_both_verbs():
    assert {read_toml(p)["verb"] for p in RUNS} == {"pretrain", "finetune"}
