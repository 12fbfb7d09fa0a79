"""From text files to a tokenizer, and to token shards."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ronna.base.config import config_hash, dump_toml
from ronna.base.hub import local_folder
from ronna.base.track import say
from ronna.data.badrows import BadRow, BadRows, Record
from ronna.data.files import hash_files
from ronna.data.shards import documents_done, write_shards
from ronna.data.sources import find_splits, read_records, resolve
from ronna.runfile import PrepareRun, TokenizerRun
from ronna.text.clean import CleanReport, clean
from ronna.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

BATCH_CHARACTERS = 4_000_000


def texts(paths: Iterable[Path], columns: Sequence[str], bad: BadRows) -> Iterator[str]:
    """The documents of the files, one by one; of several columns each is a paragraph of one."""

    def convert(record: Record) -> str:
        found = [record.fields.get(column) for column in columns]
        for column, text in zip(columns, found, strict=True):
            if not isinstance(text, str):
                known = ", ".join(record.fields)
                raise BadRow("no text", f"column {column!r} holds {type(text).__name__}; the columns are {known}")
        return "\n".join(found)  # type: ignore[arg-type]

    return bad.sift(read_records(list(paths), bad=bad), convert)


def input_splits(inputs: tuple[str, ...]) -> dict[str, list[Path]]:
    """Train and validation files; a test split is nobody's training text."""
    splits: dict[str, list[Path]] = {"train": [], "validation": []}
    for name in inputs:
        found = find_splits(name) if Path(name).is_dir() else {}
        if "train" not in found:
            found = {"train": resolve(name)}
        for split in splits:
            splits[split] += found.get(split, [])
    return splits


def train_tokenizer_run(run: TokenizerRun) -> dict[str, Any]:
    paths = input_splits(run.input)["train"]
    bad = BadRows(limit=run.max_bad_rows)
    tokenizer = train_tokenizer(texts(paths, run.text, bad), run.tokenizer)
    tokenizer.save(run.out)
    (Path(run.out) / "run.toml").write_text(dump_toml(run), encoding="utf-8")
    say(f"{run.tokenizer.kind} tokenizer of {tokenizer.vocab_size:,} tokens from {bad.kept:,} documents: {run.out}")
    return {"vocab": tokenizer.vocab_size, "hash": tokenizer.hash, "data": bad.summary()}


def prepare(run: PrepareRun) -> dict[str, Any]:
    """Write OUT/train and OUT/validation; called again after a kill, it goes on and leaves the same bytes."""
    tokenizer = load_tokenizer(local_folder(run.tokenizer))
    splits = input_splits(run.input)
    source = hashlib.sha256(
        "/".join([hash_files(splits["train"]), config_hash(run.clean), run.text, str(run.validation)]).encode()
    ).hexdigest()
    out, share = Path(run.out), 0.0 if splits["validation"] else run.validation
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    held: list[np.ndarray] = []
    bad, cleaned = BadRows(run.max_bad_rows, out / "quarantine.jsonl"), CleanReport()
    documents = cleaned_ids(texts(splits["train"], [run.text], bad), run, cleaned, tokenizer)
    kept = split_off(documents, share, held.append)
    report["train"] = write(out / "train", kept, tokenizer, source, run, bad, cleaned)
    for _ in kept:  # of a run that had finished these shards before a kill: what to hold out is still to be found
        pass
    if splits["validation"]:
        bad, cleaned = BadRows(run.max_bad_rows, out / "quarantine-validation.jsonl"), CleanReport()
        documents = cleaned_ids(texts(splits["validation"], [run.text], bad), run, cleaned, tokenizer)
        given = (ids for _, ids in documents)
        source = hash_files(splits["validation"]) + config_hash(run.clean)
        report["validation"] = write(out / "validation", given, tokenizer, source, run, bad, cleaned)
    elif held:
        report["validation"] = write(out / "validation", held, tokenizer, source + "-held-out", run, None, None)
    (out / "run.toml").write_text(dump_toml(run), encoding="utf-8")
    return report


def cleaned_ids(
    documents: Iterable[str], run: PrepareRun, report: CleanReport, tokenizer: Tokenizer
) -> Iterator[tuple[str, np.ndarray]]:
    """(text, ids) of each document that stays."""
    if run.engine == "local":
        return encode(clean(documents, run.clean, report), tokenizer)
    from ronna.verbs.spread import clean_and_encode

    return clean_and_encode(documents, run.clean, report, str(local_folder(run.tokenizer)))


def encode(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray]]:
    """(text, ids) of each document, tokenized in batches large enough for the engine's threads."""
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield from zip(batch, tokenizer.encode_batch(batch), strict=True)
            batch, size = [], 0
    if batch:
        yield from zip(batch, tokenizer.encode_batch(batch), strict=True)


def split_off(
    documents: Iterable[tuple[str, np.ndarray]], share: float, hold: Callable[[np.ndarray], None]
) -> Iterator[np.ndarray]:
    """Documents to train on; by a hash of its text, a share of all goes to `hold` instead."""
    bound = int(share * 2**32)
    for text, ids in documents:
        digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
        if int.from_bytes(digest, "big") < bound:
            hold(ids)
        else:
            yield ids


def write(
    out: Path,
    documents: Iterable[np.ndarray],
    tokenizer: Tokenizer,
    source: str,
    run: PrepareRun,
    bad: BadRows | None,
    cleaned: CleanReport | None,
) -> dict[str, Any]:
    done = documents_done(out)
    if done:
        say(f"{out}: {done:,} documents are written already, going on")
    manifest = write_shards(
        out,
        documents,
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.hash,
        source_hash=source,
        shard_tokens=run.shard_tokens,
    )
    tokenizer.save(out / "tokenizer")
    say(f"{out}: {manifest.documents:,} documents, {manifest.tokens:,} tokens")
    return {
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "engine": tokenizer.engine,
        "rows": bad.summary() if bad else None,
        "cleaning": cleaned.summary() if cleaned else None,
    }
