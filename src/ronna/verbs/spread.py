"""Cleaning, finding duplicates and tokenizing on the workers of a Ray cluster, with what one process makes of the same
documents, to the byte.

This process reads, decides which of several duplicates stays, and writes; workers do what takes time. Near duplicates
meet in the buckets of their MinHashes, which lie on the workers too; only pairs that are alike come here. Documents
travel as UTF-8, lone surrogates and all.
"""

import logging
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ronna.launch_ray import import_ray, join
from ronna.text.clean import BANDS, PERMUTATIONS, CleanConfig, CleanReport, Filters, digest_of, normalise, plain
from ronna.text.clean import sketch_of as minhash
from ronna.text.tokenizer import load_tokenizer

PART_CHARACTERS = 1_000_000  # of the documents that a worker takes at a time
ROWS = PERMUTATIONS // BANDS  # numbers of a sketch in a band

filters_of = lru_cache(maxsize=1)(Filters)
tokenizer_of = lru_cache(maxsize=1)(load_tokenizer)


def clean_and_encode(
    documents: Iterable[str], config: CleanConfig, report: CleanReport, folder: str
) -> Iterator[tuple[str, np.ndarray]]:
    """(text, ids) of the documents that stay, in order, as `clean` and the tokenizer in `folder` make them. `report` is
    complete before the first comes. Raises RonnaError where no cluster is running."""
    ray = import_ray()
    join(ray)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it would print the plan of each pass
    Filters(config)  # what is not installed is said here, not by a worker
    parts = [ray.put(part) for part in portions(documents)]
    if not parts:
        return
    whole = {"batch_format": "pyarrow", "batch_size": None}
    looked = ray.data.from_arrow_refs(parts).map_batches(look, fn_args=(config,), **whole).materialize()
    reasons = account(looked, report)
    kept = np.array([reason is None for reason in reasons])
    if config.dedup != "none":
        drop_equal(looked, kept, report)
    if config.dedup == "near":
        drop_alike(ray, looked, kept, report, config.near_threshold)
    report.kept = int(kept.sum())
    encoded = looked.map_batches(encode, fn_args=(ray.put(kept), folder), **whole)
    for batch in encoded.iter_batches(**whole):
        ids = batch["ids"].to_pylist()
        for text, some in zip(batch["text"].to_pylist(), ids, strict=True):
            yield text.decode("utf-8", "surrogatepass"), np.array(some, dtype=np.int64)


def portions(documents: Iterable[str]) -> Iterator[pa.Table]:
    """Tables of documents and their numbers."""
    texts, size, number = list[bytes](), 0, 0

    def table() -> pa.Table:
        numbers = pa.array(range(number - len(texts), number), pa.int64())
        return pa.table({"number": numbers, "text": pa.array(texts, pa.large_binary())})

    for text in documents:
        texts.append(text.encode("utf-8", "surrogatepass"))
        size, number = size + len(text), number + 1
        if size >= PART_CHARACTERS:
            yield table()
            texts, size = [], 0
    if texts:
        yield table()


# On the workers


def look(part: pa.Table, config: CleanConfig) -> pa.Table:
    """Documents in the form wanted, why they are dropped by themselves, and what tells that two are alike."""
    unfit, found = filters_of(config), list[tuple[bytes, str | None, str, bytes, bytes]]()
    for text in part["text"].to_pylist():
        cleaned, changes = normalise(text.decode("utf-8", "surrogatepass"), config)
        reason, digest, sketch = unfit(cleaned), b"", b""
        if reason is None and config.dedup != "none":
            same = plain(cleaned)
            digest = digest_of(same)
            if config.dedup == "near":
                sketch = np.array(minhash(same).digest(), dtype="<u4").tobytes()
        found.append((cleaned.encode("utf-8", "surrogatepass"), reason, " ".join(changes), digest, sketch))
    texts, reasons, changed, digests, sketches = zip(*found, strict=True)
    columns = {"number": part["number"], "text": pa.array(texts, pa.large_binary())}
    columns |= {"reason": pa.array(reasons, pa.string()), "changed": pa.array(changed, pa.string())}
    columns |= {"digest": pa.array(digests, pa.binary()), "sketch": pa.array(sketches, pa.binary())}
    return pa.table(columns)


