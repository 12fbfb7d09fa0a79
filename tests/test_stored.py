"""The model folder of a checkpoint of several ranks, made of their parts."""

from pathlib import Path

import pytest
import torch

from ronna.assemble import Parts
from ronna.base.errors import RonnaError
from ronna.model.folder import load_folder
from ronna.parallel.world import World
from ronna.peft.lora import LoraConfig
from ronna.stored import WEIGHTS, Store
from ronna.text.tokenizer import load_tokenizer
from ronna.train.checkpoint import MODEL
from ronna.train.pieces import write_pieces


@pytest.fixture
def parts(tiny_bert: Path) -> Parts:
    loaded = load_folder(tiny_bert)
    unread: list = []
    return Parts(loaded.model, loaded.family, load_tokenizer(tiny_bert), None, unread, None, {}, {})  # type: ignore[arg-type]


def test_the_folder_is_the_one_that_a_single_process_writes(parts: Parts, tmp_path: Path) -> None:
    """Of parts as they were when they were written, whatever a step has done to the model since."""
    Store(parts).write(tmp_path / "alone")
    checkpoint = tmp_path / "checkpoint"
    (checkpoint / MODEL).mkdir(parents=True)
    finish = [Store(parts, World(rank=rank, size=2)) for rank in range(2)]
    for store in finish:
        own = store.apart()[WEIGHTS] if store.world.main else {}  # the first has what both have whole
        write_pieces(checkpoint, WEIGHTS, own, store.world, lambda tensor: None)
    first, second = (store.finish() for store in finish)
    with torch.no_grad():
        for parameter in parts.model.parameters():
            parameter.add_(1.0)
    second(checkpoint)
    assert not list((checkpoint / MODEL).iterdir())  # rank 0 alone does it
    first(checkpoint)
    alone = {f.name: f.read_bytes() for f in (tmp_path / "alone").iterdir()}
    assert {f.name: f.read_bytes() for f in (checkpoint / MODEL).iterdir()} == alone
    assert [f.name for f in checkpoint.iterdir()] == [MODEL]


def test_parts_that_cannot_be_seen_are_missed(parts: Parts, tmp_path: Path) -> None:
    store = Store(parts, World(rank=0, size=2))
    write_pieces(tmp_path, WEIGHTS, store.apart()[WEIGHTS], store.world, lambda tensor: None)
    with pytest.raises(RonnaError, match="parts of the model of 1 ranks are there, 2 have written some") as caught:
        store.finish()(tmp_path)
    assert caught.value.fix == "train in a folder that all machines share"


def test_one_process_and_an_adapter_write_at_once(parts: Parts, tmp_path: Path) -> None:
    alone = Store(parts)
    alone.write_now(tmp_path / "now")
    assert (tmp_path / "now" / "model.safetensors").is_file() and alone.apart() == {}
    later = Store(parts, World(rank=0, size=2))
    later.write_now(tmp_path / "later")
    assert not (tmp_path / "later").exists() and list(later.apart()) == [WEIGHTS]
    parts.peft = LoraConfig()
    assert list(Store(parts, World(rank=0, size=2)).apart()) == ["trained"]
