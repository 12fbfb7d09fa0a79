"""Files of tensors are what the safetensors library writes and reads, with one tensor in memory at a time."""

import weakref

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ronna.model.tensorfiles import save_tensors


def test_nothing_is_copied_to_be_saved(tmp_path):
    """Each tensor, be it turned or on another device, is gone before the next one is made."""
    alive, most = [], []

    class Made(dict):
        def __getitem__(self, name):
            made = torch.ones(50, 40).T
            alive.append(weakref.ref(made))
            most.append(sum(ref() is not None for ref in alive))
            return made

    save_tensors(tmp_path / "x.safetensors", dict.fromkeys("abcd", torch.float32), Made().__getitem__)
    assert most == [1] * 4 and {t.shape for t in load_file(tmp_path / "x.safetensors").values()} == {(40, 50)}


def test_tensors_are_stored_as_the_library_stores_them(tmp_path):
    kinds = [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.float16]
    tensors = {f"a{i}é": torch.arange(3 + i).to(kind) for i, kind in enumerate(kinds)}
    tensors |= {"none": torch.zeros(0, 4), "single": torch.tensor(2.0), "turned": torch.arange(6.0).view(2, 3).T}
    count = save_tensors(tmp_path / "x.safetensors", {n: t.dtype for n, t in tensors.items()}, tensors.__getitem__)
    assert count == sum(t.numel() for t in tensors.values())
    for backend in ("mmap", "pread"):
        found = load_file(tmp_path / "x.safetensors", backend=backend)
        assert found.keys() == tensors.keys()
        assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in tensors.items())
    assert safe_open(tmp_path / "x.safetensors", framework="pt").metadata() == {"format": "pt"}
