"""`ronna doctor RUN.toml`: everything that `pretrain` and `finetune` check before the first step, and nothing more."""

from typing import Any

from ronna.base.config import build, read_toml
from ronna.base.errors import RonnaError
from ronna.base.track import say
from ronna.ranges import ranges_of
from ronna.run import prepare_run
from ronna.runfile import DoctorRun, FinetuneRun, PretrainRun
from ronna.train.contract import refuse_failed


def doctor(run: DoctorRun) -> dict[str, Any]:
    """Raises RonnaError naming the checks that failed."""
    tree = read_toml(run.run)
    kinds: dict[str, type[PretrainRun] | type[FinetuneRun]] = {
        "pretrain": PretrainRun,
        "finetune": FinetuneRun,
    }
    verb = tree.get("verb", "pretrain" if "objective" in tree else "finetune")
    if verb not in kinds:
        raise RonnaError(f"verb {verb!r} has no checks", where=run.run, fix=f"use one of: {', '.join(kinds)}")
    config = build(kinds[verb], tree, where=run.run)
    if isinstance(config, FinetuneRun) and config.search is not None:
        ranges_of(config, config.search)
    training = prepare_run(config, resume=True)
    checks = training.check()
    for check in checks:
        say(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}")
    refuse_failed(checks)
    return {"checks": [{"name": c.name, "ok": c.ok, "detail": c.detail} for c in checks]}
