"""An n-gram model of text, the peer a small language model has to beat on the same training text.

    python benchmarks/ngram.py --train A.jsonl.gz B.txt --eval C.txt --order 9
    python benchmarks/ngram.py --train A.jsonl.gz B.txt --eval C.txt --order 5 --tokenizer FOLDER

Without --tokenizer the units are bytes, so every text has a probability and no word is unknown. With it they
are the tokens of FOLDER/tokenizer.json, which must give back the text it cut (a byte-level BPE does); the
language model under comparison should use the same. Without --train the text is the corpus that Python
itself carries. One JSON line says bits per byte: the whole negative log2 likelihood over the UTF-8 bytes.

Letters: V vocabulary (the last id is the boundary between documents), T units, N n-grams of one order.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ronna.base.errors import RonnaError
from ronna.data.sources import BadRows, read_records, require
from ronna.demo.corpus import build_corpus

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]

UNSEEN = -1


@dataclass(frozen=True)
class Order:
    """N-grams of one length: p(unit | context) = share + rest[context] * p(unit | context without its first).

    `keys` (N,) sorted, context * V + unit, where a context is the index of its own n-gram in the order below;
    `share` (N,); `rest` (number of contexts,).
    """

    keys: Ids
    share: Floats
    rest: Floats


@dataclass(frozen=True)
class NGram:
    """`orders[k]` holds the (k+1)-grams; below the unigrams every unit is equally likely."""

    vocabulary: int
    orders: tuple[Order, ...]

    def probabilities(self, units: Ids) -> Floats:
        """(T,) ids -> (T,) probability of each unit after the up to `order - 1` units before it."""
        result = np.full(len(units), 1 / self.vocabulary)
        context = np.zeros(len(units), np.int64)  # the empty context, the only one of the unigrams
        for order in self.orders:
            known = context != UNSEEN
            keys = context[known] * self.vocabulary + units[known]
            place = np.minimum(np.searchsorted(order.keys, keys), len(order.keys) - 1)
            seen = order.keys[place] == keys
            result[known] = np.where(seen, order.share[place], 0) + order.rest[context[known]] * result[known]
            gram = np.full(len(units), UNSEEN)
            gram[known] = np.where(seen, place, UNSEEN)
            context = np.concatenate(([UNSEEN], gram[:-1]))
        return result


def fit(units: Ids, vocabulary: int, order: int) -> NGram:
    """Count the n-grams of (T,) ids below `vocabulary` up to `order`, smoothed by modified Kneser-Ney.

    Interpolated, with three discounts an order: Chen & Goodman, "An empirical study of smoothing techniques
    for language modeling" (1999).
    """
    keys: list[Ids] = []
    counts: list[Ids] = []
    gram = np.zeros(len(units) + 1, np.int64)  # of the length before, at every place it ends
    for length in range(1, order + 1):
        context, suffix = gram[:-1], gram[1:]
        found, first, gram, count = np.unique(
            context * vocabulary + units[length - 1 :],
            return_index=True,
            return_inverse=True,
            return_counts=True,
        )
        if keys:
            # Below the highest order an n-gram counts once for each different unit to its left; the n-gram
            # that opens the text may have none.
            counts[-1] = np.maximum(np.bincount(suffix[first], minlength=len(keys[-1])), 1)
        keys.append(found)
        counts.append(count)
    contexts = [1] + [len(found) for found in keys[:-1]]
    smoothed = (_smooth(k, c, k // vocabulary, n) for k, c, n in zip(keys, counts, contexts, strict=True))
    return NGram(vocabulary, tuple(smoothed))


def _smooth(keys: Ids, counts: Ids, context: Ids, contexts: int) -> Order:
    discount = _discounts(counts)[np.minimum(counts, 3)]
    total = np.bincount(context, counts, contexts)
    held_back = np.bincount(context, discount, contexts)
    # The n-gram that closes the text is a context nothing followed: all is left to the shorter one.
    rest = np.divide(held_back, total, out=np.ones(contexts), where=total > 0)
    return Order(keys, (counts - discount) / total[context], rest)


def _discounts(counts: Ids) -> Floats:
    """(4,) what to take from counts of 0, 1, 2, and 3 or more (Chen & Goodman 1999).

    Too few counts to estimate from (bytes alone are all frequent) give the constants that KenLM uses then.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6)[1:5]
    if not n.all():
        return np.array([0, 0.5, 1, 1.5])
    size = np.arange(1, 4)
    found = size - (size + 1) * n[0] / (n[0] + 2 * n[1]) * n[1:] / n[:-1]
    return np.concatenate(([0], np.clip(found, 0, size)))


