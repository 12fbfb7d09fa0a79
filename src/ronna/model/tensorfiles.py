"""The safetensors files of a model folder: one, or shards with an index. Pickled weights are never read."""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ronna.base.errors import RonnaError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
KINDS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
ENTRY = 256  # bytes of a header that one tensor needs at most beside its name
FLOATS = ("F64", "F32", "F16", "BF16")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
AGAIN = "copy or download the folder again"


class TensorFiles:
    """The tensors of a folder by key, read from the disk one at a time; a context manager.

    Raises RonnaError where the folder has no safetensors, or a file is missing, cut or not as indexed.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        single = folder / SINGLE
        if single.is_file():
            file = self._open(single)
            self._files = dict.fromkeys(file.keys(), file)
        elif (folder / INDEX).is_file():
            self._open_shards(folder / INDEX)
        else:
            raise self._no_weights()

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _open(self, path: Path) -> Any:
        try:
            # Read, not mapped: pages of a mapped file count as the process's memory until it is closed.
            return self._stack.enter_context(safe_open(path, framework="pt", backend="pread"))
        except (OSError, SafetensorError) as error:
            raise RonnaError(f"cannot be read: {error}", where=str(path), fix=AGAIN) from None

    def _open_shards(self, index: Path) -> None:
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise RonnaError("not an index of weights", where=str(index), fix=AGAIN) from None
        files: dict[str, Any] = {}
        held: set[tuple[str, str]] = set()
        for key, name in places:
            # A name with a path in it could make us read any file of this machine.
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise RonnaError(f"{name!r} is not a file name of this folder", where=str(index), fix=AGAIN)
            if name not in files:
                files[name] = self._open(self.folder / name)
                held |= {(name, stored) for stored in files[name].keys()}  # noqa: SIM118
            if (name, key) not in held:
                raise RonnaError(f"{name} does not hold {key}", where=str(index), fix=AGAIN)
            self._files[key] = files[name]

    def _no_weights(self) -> RonnaError:
        pickled = sorted(path.name for pattern in PICKLES for path in self.folder.glob(pattern))
        if not pickled:
            return RonnaError(f"no {SINGLE}", where=str(self.folder), fix=AGAIN)
        return RonnaError(
            f"only pickled weights ({', '.join(pickled[:3])}); reading them could run code of a stranger",
            where=str(self.folder),
            fix="convert them once where that is safe, with transformers: "
            "AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR), or the class named in config.json",
        )

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape as stored. Raises RonnaError for tensors that are not floating point (quantized weights)."""
        piece = self._files[key].get_slice(key)
        if piece.get_dtype() not in FLOATS:
            raise RonnaError(
                f"{key} holds {piece.get_dtype()} numbers",
                where=str(self.folder),
                fix="use the original weights",
            )
        return tuple(piece.get_shape())

    def read(self, key: str, start: int, stop: int, dim: int) -> Tensor:
        """The stored tensor from `start` up to `stop` along `dim` (0 or 1); only that part is read."""
        piece = self._files[key].get_slice(key)
        try:
            part: Tensor = piece[start:stop] if dim == 0 else piece[:, start:stop]
        except SafetensorError as error:
            raise RonnaError(f"{key} cannot be read: {error}", where=str(self.folder), fix=AGAIN) from None
        return part

    def glimpse(self, key: str, rows: int = 8) -> tuple[str, tuple[int, ...], Tensor]:
        """Type, shape and first rows of a tensor, be it floating point or not."""
        piece = self._files[key].get_slice(key)
        shape = tuple(piece.get_shape())
        head = piece[: min(rows, shape[0])] if shape else self._files[key].get_tensor(key)
        return piece.get_dtype(), shape, head


def fingerprint(folder: Path) -> str:
    """sha256 of every tensor's name, type, shape and first rows: quick however large, and training changes it."""
    total = hashlib.sha256()
    with TensorFiles(folder) as files:
        for key in sorted(files.names):
            kind, shape, head = files.glimpse(key)
            total.update(f"{key} {kind} {shape}".encode())
            total.update(head.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def write_tensors(
    folder: Path,
    kinds: Mapping[str, torch.dtype],
    sizes: Mapping[str, int],
    make: Callable[[str], Tensor],
    max_shard_bytes: int,
) -> None:
    """Write the tensors that `make` returns by key, sharded as transformers does; `sizes` are their bytes.

    One tensor is in memory at a time. Older weights in the folder go, since a reader that finds
    both kinds takes the wrong ones. Raises OSError where the disk refuses.
    """
    groups = shards(sizes, max_shard_bytes)
    for old in (*folder.glob("model-*-of-*.safetensors"), folder / SINGLE, folder / INDEX):
        old.unlink(missing_ok=True)
    names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    if len(groups) == 1:
        names = [SINGLE]
    count = 0
    for name, keys in zip(names, groups, strict=True):
        count += save_tensors(folder / name, {key: kinds[key] for key in keys}, make)
    if len(groups) > 1:
        index = {
            "metadata": {"total_parameters": count, "total_size": sum(sizes.values())},
            "weight_map": {key: name for name, keys in zip(names, groups, strict=True) for key in keys},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_tensors(
    path: Path,
    kinds: Mapping[str, torch.dtype],
    make: Callable[[str], Tensor],
    written: Callable[[Tensor], object] = lambda tensor: None,
    metadata: Mapping[str, str] = {},
) -> int:
    """Write a safetensors file of the tensors that `make` returns by key, one in memory at a time, and return how many
    numbers they are. `kinds` are their types; `written` is told of each one that is done.

    Wide numbers come first, so that all lie at a multiple of their size. Where they lie is known at the end, and is
    written into the room that was left for it.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    room = (len(json.dumps(header)) + sum(len(json.dumps(key)) + ENTRY for key in kinds)) // 8 * 8 + ENTRY
    end = count = 0
    with path.open("wb") as file:
        file.seek(8 + room)
        for key in sorted(kinds, key=lambda key: (-kinds[key].itemsize, key)):
            tensor = make(key)
            size = tensor.numel() * tensor.element_size()
            header[key] = {"dtype": KINDS[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [end, end + size]}
            end, count = end + size, count + tensor.numel()
            file.write(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
            written(tensor)
            del tensor  # before the next one is made
        file.seek(0)
        text = json.dumps(header, separators=(",", ":")).encode()
        file.write(room.to_bytes(8, "little") + text.ljust(room))
    return count


def shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Consecutive keys that stay within `limit` bytes together; a larger tensor has a shard of its own."""
    groups: list[list[str]] = [[]]
    used = 0
    for key, size in sizes.items():
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(key)
        used += size
    return groups


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
