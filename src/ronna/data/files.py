"""Finding data files, telling their format, and reading their lines whatever the compression."""

import difflib
import glob
import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, get_args

from ronna.base.errors import RonnaError

Format = Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "conll"]

SUFFIXES: dict[str, Format] = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    **dict.fromkeys((".conll", ".bio", ".bioes", ".bmes", ".bilou", ".iob", ".iob2", ".ner"), "conll"),
}
# A line of a CoNLL file, columns from the word to its tag, and a tag that no running text ends its lines with.
TAGGED = re.compile(rb"\S+[ \t](.*[ \t])?(O|[BIMESLU][-_]\S+)[ \t\r]*")
ENTITY = re.compile(rb"[ \t][BIMESLU][-_]\S+[ \t\r]*$", re.MULTILINE)
COMPRESSED = (".gz", ".zst")
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
ONE_BILLION_WORD = re.compile(r"news\.\w+(\.\w+)*-\d+-of-\d+")
SHARD_NUMBER = re.compile(r"-\d+(-of-\d+)?$")

# One row may be this long; beyond it lies a bomb or a wrong format rather than a document.
MAX_ROW_BYTES = 256 * 2**20
HEAD_BYTES = 2**16
BOM = b"\xef\xbb\xbf"


def hash_files(paths: Sequence[Path]) -> str:
    """sha256 of the files' own, in order."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


class Line(NamedTuple):
    """A line with its newline. `number` counts from 1, `start` is its first byte (decompressed)."""

    number: int
    start: int
    data: bytes


def resolve(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """Files named by files, folders and globs: in the order given, folders and globs sorted, each file once.

    A folder gives its files of known format, at any depth. Raises RonnaError when a name leads to
    nothing, and for a folder that holds several splits: together they would train on the test set.
    """
    named = [paths] if isinstance(paths, str | Path) else list(paths)
    found: dict[Path, None] = {}
    for name in named:
        path = Path(name).expanduser()
        if path.is_dir():
            found.update(dict.fromkeys(_folder(path)))
        elif path.is_file():
            found[path] = None
        elif path.exists():
            raise RonnaError("not a regular file", where=str(path), fix="name a file, a folder or a glob")
        elif matches := [Path(m) for m in sorted(glob.glob(str(path), recursive=True)) if Path(m).is_file()]:
            found.update(dict.fromkeys(matches))
        else:
            raise RonnaError("no such file or folder", where=str(path), fix=_nearest(path))
    if not found:
        raise RonnaError("no data file was named", fix="name files, folders or globs")
    return list(found)


def find_splits(folder: str | Path) -> dict[str, list[Path]]:
    """{"train": files, "validation": files, "test": files}, as far as they are there.

    A split is a file `train.jsonl`, numbered files `train-00000-of-00002.parquet`, or a folder `train/`;
    `valid`, `val` and `dev` also name validation. Empty when the folder holds none of them. Raises RonnaError
    when there is no such folder.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise RonnaError("no such folder", where=str(folder), fix=_nearest(folder))
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if split := _split_of(path):
            splits.setdefault(split, []).extend(_known_files(path) if path.is_dir() else [path])
    return {split: splits[split] for split in ("train", "validation", "test") if splits.get(split)}


def _split_of(path: Path) -> str | None:
    if path.is_dir():
        return SPLITS.get(path.name.lower())
    if _format_by_name(path) is None:
        return None
    return SPLITS.get(SHARD_NUMBER.sub("", path.name.split(".")[0].lower()))


def _folder(folder: Path) -> list[Path]:
    splits = {_split_of(path) for path in folder.iterdir()} - {None}
    if len(splits) > 1:
        raise RonnaError(
            f"the folder holds the splits {', '.join(sorted(str(s) for s in splits))}",
            where=str(folder),
            fix=f"name one of them, for example {folder / 'train.*'}",
        )
    files = _known_files(folder)
    if not files:
        raise RonnaError(
            "the folder holds no file of a known format",
            where=str(folder),
            fix=f"known: {', '.join(SUFFIXES)}",
        )
    return files


def _known_files(folder: Path) -> list[Path]:
    visible = (p for p in folder.rglob("*") if not any(x.startswith(".") for x in p.relative_to(folder).parts))
    return sorted(path for path in visible if path.is_file() and _format_by_name(path))


def _nearest(path: Path) -> str:
    there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, n=1)
    return f"did you mean {path.parent / near[0]}?" if near else "check the name"


def _format_by_name(path: Path) -> Format | None:
    suffixes = path.suffixes[:-1] if path.suffix in COMPRESSED else path.suffixes
    known = SUFFIXES.get(suffixes[-1].lower()) if suffixes else None
    return known or ("text" if ONE_BILLION_WORD.fullmatch(path.name) else None)


