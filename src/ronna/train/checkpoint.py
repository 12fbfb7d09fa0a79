"""Checkpoints that survive a kill, a full disk and a flipped bit.

    checkpoints/step-00001000/
        manifest.json           written last: size and sha256 of every file, hashes of config, tokenizer, data
        state.json              step, tokens, counters, best score ...
        optimizer.safetensors   one file for each group of tensors; optimizer-00001-of-00002.safetensors and so on
                                where they lie in parts on several ranks
        model/                  in Hugging Face layout

A checkpoint is written to `step-00001000.tmp-<id>` and gets its name by one rename, when every byte is on the
disk: a folder without `.tmp-` in its name was once whole. It is read back before an older one is deleted.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ronna.base.errors import RonnaError
from ronna.parallel.world import ALONE, World
from ronna.train.pieces import StoredTensors, find_pieces, write_pieces

MANIFEST, STATE, MODEL = "manifest.json", "state.json", "model"
FORMAT = 1

_MENDS = {
    "base": "put the model back that the run was started from, or start in a new output folder",
    "config": "set the config back as it was, or start in a new output folder",
    "tokenizer": "use the tokenizer the run was started with, or start in a new output folder",
    "data": "restore the data the run was started with, or start in a new output folder",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose every byte was checked; `notes` names damaged ones passed over for it."""

    path: Path
    step: int
    state: dict[str, Any]
    hashes: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def model_dir(self) -> Path:
        return self.path / MODEL

    def tensors(self, stem: str) -> StoredTensors:
        """The tensors of `stem`.safetensors, on the CPU, read whenever they are asked for.

        Raises RonnaError if the checkpoint has none.
        """
        files = find_pieces(self.path, stem)
        if not files:
            has = ", ".join(sorted(f.stem for f in self.path.glob("*.safetensors"))) or "none"
            raise RonnaError(f"holds no tensors called {stem!r} (it has: {has})", where=str(self.path))
        return StoredTensors(files)


def save_checkpoint(
    root: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    model_files: Callable[[Path], None],
    state: dict[str, Any],
    hashes: dict[str, str],
    keep: int = 2,
    protect: Collection[int] = (),
) -> Path:
    """`write_checkpoint` and `settle_checkpoint`."""
    staging = write_checkpoint(root, step, tensors=tensors, model_files=model_files, state=state)
    return settle_checkpoint(staging, hashes=hashes, keep=keep, protect=protect)


def write_checkpoint(
    root: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    model_files: Callable[[Path], None],
    state: dict[str, Any],
    written: Callable[[Tensor], object] = lambda tensor: None,
    world: World = ALONE,
) -> Path:
    """Hand everything of `root`/step-N to the system, and return the folder it is in for now.

    `tensors` maps a file stem to named tensors, each of which `written` is told of when it is done, `model_files`
    writes the model into the folder it is given, `state` is strict JSON. A whole checkpoint of the same step is never
    overwritten, a damaged one is set aside. Raises RonnaError when the disk is full, read-only or failing: nothing
    half-written is left then, older checkpoints are as they were, and training can go on.

    Every rank of a run calls it, and writes its part of the tensors; where one fails, all raise.
    """
    final = root / f"step-{step:08d}"
    staging = root / f"{final.name}.tmp-{world.told(secrets.randbits(32)):08x}"

    with _staged(staging, final, world):
        if world.main:
            root.mkdir(parents=True, exist_ok=True)
            _set_aside_damaged(final)
            (staging / MODEL).mkdir(parents=True)
            (staging / STATE).write_text(json.dumps(state, indent=1, allow_nan=False), encoding="utf-8")
    with _staged(staging, final, world):
        for stem, group in tensors.items():
            write_pieces(staging, stem, group, world, written)
    with _staged(staging, final, world):
        model_files(staging / MODEL)
    return staging


