import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ronna.base.errors import RonnaError
from ronna.train import checkpoint as module
from ronna.train.checkpoint import load_checkpoint, load_latest, save_checkpoint, verify
from ronna.train.checkpointer import Checkpointer

HASHES = {"config": "c", "tokenizer": "t", "data": "d"}


def write_model(folder, weights):
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")


def save(root, step, **options):
    weights = {"w": torch.full((3, 2), float(step))}
    return save_checkpoint(
        root,
        step,
        tensors={"optimizer": {"w.exp_avg": weights["w"].bfloat16(), "w.step": torch.tensor(float(step))}},
        model_files=lambda folder: write_model(folder, weights),
        state={"step": step, "best": None, "loss": 0.1 + 0.2, "counters": [1, 2**60]},
        hashes=HASHES,
        **options,
    )


def steps(root):
    return sorted(int(path.name[5:]) for path in root.glob("step-*") if path.name[5:].isdigit())


def test_everything_comes_back(tmp_path):
    path = save(tmp_path / "checkpoints", 1000)
    assert path == tmp_path / "checkpoints" / "step-00001000" and verify(path) == []
    loaded = load_latest(path.parent, expect=HASHES)
    assert (loaded.path, loaded.step, loaded.hashes, loaded.notes) == (path, 1000, HASHES, ())
    assert loaded.state == {"step": 1000, "best": None, "loss": 0.1 + 0.2, "counters": [1, 2**60]}
    tensors = loaded.tensors("optimizer")
    assert tensors["w.exp_avg"].dtype == torch.bfloat16 and tensors["w.step"].shape == ()
    assert torch.equal(tensors["w.exp_avg"], torch.full((3, 2), 1000.0).bfloat16())
    assert (loaded.model_dir / "tokenizer" / "tokenizer.json").is_file()
    with pytest.raises(RonnaError, match=r"no tensors called 'ema'.*optimizer"):
        loaded.tensors("ema")
    assert load_checkpoint(path, expect=HASHES).state == loaded.state


def test_tensors_that_are_not_contiguous(tmp_path):
    values = torch.arange(6.0).view(2, 3)
    options = {"model_files": lambda _: None, "state": {}, "hashes": {}}
    save_checkpoint(tmp_path, 1, tensors={"ema": {"w": values.T, "row": values[0]}}, **options)
    loaded = load_latest(tmp_path).tensors("ema")
    assert torch.equal(loaded["w"], values.T) and torch.equal(loaded["row"], values[0])


def test_nothing_saved_yet(tmp_path):
    assert load_latest(tmp_path / "absent") is None
    (tmp_path / "step-00000007.tmp-1234").mkdir()
    assert load_latest(tmp_path) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(RonnaError, match="Not a directory"):
        load_latest(tmp_path / "file")


@pytest.mark.parametrize(("keep", "left"), [(0, [4, 5]), (2, [4, 5]), (3, [3, 4, 5])])
def test_the_newest_are_kept(tmp_path, keep, left):
    for step in range(1, 6):
        save(tmp_path, step, keep=keep)
    assert steps(tmp_path) == left
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


def test_protected_steps_stay(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step, protect={2})
    assert steps(tmp_path) == [2, 5, 6]


def test_old_ones_stay_when_the_new_one_does_not_read_back(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)
    monkeypatch.setattr(module, "verify", lambda path: ["optimizer.safetensors: does not match its checksum"])
    with pytest.raises(RonnaError, match="does not read back as it was written"):
        save(tmp_path, 3)
    assert {1, 2} <= set(steps(tmp_path))