def recognise(path: Path, fmt: str = "auto") -> Format:
    """The format of a file: as told, else by its name, else by its first bytes, else plain text."""
    if fmt != "auto":
        for known in get_args(Format):
            if fmt == known:
                return known
        names = ", ".join(get_args(Format))
        raise RonnaError(f"no format {fmt!r}", where=str(path), fix=f"one of auto, {names}")
    head = peek(path)
    start = head.removeprefix(BOM).lstrip()[:1]
    by_name = _format_by_name(path)
    if by_name == "json" or by_name is None:
        if head.startswith(b"PAR1"):
            return "parquet"
        if start == b"[":
            return "json"
        if start == b"{":
            # Rows of JSON Lines close on their own line; a pretty-printed object does not.
            first, _, rest = head.lstrip().partition(b"\n")
            return "jsonl" if by_name is None or (first.rstrip().endswith(b"}") and rest.strip()) else "json"
    if by_name in ("text", None) and _is_tagged(head):
        return "conll"
    return by_name or "text"


def _is_tagged(head: bytes) -> bool:
    """Whether every line has columns that end in a tag, and some tag is more than O."""
    lines = head.removeprefix(BOM).split(b"\n")
    lines = lines[:-1] if len(head) == HEAD_BYTES else lines  # the last one may be cut
    return bool(ENTITY.search(head)) and all(
        TAGGED.fullmatch(line) or line.startswith(b"#") for line in lines if line.strip()
    )


def open_bytes(path: Path) -> BinaryIO:
    """A binary reader of the decompressed file. The magic number decides, for names can be wrong."""
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic.startswith(b"\x1f\x8b"):
        return io.BufferedReader(gzip.GzipFile(path, "rb"))
    if magic == b"\x28\xb5\x2f\xfd":
        import zstandard

        # Tools that compress in parallel write many frames; the default reader stops after the first.
        source = open(path, "rb")  # noqa: SIM115 - closed with the reader
        frames = zstandard.ZstdDecompressor().stream_reader(source, read_across_frames=True, closefd=True)
        return io.BufferedReader(frames)
    return open(path, "rb")


def peek(path: Path) -> bytes:
    """The first bytes of the decompressed file."""
    try:
        with open_bytes(path) as file:
            return file.read(HEAD_BYTES)
    except read_errors() as error:
        raise damaged(path, 1, 0, error) from error


def read_lines(path: Path) -> Iterator[Line]:
    r"""Lines of a UTF-8 file as bytes, ended by \n alone; a byte order mark is taken off.

    Only \n ends a line: U+2028, form feeds and the like are content. Memory: one line.
    Raises RonnaError for UTF-16 and UTF-32, damaged compression, and a line over `MAX_ROW_BYTES`.
    """
    refuse_utf16(path)
    number, start = 1, 0
    try:
        with open_bytes(path) as file:
            while data := file.readline(MAX_ROW_BYTES + 1):
                size = len(data)
                if size > MAX_ROW_BYTES:
                    refuse_length(path, number, start)
                if content := data.removeprefix(BOM) if number == 1 else data:
                    yield Line(number, start, content)
                number, start = number + 1, start + size
    except read_errors() as error:
        raise damaged(path, number, start, error) from error


def refuse_length(path: Path, number: int, start: int) -> None:
    """Raises the RonnaError for a row longer than a row may be."""
    raise RonnaError(
        f"a row longer than {MAX_ROW_BYTES >> 20} MiB",
        where=f"{path}:{number}:{start}",
        fix="split it into rows, or convert the file to JSON Lines",
    )


def refuse_utf16(path: Path) -> None:
    """Raises RonnaError for UTF-16 or UTF-32, told by its mark or by zeros in every other byte."""
    head = peek(path)
    marked = head.startswith((b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff"))
    zeros = max(head[offset::2].count(0) for offset in (0, 1))
    if marked or (len(head) >= 4 and zeros > 0.4 * (len(head) // 2)):
        raise RonnaError(
            "the file is UTF-16 or UTF-32",
            where=f"{path}:1:0",
            fix=f"convert it: iconv -f UTF-16 -t UTF-8 {path.name} > utf8-{path.name}",
        )


def damaged(path: Path, number: int, start: int, error: Exception) -> RonnaError:
    """The RonnaError for a file that the disk or the decompressor gives up on."""
    return RonnaError(
        f"cannot be read: {error}",
        where=f"{path}:{number}:{start}",
        fix="check the file, and fetch or compress it again",
    )


def read_errors() -> tuple[type[Exception], ...]:
    """What reading a file can raise. A function, so that zstandard is imported when something is wrong."""
    import zstandard

    return (OSError, EOFError, zlib.error, zstandard.ZstdError)