def banded(part: pa.Table, kept: Any) -> pa.Table:
    """A row for each band of each document that is left: its bucket, and the document's number."""
    numbers = part["number"].to_numpy()
    here = value_of(kept)[numbers]
    sketches = [s for s, left in zip(part["sketch"].to_pylist(), here, strict=True) if left]
    size = 4 * ROWS
    buckets = [bytes([band]) + s[band * size :][:size] for s in sketches for band in range(BANDS)]
    owners = np.repeat(numbers[here], BANDS)
    return pa.table({"bucket": pa.array(buckets, pa.binary()), "number": pa.array(owners, pa.int64())})


def met(part: pa.Table) -> pa.Table:
    """Pairs of documents that stand side by side in a bucket; a table has all rows of its buckets."""
    part = part.sort_by([("bucket", "ascending"), ("number", "ascending")])
    rows = zip(part["bucket"].to_pylist(), part["number"].to_pylist(), strict=True)
    pairs = {(a[1], b[1]) for a, b in pairwise(rows) if a[0] == b[0]}
    low, high = zip(*sorted(pairs), strict=True) if pairs else ((), ())
    return pa.table({"low": pa.array(low, pa.int64()), "high": pa.array(high, pa.int64())})


def some_of(part: pa.Table, wanted: Any, column: str) -> pa.Table:
    """The numbers of the wanted documents, and a column of them."""
    return part.filter(pa.array(value_of(wanted)[part["number"].to_numpy()])).select(["number", column])


def encode(part: pa.Table, kept: Any, folder: str) -> pa.Table:
    part = some_of(part, kept, "text")
    texts = [text.decode("utf-8", "surrogatepass") for text in part["text"].to_pylist()]
    ids = tokenizer_of(folder).encode_batch(texts) if texts else []
    return part.append_column("ids", pa.array([np.asarray(some, dtype=np.int64) for some in ids], pa.list_(pa.int64())))


def value_of(reference: Any) -> Any:
    import ray

    return ray.get(reference)


# Here


def account(looked: Any, report: CleanReport) -> list[str | None]:
    """Why each document was dropped by itself."""
    reasons = list[str | None]()
    for batch in looked.select_columns(["reason", "changed"]).iter_batches(batch_format="pyarrow", batch_size=None):
        reasons += batch["reason"].to_pylist()
        for changes in batch["changed"].to_pylist():
            report.changed.update(changes.split())
    report.rows_in += len(reasons)
    report.dropped.update(reason for reason in reasons if reason is not None)
    return reasons


def drop_equal(looked: Any, kept: np.ndarray, report: CleanReport) -> None:
    seen, number = set[bytes](), 0
    for batch in looked.select_columns(["digest"]).iter_batches(batch_format="pyarrow", batch_size=None):
        for digest in batch["digest"].to_pylist():
            if kept[number] and digest in seen:
                kept[number] = False
                report.dropped["exact_duplicate"] += 1
            elif kept[number]:
                seen.add(digest)
            number += 1


def drop_alike(ray: Any, looked: Any, kept: np.ndarray, report: CleanReport, threshold: float) -> None:
    """As one process does that compares each document with those kept before which share a bucket with it."""
    whole = {"batch_format": "pyarrow", "batch_size": None}
    bands = looked.map_batches(banded, fn_args=(ray.put(kept),), **whole)
    parts = max(1, int(ray.cluster_resources().get("CPU", 1)))
    pairs = bands.repartition(parts, keys=["bucket"]).map_batches(met, **whole).to_pandas()
    if pairs.empty:
        return
    ones = np.ones(len(pairs), dtype=np.int8)
    linked = coo_array((ones, (pairs["low"], pairs["high"])), shape=(len(kept), len(kept)))
    _, groups = connected_components(linked, directed=False)
    wanted = np.zeros(len(kept), dtype=bool)
    wanted[pairs["low"]] = wanted[pairs["high"]] = True
    found = looked.map_batches(some_of, fn_args=(ray.put(wanted), "sketch"), **whole).to_pandas()
    before: dict[int, list[np.ndarray]] = {}
    for number, sketch in sorted(zip(found["number"], found["sketch"], strict=True)):
        mine, others = np.frombuffer(sketch, dtype="<u4"), before.setdefault(int(groups[number]), [])
        if others and alike(mine, np.stack(others), threshold):
            kept[number] = False
            report.dropped["near_duplicate"] += 1
        else:
            others.append(mine)


def alike(sketch: np.ndarray, others: np.ndarray, threshold: float) -> bool:
    """Whether it shares a band with one of the others (n, PERMUTATIONS) and is estimated to be so similar."""
    equal = sketch == others
    near = equal.reshape(len(others), BANDS, ROWS).all(2).any(1)
    return bool((near & (equal.mean(1) >= threshold)).any())
