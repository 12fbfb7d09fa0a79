"""What several ranks cannot do yet is refused by name, and what they can is not."""

import pytest

from ronna.base.errors import RonnaError
from ronna.compatible import refuse_shared
from ronna.runfile import FinetuneRun, PretrainRun
from ronna.search import finetune


def pretrain(**more):
    run = {"out": "o", "model": {"name": "bert-tiny"}, "data": {"train": "d"}, "objective": {"kind": "mlm"}}
    return PretrainRun.model_validate(run | {"train": {"steps": 1}} | more)


def tuned(**more):
    return FinetuneRun.model_validate({"out": "o", "model": {"name": "m"}, "data": {"train": "d"}} | more)


@pytest.mark.parametrize(
    ("run", "where"),
    [
        (pretrain(train={"memory": "1GiB"}), r"train\.memory"),
        (pretrain(train={"offload": "optimizer"}), r"train\.offload"),
        (pretrain(train={"weights": "bf16"}), r"train\.weights"),
        (pretrain(train={"fused_backward": True}), r"train\.fused_backward"),
        (pretrain(optim={"kind": "muon"}), r"optim\.kind: the optimizer muon"),
        (pretrain(optim={"kind": "adafactor"}), r"optim\.kind: the optimizer adafactor"),
        (tuned(model={"name": "m", "quantize": "nf4"}, peft={"kind": "lora"}), r"model\.quantize"),
        (tuned(task={"kind": "embed"}), r"task\.kind: the task embed"),
        (tuned(task={"kind": "dpo"}), r"task\.kind: the task dpo"),
        (tuned(search={"trials": 2}), "search: a search"),
        (tuned(peft={"kind": "adalora"}), r"peft\.kind: adalora"),
    ],
)
def test_refused_by_name(run, where):
    with pytest.raises(RonnaError, match=where):
        refuse_shared(run)


@pytest.mark.parametrize("run", [pretrain(), pretrain(optim={"kind": "sgd"}), tuned(), tuned(peft={"kind": "lora"})])
def test_the_rest_is_not(run):
    refuse_shared(run)


def test_ranks_do_not_search_each_for_itself(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RonnaError, match="a search does not work on several ranks"):
        finetune(tuned(out=str(tmp_path / "out"), search={"trials": 2}))
    assert not list(tmp_path.iterdir())
