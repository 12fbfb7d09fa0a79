"""Tensors in boxes over several files: what one layout wrote, any other reads."""

import json

import pytest
import torch

from ronna.model.boxes import Box, box_of
from ronna.model.tensorfiles import save_tensors
from ronna.parallel.world import ALONE, World
from ronna.train.pieces import PLACES, Resharded, StoredTensors, find_pieces, write_pieces

W = torch.arange(7 * 5, dtype=torch.float32).view(7, 5)


def written(folder, boxes):
    """W in these boxes, a file each."""
    for number, box in enumerate(boxes):
        part = W[box.within(Box((0, 0), (7, 5)))]
        metadata = {PLACES: json.dumps({"w": [[7, 5], box.start]})}
        name = f"optimizer-{number + 1:05}-of-{len(boxes):05}.safetensors"
        save_tensors(folder / name, {"w": part.dtype}, lambda _, part=part: part, metadata=metadata)
    return StoredTensors(find_pieces(folder, "optimizer"))


ROWS = [Box((0, 0), (3, 5)), Box((3, 0), (3, 5)), Box((6, 0), (1, 5))]
TILES = [Box((0, 0), (4, 2)), Box((0, 2), (4, 3)), Box((4, 0), (3, 2)), Box((4, 2), (3, 3))]


@pytest.mark.parametrize("boxes", [ROWS, TILES, [Box((0, 0), (7, 5))], [*ROWS, Box((7, 0), (0, 5))]])
def test_any_box_of_what_lies_in_boxes(boxes, tmp_path):
    stored = written(tmp_path, boxes)
    assert torch.equal(stored["w"], W) and stored.shape("w") == (7, 5) and list(stored) == ["w"] and len(stored) == 1
    for wanted in (*ROWS, *TILES, Box((2, 1), (4, 3))):
        assert torch.equal(stored.box("w", wanted), W[wanted.within(Box((0, 0), (7, 5)))])
    assert stored.box("w", Box((7, 0), (0, 5))).shape == (0, 5)
    with pytest.raises(KeyError):
        stored["v"]


def test_one_process_writes_one_file_and_reads_numbers_and_strides(tmp_path):
    group = {"w.exp_avg": W.T, "w.step": torch.tensor(3.0), "b.exp_avg": W[0].bfloat16()}
    seen = []
    write_pieces(tmp_path, "optimizer", group, ALONE, seen.append)
    assert [path.name for path in tmp_path.iterdir()] == ["optimizer.safetensors"] and len(seen) == 3
    stored = Resharded(StoredTensors(find_pieces(tmp_path, "optimizer")), {"w": W.T, "b": W[0]})
    assert stored.keys() == group.keys() and len(stored) == 3
    assert all(torch.equal(stored[name], t) and stored[name].dtype == t.dtype for name, t in group.items())


def test_what_every_rank_has_whole_is_written_by_the_first(tmp_path):
    for rank in range(2):
        write_pieces(tmp_path, "optimizer", {"w.step": torch.tensor(3.0)}, World(rank, 2), lambda tensor: None)
    stored = StoredTensors(find_pieces(tmp_path, "optimizer"))
    assert len(find_pieces(tmp_path, "optimizer")) == 2 and float(stored["w.step"]) == 3.0


def test_boxes():
    a, b = Box((0, 2), (4, 4)), Box((3, 0), (4, 3))
    assert a.common(b) == b.common(a) == Box((3, 2), (1, 1))
    assert a.common(Box((4, 0), (1, 9))) is None and Box((), ()).common(Box((), ())) == Box((), ())
    assert Box((3, 2), (1, 1)).within(a) == (slice(3, 4), slice(0, 1)) and box_of(W) == Box((0, 0), (7, 5))


@pytest.mark.parametrize(("items", "size"), [(7, 3), (2, 4), (0, 2), (8, 4)])
def test_ranks_share_all_items_in_order(items, size):
    parts = [World(rank, size).share(range(items)) for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