def test_damaged_ones_do_not_count_as_kept(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    save(tmp_path, 3)
    assert steps(tmp_path) == [1, 2, 3]


def test_a_newer_checkpoint_never_makes_the_one_just_written_old(tmp_path):
    for step in (7, 8, 9, 1, 2):
        save(tmp_path, step)
    assert steps(tmp_path) == [1, 2, 8, 9]


def test_a_whole_checkpoint_is_never_overwritten_and_a_damaged_one_is_set_aside(tmp_path):
    path = save(tmp_path, 1)
    before = (path / "manifest.json").read_bytes()
    with pytest.raises(RonnaError, match="none is overwritten"):
        save(tmp_path, 1)
    assert (path / "manifest.json").read_bytes() == before
    (path / "state.json").write_text("{}")
    save(tmp_path, 1)
    assert verify(path) == []
    assert len(list(tmp_path.glob("step-00000001.damaged-*"))) == 1


@pytest.mark.parametrize("name", HASHES)
def test_another_config_tokenizer_or_data_is_refused_by_name(tmp_path, name):
    save(tmp_path, 1)
    with pytest.raises(RonnaError) as caught:
        load_latest(tmp_path, expect={**HASHES, name: "other"})
    assert f"another {name} than" in str(caught.value) and "output folder" in caught.value.fix
    assert not any(f"another {other} " in str(caught.value) for other in HASHES if other != name)


def test_order_on_the_disk(tmp_path, monkeypatch):
    """Files, folders, manifest, its folder, name, parent: whatever a power cut leaves, a name means whole."""
    events = []
    fsync, rename = os.fsync, os.rename

    def traced_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        folder = next((p for p in [path, *path.parents] if ".tmp-" in p.name), None)
        events.append(("sync", path.relative_to(folder).as_posix() if folder else path.name))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(("rename", Path(b).name)), rename(a, b)))
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to see which file a descriptor is")
    root = tmp_path / "checkpoints"
    path = save(root, 1)
    everything = {p.relative_to(path).as_posix() for p in path.rglob("*")} - {"manifest.json"}
    assert {name for _, name in events[:-4]} == everything
    assert events[-4:] == [
        ("sync", "manifest.json"),
        ("sync", "."),
        ("rename", "step-00000001"),
        ("sync", "checkpoints"),
    ]
    listed = json.loads((path / "manifest.json").read_text())["files"]
    assert set(listed) == {name for name in everything if (path / name).is_file()}


def checkpointer(root):
    said = []
    return Checkpointer(root, hashes=HASHES, report=said.append), said


def put(saver, step, weight, writer=write_model, **options):
    tensors, state = {"optimizer": {"w.m": weight}}, {"step": step, "seen": [step]}
    saver.save(step, tensors=tensors, model_files=lambda folder: writer(folder, {"w": weight}), state=state, **options)
    state["seen"].append("later")


def test_training_goes_on_while_the_disk_works(tmp_path, monkeypatch):
    released, sync = threading.Event(), os.fsync
    weight, told = torch.zeros(4), []

    def slow(descriptor):
        assert released.wait(20)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    saver, said = checkpointer(tmp_path)
    with saver:
        put(saver, 1, weight, written=told.append)
        assert steps(tmp_path) == [] and [t is weight for t in told] == [True]
        weight.add_(1)  # the training goes on
        released.set()
        put(saver, 2, weight)
        assert saver.latest == tmp_path / "step-00000001"
    assert steps(tmp_path) == [1, 2] and saver.latest.name == "step-00000002" and said == []
    first = load_checkpoint(tmp_path / "step-00000001")
    assert first.tensors("optimizer")["w.m"].eq(0).all() and first.state == {"step": 1, "seen": [1]}
    assert load_checkpoint(tmp_path / "step-00000002").tensors("optimizer")["w.m"].eq(1).all()


def test_bugs_while_saving_surface(tmp_path, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    saver, _ = checkpointer(tmp_path)
    with pytest.raises(ZeroDivisionError):
        put(saver, 1, torch.zeros(1), broken)
    with pytest.raises(ValueError, match="JSON"):
        saver.save(1, tensors={}, model_files=print, state={"best": float("inf")})
    with monkeypatch.context() as patch:
        patch.setattr(module, "verify", broken)
        put(saver, 2, torch.zeros(1))
        with pytest.raises(ZeroDivisionError):
            saver.wait()
    saver.close()
    assert not list(tmp_path.glob("*.tmp-*"))


def test_tensors_of_a_checkpoint_are_held_by_who_looks_them_up(tmp_path):
    stored = load_checkpoint(save(tmp_path, 7)).tensors("optimizer")
    found = stored["w.exp_avg"]
    assert stored["w.exp_avg"].data_ptr() != found.data_ptr() and set(stored) == {"w.exp_avg", "w.step"}
    assert len(stored) == 2 and "w" not in stored


def test_leftovers_go_and_a_second_live_run_is_refused(tmp_path):
    (tmp_path / "step-00000003.tmp-1" / "model").mkdir(parents=True)
    saver, _ = checkpointer(tmp_path)
    assert not list(tmp_path.glob("*.tmp-*"))
    pid = os.fork()
    if pid == 0:  # record locks are between processes
        try:
            checkpointer(tmp_path)
            os._exit(1)
        except RonnaError as error:
            os._exit(0 if "another run is saving" in str(error) else 2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    saver.close()
    checkpointer(tmp_path)[0].close()
