"""Cleaning text for pre-training: normalise, filter, deduplicate; every row accounted for.

Rows stream through one at a time, in order, so that the result cannot depend on how they are batched.
Memory grows only with deduplication: some 100 bytes a kept row for `exact`, some 3 kB for `near`.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Self, overload

from pydantic import Field, field_validator, model_validator

from ronna.base.config import Config
from ronna.base.errors import RonnaError
from ronna.text import unicode
from ronna.text.vocabulary import IDEOGRAPHS

# A word, or one Chinese character: what n-grams are made of.
UNIT = re.compile(rf"[{IDEOGRAPHS}]|[^\W{IDEOGRAPHS}]+")
LANGUAGE_CHARS = 4_000
SHINGLE = 5
PERMUTATIONS, BANDS, SEED = 128, 32, 0

Key = Any


class CleanConfig(Config):
    """Which steps to take, in this order; each is counted in the report.

    unicode, control: change a row. NFC; control characters and lone surrogates are taken out.
    min_chars, max_chars: length after that.
    languages: ISO 639-1 codes to keep, as py3langid sees the first 4,000 characters.
    max_duplicate_lines: largest share of lines that repeat an earlier line (Gopher: 0.3).
    max_top_ngram: largest share of characters in the most frequent 2-, 3- or 4-gram of words or Chinese
        characters, if it repeats (Gopher, arXiv:2112.11446: 0.20, 0.18, 0.16).
    dedup: exact drops rows equal up to case and white space; near also those whose 5-gram shingles have
        a Jaccard similarity of at least near_threshold with a row kept before (MinHash, Broder 1997).
    """

    unicode: Literal["nfc", "none"] = "nfc"
    control: bool = True
    min_chars: int = Field(default=1, ge=0)
    max_chars: int | None = Field(default=None, ge=1)
    languages: tuple[str, ...] | None = None
    max_duplicate_lines: float | None = Field(default=None, ge=0, le=1)
    max_top_ngram: float | None = Field(default=None, ge=0, le=1)
    dedup: Literal["none", "exact", "near"] = "exact"
    near_threshold: float = Field(default=0.8, gt=0, le=1)

    @field_validator("languages")
    @classmethod
    def _codes(cls, languages: tuple[str, ...] | None) -> tuple[str, ...] | None:
        bad = [code for code in languages or () if not re.fullmatch("[a-z]{2,3}", code)]
        if bad or languages == ():
            raise ValueError(f"languages are codes such as en or zh, at least one; not {bad}")
        return languages

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(f"max_chars = {self.max_chars} is below min_chars = {self.min_chars}")
        return self


@dataclass
class CleanReport:
    """Rows in, kept, dropped by reason, changed by reason; rows_in == kept + sum(dropped) at any time."""

    rows_in: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)

    def summary(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "rows_in": self.rows_in,
            "kept": self.kept,
            "dropped": dict(self.dropped),
            "changed": dict(self.changed),
        }


@overload
def clean(records: Iterable[str], config: CleanConfig, report: CleanReport) -> Iterator[str]: ...
@overload
def clean(
    records: Iterable[tuple[Key, str]], config: CleanConfig, report: CleanReport
) -> Iterator[tuple[Key, str]]: ...
def clean(records: Iterable[Any], config: CleanConfig, report: CleanReport) -> Iterator[Any]:
    """The records that stay, cleaned, in order; texts, or (key, text) with the key left alone.

    `report` is counted up as rows pass. Reasons: changed by `nfc`, `control`; dropped as `too_short`,
    `too_long`, `language`, `duplicate_lines`, `repeated_ngrams`, `exact_duplicate`, `near_duplicate`.
    Of duplicates the first stays. Raises RonnaError when a step needs a package that is not installed.
    """
    unfit, repeated = Filters(config), _Duplicates(config)
    for record in records:
        text = record if isinstance(record, str) else record[1]
        cleaned, changes = normalise(text, config)
        reason = unfit(cleaned) or (repeated(cleaned) if config.dedup != "none" else None)
        # Counted together, before the row leaves: whoever stops early still has a report that adds up.
        report.rows_in += 1
        report.changed.update(changes)
        if reason is not None:
            report.dropped[reason] += 1
            continue
        report.kept += 1
        yield cleaned if isinstance(record, str) else (record[0], cleaned)


def normalise(text: str, config: CleanConfig) -> tuple[str, list[str]]:
    """The text in the form wanted, and the names of the steps that changed it."""
    changes = []
    if config.control and (without := unicode.strip_controls(text)) != text:
        text, changes = without, ["control"]
    if config.unicode == "nfc" and (composed := unicode.nfc(text)) != text:
        text, changes = composed, [*changes, "nfc"]
    return text, changes


def duplicate_line_share(text: str) -> float:
    """Share of the non-blank lines that repeat an earlier one."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def top_ngram_share(text: str) -> float:
    """Largest share of characters that one repeated 2-, 3- or 4-gram covers, without overlaps."""
    units = UNIT.findall(text)
    total = sum(map(len, units))
    share = 0.0
    for n in (2, 3, 4):
        counts: Counter[tuple[str, ...]] = Counter()
        free: dict[tuple[str, ...], int] = {}
        for i, gram in enumerate(zip(*(units[k:] for k in range(n)), strict=False)):
            if free.get(gram, 0) <= i:
                counts[gram] += 1
                free[gram] = i + n
        repeated = (count * sum(map(len, gram)) for gram, count in counts.items() if count > 1)
        share = max(share, max(repeated, default=0) / total if total else 0.0)
    return share