def settle_checkpoint(
    staging: Path,
    *,
    hashes: dict[str, str],
    keep: int = 2,
    protect: Collection[int] = (),
    finish: Callable[[Path], None] = lambda staging: None,
) -> Path:
    """Make a checkpoint of what `write_checkpoint` left: let `finish` see to what is still to be made of it, sync it,
    give it its name and read it back, then delete what is older than the newest `keep` (never fewer than two).

    The steps in `protect` are never deleted. Raises RonnaError as `write_checkpoint` does.
    """
    root, final = staging.parent, staging.with_name(staging.name.partition(".tmp-")[0])
    step = int(final.name.removeprefix("step-"))
    with _staged(staging, final):
        finish(staging)
        _write_manifest(staging, step, hashes)
        os.rename(staging, final)
        _sync(root)
        problems = verify(final)
        if problems:
            reason = f"{final.name} does not read back as it was written: {'; '.join(problems)}"
            raise RonnaError(reason, where=str(root), fix="check the disk; older checkpoints were kept")
        _delete_old(root, step, keep, protect)
    return final


@contextmanager
def _staged(staging: Path, final: Path, world: World = ALONE) -> Iterator[None]:
    """Whatever fails inside, on whichever rank, nothing half-written is left, and every rank knows."""
    failure: Exception | None = None
    try:
        yield
    except (OSError, SafetensorError) as error:
        failure = _disk_error(error, final)
        failure.__cause__ = error
    except RonnaError as error:
        failure = error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if world.any(failure is not None):
        shutil.rmtree(staging, ignore_errors=True)
        raise failure or RonnaError("another rank could not save its part of the checkpoint", where=str(final))


