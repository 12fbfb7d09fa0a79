"""Tensors in files: whole in one, or in boxes in the files of several ranks, which any other number of ranks reads."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ronna.model.boxes import Box, box_of, in_parts, local
from ronna.model.tensorfiles import KINDS, save_tensors
from ronna.parallel.world import World

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

PLACES = "places"  # in a file's metadata: the shape of the whole tensor, and where this file's box of it begins
TYPES = {name: kind for kind, name in KINDS.items()}


def pieces_name(stem: str, world: World) -> str:
    return f"{stem}.safetensors" if world.size == 1 else f"{stem}-{world.rank + 1:05}-of-{world.size:05}.safetensors"


def find_pieces(folder: Path, stem: str) -> list[Path]:
    """The files that hold the tensors of `stem`; none where there are none."""
    files = sorted(folder.glob(f"{stem}-?????-of-?????.safetensors"))
    return files or [path for path in (folder / f"{stem}.safetensors",) if path.is_file()]


def write_pieces(
    folder: Path, stem: str, group: Mapping[str, Tensor], world: World, written: Callable[[Tensor], object]
) -> None:
    """This rank's boxes of a group of tensors; the first of those with the same blocks also has what they have whole.
    `written` is told of each that is done."""
    owns = {n: t for n, t in group.items() if (owned(t, world) if in_parts(t) else world.first_of_stage)}
    places = {name: [[*t.shape], [*box_of(t).start]] for name, t in owns.items() if in_parts(t)}
    kinds = {name: tensor.dtype for name, tensor in owns.items()}
    metadata = {PLACES: json.dumps(places)} if places else {}
    save_tensors(folder / pieces_name(stem, world), kinds, lambda name: local(owns[name]), written, metadata)


def owned(tensor: "DTensor", world: World) -> bool:
    """Whether what lies here lies on no rank before this one as well."""
    divided = "tensor" in (tensor.device_mesh.mesh_dim_names or ())
    return world.first_copy and (divided or world.rank % world.tensor == 0)


class Piece(NamedTuple):
    file: Any
    whole: tuple[int, ...]  # shape of the tensor that it is a piece of
    box: Box


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a group of files, each read when it is looked up: who looks holds it, nobody else.

    Read, not mapped: pages of a mapped file count as the process's memory for as long as one of its tensors is there.
    """

    def __init__(self, paths: Sequence[Path]):
        self._pieces: dict[str, list[Piece]] = {}
        for path in paths:
            file = safe_open(path, framework="pt", backend="pread")
            places = json.loads((file.metadata() or {}).get(PLACES, "{}"))
            for name in file.keys():  # noqa: SIM118
                shape = tuple(file.get_slice(name).get_shape())
                whole, start = map(tuple, places.get(name, (shape, (0,) * len(shape))))
                self._pieces.setdefault(name, []).append(Piece(file, whole, Box(start, shape)))

    def __getitem__(self, name: str) -> Tensor:
        return self.box(name, Box.all_of(self.shape(name)))

    def box(self, name: str, wanted: Box) -> Tensor:
        """Part of a tensor, of whichever pieces it has."""
        pieces = self._pieces[name]
        if len(pieces) == 1 and pieces[0].box == wanted:
            found: Tensor = pieces[0].file.get_tensor(name)
            return found
        made = torch.empty(wanted.shape, dtype=TYPES[pieces[0].file.get_slice(name).get_dtype()])
        for piece in pieces:
            common = piece.box.common(wanted)
            if common is not None:
                made[common.within(wanted)] = piece.file.get_slice(name)[common.within(piece.box)]
        return made

    def shape(self, name: str) -> tuple[int, ...]:
        return self._pieces[name][0].whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)


class Resharded(Mapping[str, Tensor]):
    """Stored states "parameter.key", those of a parameter's shape in parts as the parameter is now. `elsewhere` are
    names that those of parameters which other ranks have begin with."""

    def __init__(self, stored: StoredTensors, parameters: Mapping[str, Tensor], elsewhere: tuple[str, ...] = ()):
        self.stored, self.parameters, self.elsewhere = stored, parameters, elsewhere

    def __getitem__(self, name: str) -> Tensor:
        like = self.parameters.get(name.rpartition(".")[0])
        if like is None or not in_parts(like) or self.stored.shape(name) != tuple(like.shape):
            return self.stored[name]
        part = self.stored.box(name, box_of(like)).to(like.device)
        return type(like).from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.stored if not name.startswith(self.elsewhere))

    def __len__(self) -> int:
        return sum(1 for _ in self)
