"""What several ranks cannot do yet is refused by name, and what they can is not."""

import pytest

from ronna.base.errors import RonnaError
from ronna.compatible import obstacles, refuse_shared
from ronna.runfile import FinetuneRun, PretrainRun
from ronna.search import finetune


def pretrain(**more):
    run = {"out": "o", "model": {"name": "bert-tiny"}, "data": {"train": "d"}, "objective": {"kind": "mlm"}}
    return PretrainRun.model_validate(run | {"train": {"steps": 1}} | more)


def tuned(**more):
    return FinetuneRun.model_validate({"out": "o", "model": {"name": "m"}, "data": {"train": "d"}} | more)


@pytest.mark.parametrize(
    ("run", "found"),
    [
        (pretrain(), None),
        (pretrain(optim={"kind": "sgd"}, device="cuda", parallel={"tensor": 2}), None),
        (tuned(), None),
        (tuned(peft={"kind": "lora"}), None),
        (pretrain(device="cuda:1"), ("device", "a card by its number")),
        (pretrain(train={"memory": "1GiB"}), ("train.memory", "planning by memory")),
        (pretrain(train={"offload": "optimizer"}), ("train.offload", "offloading")),
        (pretrain(train={"weights": "bf16"}), ("train.weights", "weights held in bf16")),
        (pretrain(train={"fused_backward": True}), ("train.fused_backward", "the optimizer inside the backward pass")),
        (pretrain(optim={"kind": "muon"}), ("optim.kind", "the optimizer muon")),
        (pretrain(optim={"kind": "adafactor"}), ("optim.kind", "the optimizer adafactor")),
        (tuned(model={"name": "m", "quantize": "nf4"}, peft={"kind": "lora"}), ("model.quantize", "a base in 4 bits")),
        (tuned(task={"kind": "embed"}), ("task.kind", "the task embed")),
        (tuned(task={"kind": "dpo"}), ("task.kind", "the task dpo")),
        (tuned(search={"trials": 2}), ("search", "a search")),
        (tuned(peft={"kind": "adalora"}), ("peft.kind", "adalora")),
        (tuned(peft={"kind": "lora"}, parallel={"tensor": 2}), None),
        *(
            (
                tuned(peft=other, parallel={"tensor": 2}),
                ("parallel.tensor", "an adapter of this kind on divided matrices"),
            )
            for other in ({"kind": "houlsby"}, {"kind": "bitfit"}, {"kind": "lora", "dora": True})
        ),
    ],
)
def test_what_does_not_work_is_refused_by_name_and_nothing_else(run, found):
    assert obstacles(run) == ([] if found is None else [found])
    if found is not None:
        with pytest.raises(RonnaError, match=f"{found[0]}: {found[1]} does not work on several ranks"):
            refuse_shared(run)


def test_ranks_do_not_search_each_for_itself(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RonnaError, match="a search does not work on several ranks"):
        finetune(tuned(out=str(tmp_path / "out"), search={"trials": 2}))
    assert not list(tmp_path.iterdir())
