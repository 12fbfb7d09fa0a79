"""A corpus that every Python installation carries: the standard library, read as text and never executed.

`text/` is for language modelling, `areas/` for classification: to which area of the library does this
docstring belong? The labels follow the chapters of https://docs.python.org/3/library/, merged to twelve.
Docstrings of `areas/` also stand, without their labels, in `text/`: pre-training has seen the words of the
classification test, never its answers.
"""

import ast
import hashlib
import json
import platform
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ronna.base.errors import RonnaError

# `encodings` is left out: its docstrings are one generated sentence, and its sources are tables.
AREAS = {
    "text": """
        _strptime codecs difflib pprint re reprlib rlcompleter sre_compile sre_constants sre_parse string
        stringprep textwrap
    """,
    "data types": """
        _collections_abc _pydatetime _weakrefset bisect calendar collections copy datetime enum graphlib
        heapq types weakref zoneinfo
    """,
    "numbers": "_pydecimal _pylong decimal fractions functools numbers operator random statistics",
    "files": """
        filecmp fileinput fnmatch genericpath glob linecache ntpath nturl2path pathlib posixpath shutil
        stat tempfile
    """,
    "storage": """
        _compat_pickle _compression bz2 compression configparser copyreg crypt csv dbm gzip hashlib hmac
        lzma netrc pickle plistlib secrets shelve sqlite3 tarfile tomllib uu xdrlib zipfile
    """,
    "operating system": """
        _aix_support _bootsubprocess _osx_support _pyio ctypes io logging os pipes platform pty tty
    """,
    "concurrency": """
        _threading_local asynchat asyncio asyncore concurrent contextvars multiprocessing queue sched
        selectors signal socket ssl subprocess threading
    """,
    "internet": """
        base64 cgi cgitb email ftplib http imaplib ipaddress json mailbox mailcap mimetypes nntplib poplib
        quopri smtpd smtplib socketserver telnetlib urllib uuid webbrowser wsgiref xmlrpc
    """,
    "markup": "_markupbase html xml",
    "interfaces": """
        _pyrepl argparse cmd curses getopt getpass gettext idlelib locale optparse shlex tkinter turtle
        turtledemo
    """,
    "development": """
        bdb cProfile distutils doctest ensurepip lib2to3 pdb profile pstats pydoc timeit trace tracemalloc
        typing unittest venv zipapp
    """,
    "runtime": """
        _ast_unparse _colorize _opcode_metadata _py_abc _py_warnings _sitebuiltins abc annotationlib ast
        atexit code codeop compileall contextlib dataclasses dis imp importlib inspect keyword
        modulefinder opcode pickletools pkgutil py_compile pyclbr runpy site symtable sysconfig tabnanny
        token tokenize traceback warnings zipimport
    """,
}
AREA_OF = {module: area for area, modules in AREAS.items() for module in modules.split()}

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
LICENCE = re.compile(
    r"copyright|licen[sc]e|all rights reserved|permission to use|redistribut|warrant(y|ies)"
    r"|contributed to psf",
    re.IGNORECASE,
)
WORD = re.compile(r"[^\W\d_]+")
MIN_DOCSTRING = 40  # characters; shorter ones ("Return self.") say nothing about an area
MIN_AREA = 50  # examples; an area whose modules are not installed (no tkinter, say) is left out
NEAR_WORDS = 8  # docstrings that begin with the same words are kept in one split
VALIDATION_SHARE = 0.08


@dataclass(frozen=True)
class CorpusSummary:
    """What was written. `documents` and `text_bytes` by split; `areas[split][label]` counts docstrings."""

    python: str
    documents: dict[str, int]
    text_bytes: dict[str, int]
    areas: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Module:
    """One source file: `docstrings` as cleaned by `ast`, `prose` also with comments, `code` as it stands."""

    name: str
    docstrings: tuple[str, ...]
    prose: str
    code: str

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Document:
    text: str
    source: str

    @property
    def size(self) -> int:
        return len(self.text.encode())


