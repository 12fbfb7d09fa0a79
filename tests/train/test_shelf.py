"""Tensors on disk: the same numbers, no memory of their own, nothing left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ronna.base.errors import RonnaError
from ronna.train import shelf
from ronna.train.shelf import Shelf, away

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def test_numbers_come_back_and_no_file_is_left(tmp_path):
    own = Shelf(tmp_path / "new")
    for x in (torch.randn(300, 7), torch.randn(5, 3).bfloat16(), torch.arange(9, dtype=torch.uint8), torch.ones(())):
        y = own.put(x)
        assert y.dtype == x.dtype and torch.equal(y, x)
        y.add_(1)
        own.release(y)
        assert torch.equal(y, x + 1)
    assert torch.equal(own.put(torch.arange(6).view(2, 3).T), torch.arange(6).view(2, 3).T)
    assert list((tmp_path / "new").iterdir()) == []


RESIDENT = """
import torch
from pathlib import Path
from ronna.base.device import resident_bytes
from ronna.train.shelf import Shelf
own = Shelf(Path({folder!r}))
x = torch.ones(2**22)
before = resident_bytes()
kept = [own.put(x.fill_(i)) for i in range(16)]
grown = resident_bytes() - before
assert grown < 2**26, grown
assert [float(x.sum()) / 2**22 for x in kept] == [float(i) for i in range(16)]
assert resident_bytes() - before > 2**27
for x in kept:
    own.release(x)
assert resident_bytes() - before < 2**26
"""


def test_what_is_put_away_is_in_memory_only_while_it_is_read(tmp_path):
    done = subprocess.run([sys.executable, "-c", RESIDENT.format(folder=str(tmp_path))], stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(tmp_path, monkeypatch):
    own = Shelf(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RonnaError, match="No space left"):
        own.put(torch.zeros(10))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RonnaError, match="cannot offload to disk"):
        Shelf(Path(tmp_path / "file" / "folder"))


def test_activations_wait_and_parameters_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(shelf, "LEAST", 64)
    own, shelved = Shelf(tmp_path), []
    put = own.put
    own.put = lambda x: shelved.append(x) or put(x)
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(8, 8)

    def loss() -> torch.Tensor:
        return ((x @ weight).exp() @ weight).square().sum()

    wanted = torch.autograd.grad(loss(), weight)[0]
    with torch.autograd.graph.saved_tensors_hooks(*away(own)):
        found = torch.autograd.grad(loss(), weight)[0]
    assert torch.equal(found, wanted)
    assert len(shelved) >= 3 and all(x.data_ptr() != weight.data_ptr() for x in shelved)
