"""What a disk, a kill or a person can do to checkpoints, and what is left afterwards."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ronna.base.errors import RonnaError
from ronna.train import checkpoint as module
from ronna.train import pieces
from ronna.train.checkpoint import load_latest, save_checkpoint, verify
from ronna.train.checkpointer import Checkpointer

FILES = ["manifest.json", "state.json", "optimizer.safetensors", "model/model.safetensors"]


def save(root, step):
    weights = {"w": torch.full((16,), float(step))}
    return save_checkpoint(
        root,
        step,
        tensors={"optimizer": weights},
        model_files=lambda folder: save_file(weights, folder / "model.safetensors"),
        state={"step": step},
        hashes={"data": "d"},
        keep=3,
    )


@pytest.fixture
def three(tmp_path):
    """A folder with the checkpoints of steps 1, 2 and 3."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    return tmp_path


def flip_bit(file, chance):
    data = bytearray(file.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def test_any_flipped_bit_is_noticed(three):
    newest, chance = three / "step-00000003", random.Random(0)
    for _ in range(100):
        file = newest / chance.choice(FILES)
        before = file.read_bytes()
        flip_bit(file, chance)
        loaded = load_latest(three)
        assert loaded.step == 2 and file.relative_to(newest).as_posix() in loaded.notes[0]
        file.write_bytes(before)
    assert load_latest(three).step == 3


DAMAGES = {
    "truncated": (lambda file: os.truncate(file, file.stat().st_size - 1), "bytes instead of"),
    "grown": (lambda file: file.write_bytes(file.read_bytes() + b" "), "bytes instead of"),
    "missing": (lambda file: file.unlink(), "is missing"),
    "empty": (lambda file: os.truncate(file, 0), "0 bytes"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES[1:])
def test_a_damaged_file_is_passed_over_with_the_reason(three, name, damage):
    do, reason = DAMAGES[damage]
    do(three / "step-00000003" / name)
    loaded = load_latest(three)
    assert loaded.step == 2 and loaded.tensors("optimizer")["w"].eq(2).all()
    assert len(loaded.notes) == 1
    assert f"step-00000003 is damaged and was passed over ({name}: " in loaded.notes[0]
    assert reason in loaded.notes[0]


MANIFESTS = {
    b"": "is empty",
    b'{"format": 1': "is not whole",
    b"\xff\xfe": "is not whole",
    b"[]": "its own checksum",
    b'{"format": 1, "step": 3, "files": {}, "hashes": {}}': "its own checksum",
}


@pytest.mark.parametrize("content", MANIFESTS)
def test_a_damaged_manifest(three, content):
    (three / "step-00000003" / "manifest.json").write_bytes(content)
    loaded = load_latest(three)
    assert loaded.step == 2 and MANIFESTS[content] in loaded.notes[0]


def test_a_format_of_the_future_is_not_read(three):
    file = three / "step-00000003" / "manifest.json"
    manifest = json.loads(file.read_text()) | {"format": 2}
    del manifest["sha256"]
    file.write_text(json.dumps(manifest | {"sha256": module._checksum(manifest)}))
    assert "has format 2, this version reads 1" in load_latest(three).notes[0]


def test_the_newest_two_damaged_then_all(three):
    chance = random.Random(1)
    flip_bit(three / "step-00000003" / "optimizer.safetensors", chance)
    (three / "step-00000002" / "manifest.json").unlink()
    loaded = load_latest(three)
    assert loaded.step == 1
    assert [note.split()[0] for note in loaded.notes] == ["step-00000003", "step-00000002"]
    flip_bit(three / "step-00000001" / "state.json", chance)
    with pytest.raises(RonnaError, match="no whole checkpoint is left") as caught:
        load_latest(three)
    assert all(f"step-0000000{step} is damaged" in str(caught.value) for step in (1, 2, 3))


def failing(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


def failing_save_file(*_):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


PLACES = {
    "tensors": (pieces, "save_tensors", failing(errno.ENOSPC)),
    "the library": (pieces, "save_tensors", failing_save_file),
    "text": (Path, "write_text", failing(errno.ENOSPC)),
    "quota": (Path, "write_text", failing(errno.EDQUOT)),
    "sync": (os, "fsync", failing(errno.ENOSPC)),
    "disk error": (os, "fsync", failing(errno.EIO)),
    "rename": (os, "rename", failing(errno.EROFS)),
    "folder": (Path, "mkdir", failing(errno.EACCES)),
}
FIXES = {"disk error": "check the disk", "rename": "writable", "folder": "writable"}


@pytest.mark.parametrize("place", PLACES)
def test_a_disk_that_fails_leaves_the_old_ones_and_nothing_half_written(tmp_path, monkeypatch, place):
    save(tmp_path, 1)
    save(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(*PLACES[place])
        with pytest.raises(RonnaError, match="could not be saved") as caught:
            save(tmp_path, 3)
    assert FIXES.get(place, "free some space") in caught.value.fix
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    assert verify(tmp_path / "step-00000001") == verify(tmp_path / "step-00000002") == []
    save(tmp_path, 3)
    assert load_latest(tmp_path).step == 3


def test_a_failed_save_is_reported_and_the_next_one_works(tmp_path, monkeypatch):
    said = []

    def put(saver, step):
        weights = {"w": torch.ones(2)}
        saver.save(
            step, tensors={}, model_files=lambda folder: save_file(weights, folder / "model.safetensors"), state={}
        )

    with Checkpointer(tmp_path, hashes={}, report=said.append) as saver:
        put(saver, 1)
        saver.wait()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing(errno.ENOSPC))
            put(saver, 2)
            saver.wait()
        assert len(said) == 1 and "No space left" in said[0] and saver.latest.name == "step-00000001"
        put(saver, 3)
    assert saver.latest.name == "step-00000003" and len(said) == 1
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with (
        pytest.raises(RonnaError, match="No space left"),
        Checkpointer(tmp_path, hashes={}, report=said.append) as saver,
    ):
        put(saver, 4)
    with pytest.raises(KeyError), Checkpointer(tmp_path, hashes={}, report=said.append) as saver:
        put(saver, 5)
        raise KeyError("what ended the training is not hidden by the save that failed too")


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "open", failing(errno.EROFS))
    with pytest.raises(RonnaError, match="cannot save checkpoints here") as caught:
        Checkpointer(tmp_path, hashes={}, report=print)
    assert "writable" in caught.value.fix


CHILD = """
import errno, itertools, json, os, random, signal, sys, time
from pathlib import Path
import torch
from safetensors.torch import save_file
from ronna.base.errors import RonnaError
from ronna.train.checkpoint import load_latest, verify
from ronna.train.checkpointer import Checkpointer

def write_model(folder, weights):
    save_file(weights, folder / "model.safetensors")

def put(saver, step):
    values = {f"w{i}": torch.full((2048,), float(step)) for i in range(4)}
    state = {"step": step}
    saver.save(step, tensors={"optimizer": values}, model_files=lambda f: write_model(f, values), state=state)

def checked(root):
    loaded = load_latest(root)
    step = 0 if loaded is None else loaded.step
    if loaded:
        assert loaded.state == {"step": step} and loaded.notes == (), loaded
        assert all(t.eq(step).all() for t in loaded.tensors("optimizer").values())
    return step

root = Path(sys.argv[1])
"""


def run_child(code, root, *command):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    script = CHILD + textwrap.dedent(code)
    arguments = [*command, sys.executable, "-c", script, str(root)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kill_at_random_moments(tmp_path):
    """20 runs, each resuming from the one before and killed while it saves all the time."""
    runs = run_child(
        """
        results = []
        for seed in range(20):
            begun, told = checked(root), os.pipe()
            pid = os.fork()
            if pid == 0:
                with Checkpointer(root, hashes={}, report=print) as saver:
                    os.write(told[1], b"ready ")
                    for step in itertools.count(begun + 1):
                        put(saver, step)
                        saver.wait()
                        os.write(told[1], b"%d " % step)
            os.close(told[1])
            said = os.read(told[0], 6)
            time.sleep(random.Random(seed).uniform(0.0, 0.25))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            while piece := os.read(told[0], 65536):
                said += piece
            os.close(told[0])
            done = max([begun, *map(int, said.split()[1:])])
            left = [p.name for p in root.glob("*.tmp-*")] if root.exists() else []
            whole = [p for p in root.glob("step-????????") if not verify(p)]
            results.append({"done": done, "loaded": checked(root), "left": left, "whole": len(whole)})
        print(json.dumps(results))
        """,
        tmp_path / "checkpoints",
    )
    assert len(runs) == 20
    for run in runs:
        assert run["loaded"] in (run["done"], run["done"] + 1), run
        assert run["whole"] >= min(2, run["loaded"]), run
        assert len(run["left"]) <= 2, run  # this run's: those of earlier runs were deleted
    assert sum(bool(run["left"]) for run in runs) >= 5, "the kills did not land inside saves"


def test_kill_at_every_call_that_changes_the_disk(tmp_path):
    """A save of step 3 over steps 1 and 2 is killed just before its k-th call, for every k."""
    runs = run_child(
        """
        def count_down(calls):
            left = [calls]
            def counted(call):
                def wrapped(*args, **options):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return call(*args, **options)
                return wrapped
            for name in ("mkdir", "open", "fsync", "rename", "unlink", "rmdir"):
                setattr(os, name, counted(getattr(os, name)))

        results = []
        for calls in itertools.count():
            folder = root / str(calls)
            with Checkpointer(folder, hashes={}, report=print) as saver:
                for step in (1, 2):
                    put(saver, step)
            pid = os.fork()
            if pid == 0:
                with Checkpointer(folder, hashes={}, report=print) as saver:
                    count_down(calls)
                    put(saver, 3)
                    saver.wait()
                    os._exit(0)
            killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
            loaded, before = checked(folder), sorted(p.name for p in folder.glob("step-*"))
            with Checkpointer(folder, hashes={}, report=print) as saver:
                put(saver, 4)
            after = sorted(p.name for p in folder.glob("step-*"))
            results.append({"loaded": loaded, "before": before, "after": after, "again": checked(folder)})
            if not killed:
                break
        print(json.dumps(results))
        """,
        tmp_path,
    )
    loaded = [run["loaded"] for run in runs]
    assert len(runs) > 15 and loaded == sorted(loaded) and {*loaded} == {2, 3}
    for run in runs:
        whole = [name for name in run["before"] if ".tmp-" not in name]
        assert len(whole) >= 2 and run["again"] == 4, run
        assert run["after"] == [f"step-0000000{run['loaded']}", "step-00000004"], run
    assert runs[-1]["before"] == ["step-00000002", "step-00000003"]


def can_mount():
    command = ["unshare", "--mount", "--user", "--map-root-user", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs a mount namespace of its own")
def test_a_disk_that_is_really_full_and_one_that_is_really_read_only(tmp_path):
    result = run_child(
        """
        import subprocess
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(root)], check=True)
        said = []
        with Checkpointer(root, hashes={}, report=said.append) as saver:
            for step in (1, 2, 3, 4, 5):  # about 68 KiB each, three at a time at most
                put(saver, step)
            saver.wait()
            (root / "ballast").write_bytes(bytes(64 * 1024))
            put(saver, 6)
            saver.wait()
            full = list(said)
            (root / "ballast").unlink()
            put(saver, 7)
            saver.wait()
        names, loaded = sorted(p.name for p in root.glob("step-*")), checked(root)
        subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
        try:
            Checkpointer(root, hashes={}, report=print)
        except RonnaError as error:
            refused = str(error)
        print(json.dumps([full, names, loaded, refused]))
        """,
        tmp_path,
        *("unshare", "--mount", "--user", "--map-root-user"),
    )
    full, names, loaded, refused = result
    assert len(full) == 1 and "No space left on device" in full[0] and "free some space" in full[0]
    assert names == ["step-00000005", "step-00000007"] and loaded == 7
    assert "Read-only file system" in refused and "make the folder writable" in refused