def documents(paths: list[Path]) -> Iterator[str]:
    """The texts of .txt files (each one document) and of the "text" field of .jsonl, compressed or not."""
    records = read_records(paths, bad=(bad := BadRows()), text_unit="file")
    return bad.sift(records, lambda record: require(record, {"text": str}, others=None)["text"])


def load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise RonnaError("no tokenizer.json here", where=str(folder), fix="name the folder of a tokenizer")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(texts: Iterable[str], tokenizer: Tokenizer | None, boundary: int) -> Ids:
    """(T,) ids of all texts, the boundary before each. Raises RonnaError if ids do not give a text back."""
    parts: list[Ids] = []
    for text in texts:
        if tokenizer is None:
            ids = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        else:
            found = tokenizer.encode(text, add_special_tokens=False).ids
            if tokenizer.decode(found, skip_special_tokens=False).removeprefix(" ") != text.removeprefix(" "):
                raise RonnaError(
                    "the tokenizer loses a part of the text, so its bits would not be those of the text",
                    fix="take a byte-level tokenizer without normaliser",
                )
            ids = np.array(found, np.int64)
        parts += [np.array([boundary]), ids]
    return np.concatenate(parts)


def score(train: list[Path], evaluation: list[Path], order: int, folder: Path | None) -> dict[str, object]:
    """Fit on `train`, score `evaluation`; the figures that the command prints."""
    started = time.perf_counter()
    tokenizer = load_tokenizer(folder) if folder else None
    boundary = max(tokenizer.get_vocab().values()) + 1 if tokenizer else 256
    units = encode(documents(train), tokenizer, boundary)
    if len(units) < order:
        raise RonnaError(f"only {len(units)} units to fit {order}-grams on", fix="give more text to --train")
    model = fit(units, boundary + 1, order)
    fitted = time.perf_counter()
    texts = list(documents(evaluation))
    held_out = encode(texts, tokenizer, boundary)
    bits = -np.log2(model.probabilities(held_out)[held_out != boundary])
    size = sum(len(text.encode()) for text in texts)
    return {
        "benchmark": "ngram",
        "units": str(folder) if folder else "bytes",
        "order": order,
        "vocabulary": boundary + 1,
        "train_units": len(units),
        "ngrams": sum(len(found.keys) for found in model.orders),
        "eval_bytes": size,
        "eval_units": len(bits),
        "bits_per_byte": round(bits.sum() / size, 4),
        "perplexity": round(2 ** bits.mean(), 4),
        "fit_seconds": round(fitted - started, 1),
        "eval_seconds": round(time.perf_counter() - fitted, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", type=Path, nargs="+", help="text or jsonl files; else the embedded corpus")
    parser.add_argument("--eval", type=Path, nargs="+", dest="evaluation")
    parser.add_argument("--order", type=int, help="length of the n-grams (5 tokens or 9 bytes)")
    parser.add_argument("--tokenizer", type=Path, help="a folder with tokenizer.json")
    args = parser.parse_args()
    if bool(args.train) != bool(args.evaluation):
        parser.error("--train and --eval go together")
    if args.order is not None and args.order < 1:
        parser.error("--order counts from 1")
    order = args.order or (5 if args.tokenizer else 9)
    try:
        with tempfile.TemporaryDirectory() as folder:
            train, evaluation = args.train, args.evaluation
            if not train:
                build_corpus(Path(folder))
                train, evaluation = ([Path(folder, "text", name)] for name in ("train.jsonl", "validation.jsonl"))
            print(json.dumps(score(train, evaluation, order, args.tokenizer)))
    except RonnaError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
