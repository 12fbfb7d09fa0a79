import hashlib
import os
import signal
from multiprocessing import get_context

import numpy as np
import pytest

from ronna.base.errors import RonnaError
from ronna.data.shards import Shards, documents_done, write_shards

SETTINGS = {"vocab_size": 1000, "tokenizer_hash": "tok", "source_hash": "src", "shard_tokens": 100}


def documents(count=30, vocab=1000, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(vocab, size=n).tolist() for n in rng.integers(0, 30, size=count)]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(("vocab", "dtype"), [(1000, "<u2"), (65_536, "<u2"), (65_537, "<u4")])
def test_what_is_written_is_what_is_read(vocab, dtype, tmp_path):
    docs = [*documents(vocab=vocab), [vocab - 1], [], list(range(200))]
    manifest = write_shards(tmp_path / "s", docs, **(SETTINGS | {"vocab_size": vocab}))
    shards = Shards(tmp_path / "s", expect_tokenizer="tok")
    shards.verify()
    assert len(shards) == len(docs) == manifest.documents and manifest.tokens == sum(map(len, docs))
    assert shards.lengths.dtype == np.int64 and shards.lengths.tolist() == [len(doc) for doc in docs]
    assert all(shards[i].tolist() == doc and shards[i].dtype == dtype for i, doc in enumerate(docs))
    assert shards.slice(5, 2, 4).tolist() == docs[5][2:4]
    assert len(manifest.shards) > 4 and max(shard.tokens for shard in manifest.shards) == 200
    with pytest.raises(IndexError):
        shards[len(docs)]


def test_arrays_and_only_empty_documents(tmp_path):
    write_shards(tmp_path / "a", (np.array([1, 2], dtype=np.uint32) for _ in range(2)), **SETTINGS)
    assert Shards(tmp_path / "a")[1].tolist() == [1, 2]
    write_shards(tmp_path / "b", [[], []], **SETTINGS)
    assert Shards(tmp_path / "b").lengths.tolist() == [0, 0]


@pytest.mark.parametrize("bad", [[1000], [-1], [0.5], [[1]], ["a"]])
def test_what_is_no_id_of_the_vocabulary_is_refused(bad, tmp_path):
    with pytest.raises(RonnaError, match="document 3") as refused:
        write_shards(tmp_path, [[1], [2], [999], bad], **SETTINGS)
    assert refused.value.fix and not (tmp_path / "manifest.json").exists()


def write_and_die(out, moment):
    """In a process of its own: killed before the moment-th document, fsync, rename or removal."""

    def count_down():
        nonlocal moment
        moment -= 1
        if moment == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(call):
        def call_after_count(*arguments):
            count_down()
            return call(*arguments)

        return call_after_count

    os.fsync, os.replace, os.unlink = counted(os.fsync), counted(os.replace), counted(os.unlink)
    write_shards(out, (doc for doc in documents() if not count_down()), **SETTINGS)


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(seed, tmp_path):
    write_shards(tmp_path / "whole", documents(), **SETTINGS)
    rng = np.random.default_rng(seed)
    done, exit_code = [0], -signal.SIGKILL
    while exit_code == -signal.SIGKILL:
        moment = int(rng.integers(3, 70))
        process = get_context("fork").Process(target=write_and_die, args=(tmp_path / "cut", moment))
        process.start()
        process.join(60)
        exit_code = process.exitcode
        done.append(documents_done(tmp_path / "cut"))
    assert exit_code == 0 and len(done) >= 3 and done == sorted(done)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_resuming_asks_only_for_what_is_not_durable(tmp_path):
    docs = documents()

    def failing():
        yield from docs[:20]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "cut", failing(), **SETTINGS)
    done = documents_done(tmp_path / "cut")
    assert 10 < done <= 20
    with pytest.raises(RonnaError, match="unfinished"):
        Shards(tmp_path / "cut")
    with pytest.raises(RonnaError, match=f"documents {done} to {done} are neither"):
        write_shards(tmp_path / "cut", docs[done + 1 :], first=done + 1, **SETTINGS)
    write_shards(tmp_path / "cut", docs[done - 2 :], first=done - 2, **SETTINGS)
    write_shards(tmp_path / "whole", docs, **SETTINGS)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert documents_done(tmp_path / "cut") == len(docs)


@pytest.mark.parametrize(
    "change",
    [{"tokenizer_hash": "other"}, {"source_hash": "other"}, {"vocab_size": 999}, {"meta": {"lower": True}}],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_something_else_is_never_continued(change, finished, tmp_path):
    write_shards(tmp_path, documents(), meta={"form": ("nfc",)}, **SETTINGS)
    write_shards(tmp_path, documents(), meta={"form": ("nfc",)}, **SETTINGS)
    if not finished:
        (tmp_path / "manifest.json").rename(tmp_path / "progress.json")
    before = contents(tmp_path)
    with pytest.raises(RonnaError, match=next(iter(change))):
        write_shards(tmp_path, documents(), **(SETTINGS | change))
    assert contents(tmp_path) == before


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RonnaError, match="not empty"):
        write_shards(tmp_path, documents(), **SETTINGS)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_every_kind_of_damage_is_named(tmp_path):
    write_shards(tmp_path, documents(), **SETTINGS)
    with pytest.raises(RonnaError, match="tokenized with tok, the model's tokenizer is other"):
        Shards(tmp_path, expect_tokenizer="other")
    for name in ("tokens-00002.bin", "ends-00001.bin"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        with pytest.raises(RonnaError, match=f"{name}: damaged"):
            Shards(tmp_path).verify()
        (tmp_path / name).write_bytes(whole[:-1])
        with pytest.raises(RonnaError, match=f"{name}: {len(whole) - 1} bytes instead of {len(whole)}"):
            Shards(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(RonnaError, match=f"{name}: missing"):
            Shards(tmp_path)
        (tmp_path / name).write_bytes(whole)
    for manifest in ("", "[]", '{"format": 1}', '{"format": 2}', "[" * 10_000):
        (tmp_path / "manifest.json").write_text(manifest)
        with pytest.raises(RonnaError, match=r"manifest.json: not readable"):
            Shards(tmp_path)


def test_a_shard_lost_while_unfinished_is_written_again(tmp_path):
    write_shards(tmp_path, documents(), **SETTINGS)
    whole = contents(tmp_path)
    (tmp_path / "manifest.json").rename(tmp_path / "progress.json")
    (tmp_path / "ends-00003.bin").unlink()
    write_shards(tmp_path, documents(), **SETTINGS)
    assert contents(tmp_path) == whole


def test_no_documents(tmp_path):
    with pytest.raises(RonnaError, match="no documents"):
        write_shards(tmp_path, [], **SETTINGS)


def test_a_full_disk_is_said_and_mended(tmp_path, monkeypatch):
    real, full = os.fsync, [False] * 9 + [True]

    def fsync(descriptor):
        if full and full.pop(0):
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RonnaError, match=r"cannot write: No space left.*\n.*goes on"):
        write_shards(tmp_path / "cut", documents(), **SETTINGS)
    write_shards(tmp_path / "cut", documents(), **SETTINGS)
    write_shards(tmp_path / "whole", documents(), **SETTINGS)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_the_hashes_are_those_of_the_files(tmp_path):
    manifest = write_shards(tmp_path, documents(), **SETTINGS)
    for number, shard in enumerate(manifest.shards):
        for name, expected in shard.hashes(number):
            assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == expected