def shingles(text: str) -> list[str]:
    """5-grams of words (or of Chinese characters); one shorter one if there are fewer."""
    units = UNIT.findall(text.casefold()) or text.split()
    return [" ".join(units[i : i + SHINGLE]) for i in range(max(1, len(units) - SHINGLE + 1))]


class Filters:
    """The reason to drop a text by itself, or None."""

    def __init__(self, config: CleanConfig):
        self.config = config
        self.language = _language_identifier(config.languages) if config.languages else None

    def __call__(self, text: str) -> str | None:
        config = self.config
        if len(text) < config.min_chars or (config.min_chars and not text.strip()):
            return "too_short"
        if config.max_chars is not None and len(text) > config.max_chars:
            return "too_long"
        if self.language is not None and self.language(text) not in (config.languages or ()):
            return "language"
        if config.max_duplicate_lines is not None and duplicate_line_share(text) > config.max_duplicate_lines:
            return "duplicate_lines"
        if config.max_top_ngram is not None and top_ngram_share(text) > config.max_top_ngram:
            return "repeated_ngrams"
        return None


class _Duplicates:
    """The reason to drop a text that was there before, or None; remembers the texts it let pass."""

    def __init__(self, config: CleanConfig):
        self.seen: set[bytes] = set()
        self.repeats = _near_duplicates(config.near_threshold) if config.dedup == "near" else None

    def __call__(self, text: str) -> str | None:
        same = plain(text)
        digest = digest_of(same)
        if digest in self.seen:
            return "exact_duplicate"
        self.seen.add(digest)
        if self.repeats is not None and self.repeats(same):
            return "near_duplicate"
        return None


def plain(text: str) -> str:
    """What duplicates have in common."""
    return " ".join(unicode.nfc(text).casefold().split())


def digest_of(same: str) -> bytes:
    """16 bytes of a `plain` text."""
    return hashlib.blake2b(same.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def sketch_of(same: str) -> Any:
    """MinHash of a `plain` text: `digest()` gives its PERMUTATIONS numbers of 32 bits."""
    from rensa import RMinHash

    sketch = RMinHash(num_perm=PERMUTATIONS, seed=SEED)
    sketch.update(shingles(same))
    return sketch


def _language_identifier(languages: tuple[str, ...]) -> Callable[[str], str]:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise RonnaError("clean.languages needs py3langid", fix="pip install py3langid") from None
    # An identifier of our own: the package's is global, and others may have narrowed its languages.
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    known = {str(code) for code in identifier.nb_classes}
    unknown = sorted(set(languages) - known)
    if unknown:
        raise RonnaError(
            f"py3langid does not know the language {', '.join(unknown)}",
            where="clean.languages",
            fix=f"choose from {' '.join(sorted(known))}",
        )
    return lambda text: str(identifier.classify(text[:LANGUAGE_CHARS])[0])


def _near_duplicates(threshold: float) -> Callable[[str], bool]:
    """A function that says whether a text repeats one it was given before, and else remembers it."""
    try:
        from rensa import RMinHashDeduplicator
    except ImportError:
        raise RonnaError('clean.dedup = "near" needs rensa', fix="pip install rensa") from None
    index = RMinHashDeduplicator(threshold, PERMUTATIONS, use_lsh=True, num_bands=BANDS, seed=SEED)

    def repeats(text: str) -> bool:
        return not index.add(str(index.len()), sketch_of(text))

    return repeats