def build_corpus(out: Path, *, max_megabytes: float = 8.0, seed: int = 0) -> CorpusSummary:
    """Write `text/{train,validation}.jsonl` and `areas/{train,validation,test}.jsonl` under `out`.

    `text` rows are {"text", "source"}, where source is "topic/NAME" (the language reference), "prose/MODULE"
    (docstrings and comments) or "code/MODULE" (the file without licence notices, so with its prose again);
    prose comes before code within `max_megabytes` (10^6 bytes of UTF-8, both splits together). A top-level
    module stands in one split. `areas` rows are {"text", "label"}. The same Python, size and seed write the
    same files. Raises RonnaError if the library's sources are missing or `out` cannot be written.
    """
    if not max_megabytes > 0:
        raise RonnaError(f"a corpus of {max_megabytes} MB", fix="ask for more than 0 megabytes")
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = list(_modules(root))
    if not modules:
        raise RonnaError(
            "no source of the standard library here", where=str(root), fix="use a Python with its .py files"
        )
    texts = _split_text(modules, _topics(root), max_megabytes * 1e6, seed)
    areas = _split_areas(modules, seed)
    try:
        for split, documents in texts.items():
            rows = ({"text": document.text, "source": document.source} for document in documents)
            _write(out / "text" / f"{split}.jsonl", rows)
        for split, examples in areas.items():
            _write(out / "areas" / f"{split}.jsonl", ({"text": t, "label": label} for t, label in examples))
    except OSError as error:
        raise RonnaError(
            f"cannot write the corpus: {error.strerror}",
            where=str(out),
            fix="name a folder that can be written",
        ) from error
    return CorpusSummary(
        python=platform.python_version(),
        documents={split: len(documents) for split, documents in texts.items()},
        text_bytes={split: sum(document.size for document in documents) for split, documents in texts.items()},
        areas={split: dict(Counter(label for _, label in rows)) for split, rows in areas.items()},
    )


def _modules(root: Path) -> Iterator[Module]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        built = "-" in relative.parts[0] or relative.name.startswith("_sysconfigdata")
        if built or SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        try:
            with tokenize.open(path) as file:  # honours the encoding a source declares
                source = file.read()
            tree = ast.parse(source)
        except (SyntaxError, UnicodeError):  # templates of lib2to3 and tools for other Python versions
            continue
        name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        nodes = list(ast.walk(tree))
        docstrings = _docstrings(nodes)
        comments = _comments(source, nodes)
        yield Module(
            name=name,
            docstrings=tuple(text for _, text in docstrings),
            prose=_prose(source, docstrings, comments),
            code=_without_licence(source, comments),
        )


def _docstrings(nodes: list[ast.AST]) -> list[tuple[int, str]]:
    """(line, cleaned text) of the docstrings of a module, its classes and its functions."""
    found = []
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                found.append((node.body[0].lineno, text))
    return found


def _comments(source: str, nodes: list[ast.AST]) -> list[range]:
    """The line numbers (from 0) of each run of whole-line comments."""
    inside_string: set[int] = set()
    for node in nodes:
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            inside_string.update(range(node.lineno, node.end_lineno or node.lineno))
    blocks: list[range] = []
    for number, line in enumerate(source.split("\n")):
        if not line.lstrip().startswith("#") or number in inside_string:
            continue
        if blocks and blocks[-1].stop == number:
            blocks[-1] = range(blocks[-1].start, number + 1)
        else:
            blocks.append(range(number, number + 1))
    return blocks