def _write_manifest(folder: Path, step: int, hashes: dict[str, str]) -> None:
    files = {}
    inside = sorted(folder.rglob("*"))
    for file in (path for path in inside if path.is_file()):
        # Hashed before the page cache is dropped: afterwards a read would show what the disk made of it.
        files[file.relative_to(folder).as_posix()] = {"size": file.stat().st_size, "sha256": _sha256(file)}
        _sync(file)
    for subfolder in (path for path in inside if path.is_dir()):
        _sync(subfolder)
    manifest: dict[str, Any] = {"format": FORMAT, "step": step, "hashes": hashes, "files": files}
    manifest["sha256"] = _checksum(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(folder / MANIFEST)
    _sync(folder)


def _sync(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk, and forget its cached pages."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):  # so that `verify` reads the disk, and data shards keep their cache
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _set_aside_damaged(final: Path) -> None:
    """Make room for `final`, unless a whole checkpoint is there."""
    if not final.exists():
        return
    if not verify(final):
        fix = "resume from the newest checkpoint, or train in another output folder"
        raise RonnaError("a whole checkpoint of this step exists, and none is overwritten", where=str(final), fix=fix)
    os.rename(final, final.with_name(f"{final.name}.damaged-{secrets.token_hex(4)}"))


def _delete_old(root: Path, step: int, keep: int, protect: Collection[int]) -> None:
    older = [(s, path) for s, path in _steps(root) if s < step and not _problems(path, read=False)]
    for old_step, path in older[max(keep, 2) - 1 :]:
        if old_step not in protect:
            # Renamed first: a kill in the middle leaves a leftover, not a damaged checkpoint.
            doomed = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _disk_error(error: OSError | SafetensorError, path: Path) -> RonnaError:
    number, reason = getattr(error, "errno", None), str(error)
    if isinstance(error, SafetensorError):
        found = re.search(r"os error (\d+)", reason)
        if not found:  # not the disk's fault: tensors that cannot be written
            raise error
        number, reason = int(found[1]), os.strerror(int(found[1]))
    if number in (errno.ENOSPC, errno.EDQUOT):
        fix = f"free some space under {path.parent}, or train in an output folder on a larger disk"
    elif number in (errno.EROFS, errno.EACCES, errno.EPERM):
        fix = f"make {path.parent} writable, or choose another output folder"
    else:
        fix = "check the disk, or choose another output folder"
    return RonnaError(f"the checkpoint could not be saved: {reason}; older ones were kept", where=str(path), fix=fix)


def verify(path: Path) -> list[str]:
    """What is wrong with the checkpoint in `path`, a line a problem; empty when every byte is right."""
    return list(_problems(path, read=True))


def _problems(path: Path, *, read: bool) -> list[str]:
    """With `read` false only the manifest and the sizes are looked at."""
    try:
        manifest = _read_manifest(path)
    except ValueError as error:
        return [f"{MANIFEST}: {error}"]
    found = ((name, _file_problem(path, name, entry, read)) for name, entry in manifest["files"].items())
    return [f"{name}: {problem}" for name, problem in found if problem]


def _read_manifest(path: Path) -> dict[str, Any]:
    """Raises ValueError saying what is wrong with it."""
    try:
        content = (path / MANIFEST).read_bytes()
        manifest = json.loads(content)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError("is not whole" if content else "is empty") from error
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _checksum(manifest):
        raise ValueError("does not match its own checksum")
    if manifest["format"] != FORMAT:
        raise ValueError(f"has format {manifest['format']}, this version reads {FORMAT}")
    return manifest


def _file_problem(path: Path, name: str, entry: dict[str, Any], read: bool) -> str | None:
    file = path / name
    try:
        if not file.is_file():
            return "is missing"
        if (size := file.stat().st_size) != entry["size"]:
            return f"has {size} bytes instead of {entry['size']}"
        if read and _sha256(file) != entry["sha256"]:
            return "does not match its checksum"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _steps(root: Path) -> list[tuple[int, Path]]:
    """Every named checkpoint under `root`, the newest first."""
    found = [(re.fullmatch(r"step-(\d{8,})", path.name), path) for path in root.iterdir()]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def load_latest(root: Path, *, expect: dict[str, str] | None = None) -> Checkpoint | None:
    """The newest whole checkpoint under `root`; None if there are none at all.

    Damaged ones are passed over and named, with the reason, in `notes`. Raises RonnaError when all are
    damaged, or when the one found was made with other hashes (config, tokenizer, data) than `expect`, saying
    which.
    """
    notes: list[str] = []
    try:
        steps = _steps(root)
    except FileNotFoundError:
        return None
    except OSError as error:
        fix = "give the folder with the step-... folders"
        raise RonnaError(f"cannot be read: {error.strerror}", where=str(root), fix=fix) from error
    for _, path in steps:
        problems = verify(path)
        if not problems:
            return _open(path, expect, tuple(notes))
        notes.append(f"{path.name} is damaged and was passed over ({'; '.join(problems)})")
    if notes:
        fix = "restore one from a backup, or start in a new output folder"
        raise RonnaError("no whole checkpoint is left: " + "; ".join(notes), where=str(root), fix=fix)
    return None


def load_checkpoint(path: Path, *, expect: dict[str, str] | None = None) -> Checkpoint:
    """The checkpoint in the folder `path`. Raises RonnaError if it is damaged or does not fit `expect`."""
    if problems := verify(path):
        fix = "use another checkpoint"
        raise RonnaError(f"not a whole checkpoint: {'; '.join(problems)}", where=str(path), fix=fix)
    return _open(path, expect, ())


def _open(path: Path, expect: dict[str, str] | None, notes: tuple[str, ...]) -> Checkpoint:
    manifest = _read_manifest(path)
    hashes = manifest["hashes"]
    changed = [name for name, value in (expect or {}).items() if hashes.get(name) != value]
    if changed:
        fix = "; ".join(_MENDS.get(name, f"set the {name} back as it was") for name in changed)
        what = f"made with another {' and another '.join(changed)} than this run has"
        raise RonnaError(what, where=str(path), fix=fix)
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    return Checkpoint(path, manifest["step"], state, hashes, notes)