def _prose(source: str, docstrings: list[tuple[int, str]], comments: list[range]) -> str:
    """Docstrings and comments in the order of the file, paragraph by paragraph."""
    lines = source.split("\n")
    found = list(docstrings)
    for block in comments:
        found.append((block.start + 1, "\n".join(lines[number].strip().lstrip("#").strip() for number in block)))
    paragraphs = (paragraph for _, text in sorted(found) for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(p.strip("\n") for p in paragraphs if _is_prose(p) and not LICENCE.search(p))


def _is_prose(text: str) -> bool:
    """Not a ruler, a table, or code that was commented out."""
    words = WORD.findall(text)
    return len(words) >= 4 and sum(map(len, words)) >= 0.6 * sum(not c.isspace() for c in text)


def _without_licence(source: str, comments: list[range]) -> str:
    lines = source.split("\n")
    dropped: set[int] = set()
    for block in comments:
        if LICENCE.search("\n".join(lines[block.start : block.stop])):
            dropped.update(block)
    return "\n".join(line for number, line in enumerate(lines) if number not in dropped).strip("\n") + "\n"


def _topics(root: Path) -> list[Document]:
    """Chapters of the language reference as `help()` shows them; those that others contain are left out."""
    try:
        tree = ast.parse((root / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError):  # some distributions package it apart
        return []
    values = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    topics: dict[str, str] = ast.literal_eval(values[-1])
    kept: dict[str, str] = {}
    for name, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        body = " ".join(text.split()[12:])  # the title is ruled differently in a chapter and in its section
        if not any(body in other for other in kept.values()):
            kept[name] = " ".join(text.split())
    return [Document(topics[name].strip("\n") + "\n", f"topic/{name}") for name in sorted(kept)]


def _split_text(modules: list[Module], topics: list[Document], room: float, seed: int) -> dict[str, list[Document]]:
    """Documents by split. Topics speak of each other at length, so all of them are for training."""
    groups: dict[str, list[Document]] = {}
    for module in modules:
        both = (Document(module.prose, f"prose/{module.name}"), Document(module.code, f"code/{module.name}"))
        groups.setdefault(module.top, []).extend(row for row in both if len(row.text) >= MIN_DOCSTRING)
    left = VALIDATION_SHARE * min(room, sum(row.size for rows in groups.values() for row in rows))
    validation: list[Document] = []
    for top in sorted(groups, key=lambda name: _hash(seed, name)):
        size = sum(row.size for row in groups[top])
        if size <= left:
            validation += groups.pop(top)
            left -= size
    room -= sum(row.size for row in validation)
    train = _fit(topics + [row for rows in groups.values() for row in rows], room, seed)
    return {"train": train, "validation": validation}


def _fit(documents: list[Document], room: float, seed: int) -> list[Document]:
    """Distinct documents within `room` bytes: prose first, then code, each in the order of a seeded hash."""
    kept = []
    seen: set[str] = set()
    for row in sorted(documents, key=lambda row: (row.source.startswith("code/"), _hash(seed, row.source))):
        if row.size <= room and row.text not in seen:
            kept.append(row)
            seen.add(row.text)
            room -= row.size
    return kept


def _split_areas(modules: list[Module], seed: int) -> dict[str, list[tuple[str, str]]]:
    """Distinct (docstring, area) pairs by split, 80:10:10, near-duplicates in one split."""
    found: dict[str, tuple[str, str]] = {}
    ambiguous = set()
    for module in modules:
        if module.top not in AREA_OF:
            continue
        area = AREA_OF[module.top]
        for text in module.docstrings:
            words = _words(text)
            if len(text) < MIN_DOCSTRING or LICENCE.search(text) or not words:
                continue
            if found.setdefault(words, (text, area))[1] != area:
                ambiguous.add(words)
    sizes = Counter(area for words, (_, area) in found.items() if words not in ambiguous)
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "validation": [], "test": []}
    for words, (text, area) in found.items():
        if words not in ambiguous and sizes[area] >= MIN_AREA:
            share = _hash(seed, " ".join(words.split()[:NEAR_WORDS])) / 2**64
            splits["test" if share < 0.1 else "validation" if share < 0.2 else "train"].append((text, area))
    return {split: sorted(rows, key=lambda row: _hash(seed, row[0])) for split, rows in splits.items()}


def _words(text: str) -> str:
    """What makes two docstrings the same: words without case, digits, punctuation or layout."""
    return " ".join(WORD.findall(text.casefold()))


def _hash(seed: int, text: str) -> int:
    """64 bits; unlike `hash`, the same in every process."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{text}".encode(), digest_size=8).digest(), "big")


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
