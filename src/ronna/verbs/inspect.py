"""`ronna data inspect`: what files of records or text really hold, before anything is trained on them."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ronna.base.errors import RonnaError
from ronna.base.track import say
from ronna.data.badrows import BadRow, BadRows
from ronna.data.files import recognise
from ronna.data.sources import Record, find_splits, read_records, resolve
from ronna.runfile import InspectRun
from ronna.tasks.base import Row, Task, unfolded
from ronna.tasks.classify import detect_problem
from ronna.tasks.conversation import ANSWERED, ASKED, LISTS
from ronna.tasks.labels import label_name, names_of, number
from ronna.tasks.preference import PAIRS
from ronna.tasks.relation import MARKED, SPANS
from ronna.tasks.schema import Columns, overlap
from ronna.tasks.seq2seq import USUAL as WRITTEN
from ronna.tasks.span_qa import unfold
from ronna.tasks.table import TASKS
from ronna.tasks.words import PIECE
from ronna.text.tokenizer import Tokenizer, load_tokenizer

QUANTILES = (0.5, 0.9, 0.99, 1.0)
# Columns of texts that are made of others: source and target.
SOURCE_TARGET = [("source", "target"), ("src", "tgt"), ("input", "target"), ("input", "output")]
SOURCE_TARGET += [(text, made) for made in ("summary", "highlights", "translation") for text in WRITTEN.texts]
WRITES = ("seq2seq", "dialogue", "dpo")  # what is to be learnt is a text
CLASSES = {"label", "labels", "score", "class", "sentiment", "rating", "intent"}  # beside them a summary is a detail
# Codes and names of languages that columns are called after; `id` and `no` usually mean something else.
LANGUAGES = frozenset(
    "ar bg bn ca cs da de el en es et fa fi fr he hi hr hu it ja ko lt lv ms nl pl pt ro ru sk sl sr sv ta th tr uk ur "
    "vi zh arabic chinese czech dutch english french german hindi italian japanese korean polish portuguese russian "
    "spanish turkish vietnamese".split()
)
GRAM = 13  # words in a row, or characters of scripts without spaces, that two texts do not share by chance


def inspect(run: InspectRun) -> dict[str, Any]:
    """Format, fields, task, lengths, labels, duplicates and bad rows of each split, and what splits share."""
    tokenizer = load_tokenizer(run.tokenizer) if run.tokenizer else None
    splits: dict[str, list[Path]] = {}
    for name in run.input:
        found = find_splits(name) if Path(name).is_dir() else {}
        splits |= found or {str(path): [path] for path in resolve(name)}
    report: dict[str, Any] = {}
    seen: dict[str, list[str]] = {}
    for name, paths in splits.items():
        report[name], seen[name] = inspect_split(paths, run, tokenizer)
        say("\n".join(describe(name, report[name])))
    first = next(iter(splits))
    shared = overlap(seen)
    grams = {f"{first}/{name}": shared_grams(seen[first], texts) for name, texts in seen.items() if name != first}
    grams = {pair: n for pair, n in grams.items() if n}
    for pair, n in shared.items():
        say(f"{n:,} texts stand in both {pair.replace('/', ' and ', 1)}")
    for pair, n in grams.items():
        say(f"{n:,} texts of {pair.split('/', 1)[1]} share {GRAM} words (or characters) in a row with {first}")
    command = suggestion(run, report[first], any(pair.startswith(f"{first}/") for pair in shared))
    if command:
        say(f"try: {command}")
    return {**report, "overlap": shared, f"overlap_{GRAM}_grams": grams, "command": command}


def inspect_split(paths: list[Path], run: InspectRun, tokenizer: Tokenizer | None) -> tuple[dict[str, Any], list[str]]:
    bad = BadRows(limit=run.max_bad_rows)
    fields: Counter[str] = Counter()
    task: str | None = None
    columns: Columns | None = None
    named = False
    texts: list[str] = []
    rows: list[Row] = []
    labels: list[Any] = []
    for record in bad_aside(paths, bad):
        fields.update(f"{name}: {type(value).__name__}" for name, value in record.fields.items())
        if task is None:
            task, columns, named = recognised(record, run)
        if columns is None:
            continue
        try:
            row = TASKS[task].row(record, columns)
        except BadRow as reason:
            bad.quarantine(record.path, record.line, reason)
            continue
        rows.append(row)
        texts.append(row.key.replace("\0", "\n").strip())
        if columns.label:
            labels.append(row.label)
    report: dict[str, Any] = {
        "files": [str(p) for p in paths],
        "format": recognise(paths[0]),
        "rows": bad.summary(),
        "fields": dict(fields),
        "columns": columns._asdict() if columns else None,
        "columns_to_name": named,
        "characters": quantiles(map(len, texts)),
        "scripts": scripts(texts),
        "duplicates": len(texts) - len(set(texts)),
    }
    if tokenizer is not None:
        report["tokens"] = quantiles(len(ids) for ids in tokenizer.encode_batch(texts))
        if task in WRITES:
            report["target_tokens"] = quantiles(len(ids) for ids in tokenizer.encode_batch(labels))
    if labels and task is not None:
        report |= {"task": task, **label_counts(task, labels)}
    return report, texts


def bad_aside(paths: list[Path], bad: BadRows) -> Iterator[Record]:
    """Records, questions and translations each by itself."""
    questions = unfolded(TASKS["span_qa"], read_records(paths, bad=bad), bad)
    return unfolded(TASKS["seq2seq"], questions, bad)


def recognised(record: Record, run: InspectRun) -> tuple[str, Columns | None, bool]:
    """The task that a record looks like it was made for, its columns, and whether these must be named to be found."""
    task = recognise_task(record, run)
    text, label = (text_to_text(record, run) or (None, None)) if task == "seq2seq" else (run.text, run.label)
    columns = guess(TASKS[task], record, text, label)
    return task, columns, columns != guess(TASKS[task], record, None, None)


def text_to_text(record: Record, run: InspectRun) -> tuple[str, str] | None:
    """Columns of a source and of what is made of it; of two languages the first is the source, unless the user says
    otherwise. None where the user names another label than a text."""
    fields = record.fields
    texts = [name for name, value in fields.items() if isinstance(value, str)]
    languages = [name for name in texts if name.lower().replace("_", "-").partition("-")[0] in LANGUAGES]
    pairs = [(a, b) for a in languages for b in languages if a != b]
    if len(languages) > 2:  # which two is for the user to say
        pairs = [pair for pair in pairs if pair == (run.text, run.label)]
    if not fields.keys() & (CLASSES | {"instruction"}):
        pairs += [(a, b) for a, b in SOURCE_TARGET if a in texts and b in texts]
    named = [(a, b) for a, b in pairs if run.text in (None, a) and run.label in (None, b)]
    return named[0] if named else None


def recognise_task(record: Record, run: InspectRun) -> str:
    """The name of the task alone."""
    fields = record.fields
    if any(all(name in fields for name in pair) for pair in PAIRS):
        return "dpo"
    if talks(fields) and run.text in (None, *LISTS, *ASKED):
        return "dialogue"
    if "question" in fields and fields.keys() & {"answers", "answer"} and next(unfold(record), None) is not None:
        return "span_qa"
    if any(all(name in fields for name in pair) for pair in SPANS):
        return "relation"
    if any(isinstance(v, str) and len(MARKED.findall(v)) >= 4 for v in fields.values()):
        return "relation"
    lists = [name for name, value in fields.items() if isinstance(value, list) and name in ("tokens", "words")]
    spans = [name for name in ("entities", "spans") if isinstance(fields.get(name), list)]
    if lists or spans or isinstance(fields.get("label"), dict):
        return "tag"
    return "seq2seq" if text_to_text(record, run) else "classify"


def talks(fields: Mapping[str, Any]) -> bool:
    """Messages or turns, an instruction with what was made of it, a prompt with its completion, or a question whose
    answer stands in no context."""
    if any(isinstance(fields.get(name), list) and len(fields[name]) > 1 for name in LISTS):
        return True
    asked = [name for name in ("instruction", "prompt") if isinstance(fields.get(name), str)]
    asked += ["question"] if "question" in fields and not fields.keys() & {"context", "passage", "paragraph"} else []
    return bool(asked) and any(isinstance(fields.get(name), str) for name in ANSWERED)


def guess(task: type[Task], record: Record, text: str | None, label: str | None) -> Columns | None:
    try:
        return task.columns(record, text=text, pair=None, label=label, labelled=False)
    except RonnaError:
        if text or label:
            raise
        return None


def label_counts(task: str, labels: list[Any]) -> dict[str, Any]:
    """How often each label, entity type or relation stands in the data, and of which kind the labels are."""
    match task:
        case "tag":
            return {"problem": "entity", "labels": ordered(span.type for spans in labels for span in spans)}
        case "span_qa":
            return {"problem": "answer", "labels": ordered("answered" if some else "no answer" for some in labels)}
        case name if name in WRITES:
            lengths = quantiles(map(len, labels)) or {}
            return {"problem": "text", "labels": {f"characters {name}": n for name, n in lengths.items()}}
        case "relation":
            return {"problem": "relation", "labels": ordered(map(label_name, labels))}
    problem = detect_problem(labels)
    if problem == "regression":
        scores = [score for label in labels if (score := number(label)) is not None]
        spread = {"least": min(scores), "most": max(scores), "mean": float(np.mean(scores))}
        wrong = len(labels) - len(scores)
        return {"problem": problem, "labels": spread | ({"not a number": wrong} if wrong else {})}
    return {"problem": problem, "labels": ordered(name for label in labels for name in names_of(label))}


def ordered(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


def quantiles(lengths: Iterable[int]) -> dict[str, int] | None:
    values = np.fromiter(lengths, dtype=np.int64)
    if len(values) == 0:
        return None
    points = np.quantile(values, QUANTILES, method="higher")
    return {
        "total": int(values.sum()),
        **{f"p{q * 100:g}": int(x) for q, x in zip(QUANTILES, points, strict=True)},
    }


def scripts(texts: Sequence[str], most: int = 2000) -> dict[str, float]:
    """Share of each script among the letters of some of the texts, those of a hundredth and more."""
    letters: Counter[str] = Counter()
    for text in texts[:: max(1, len(texts) // most)]:
        letters.update(c for c in text[:1000] if c.isalpha())
    kinds: Counter[str] = Counter()
    for letter, n in letters.items():
        kinds[unicodedata.name(letter, "UNKNOWN").split(" ")[0].split("-")[0].title()] += n
    total = kinds.total()
    return {kind: round(n / total, 3) for kind, n in kinds.most_common() if n >= 0.01 * total}


def shared_grams(left: Sequence[str], right: Sequence[str]) -> int:
    """How many texts on the right have a run of words in common with some text on the left."""
    owners: dict[int, set[int]] = {}
    for i, text in enumerate(right):
        for gram in grams(text):
            owners.setdefault(gram, set()).add(i)
    found: set[int] = set()
    for text in left:
        for gram in grams(text):
            found |= owners.get(gram, set())
    return len(found)


def grams(text: str) -> Iterator[int]:
    words = PIECE.findall(text.lower())
    return (hash(tuple(words[i : i + GRAM])) for i in range(len(words) - GRAM + 1))


def suggestion(run: InspectRun, report: Mapping[str, Any], overlaps: bool) -> str | None:
    """The command line that would train on this."""
    columns, where = report["columns"], " ".join(run.input[:1])
    if columns is None or not report["characters"]:  # nothing to train on
        return None
    if not columns["label"]:
        return f"ronna prepare --input {where} --tokenizer TOKENIZER --text {columns['text']} --out shards"
    parts = ["ronna finetune"]
    if report["task"] != "classify":
        parts.append(f"--task {report['task']}")
    parts.append(f"--model {run.tokenizer or 'MODEL_FOLDER'} --train {where}")
    if report["columns_to_name"]:
        parts.append(f"--text {columns['text']} --label {columns['label']}")
    if report.get("tokens"):
        longest = max(report[of]["p99"] for of in ("tokens", "target_tokens") if report.get(of))
        parts.append(f"--length {min(512, -(-(longest + 4) // 32) * 32)}")
    return " ".join([*parts, *["--allow-overlap"] * overlaps, "--out my-run"])


def describe(name: str, r: dict[str, Any]) -> list[str]:
    rows = r["rows"]
    lines = [
        f"{name}: {r['format']}, {rows['rows_in']:,} rows"
        + (f", {r['duplicates']:,} repeated texts" * bool(r["duplicates"]))
    ]
    lines.append("  fields: " + ", ".join(r["fields"]))
    if rows["quarantined"]:
        lines += [f"  bad: {n['count']:,} x {why} ({', '.join(n['places'][:3])})" for why, n in rows["reasons"].items()]
    for unit in ("characters", "tokens"):
        if r.get(unit):
            q = r[unit]
            lines.append(
                f"  {unit}: {q['total']:,}; half below {q['p50']:,}, 99% below {q['p99']:,}, most {q['p100']:,}"
            )
    if r["scripts"]:
        lines.append("  letters: " + ", ".join(f"{kind} {share:.0%}" for kind, share in r["scripts"].items()))
    if r.get("labels"):
        shown = list(r["labels"].items())
        more = f", and {len(shown) - 12} more" if len(shown) > 12 else ""
        lines.append(
            f"  {r['problem']} labels: "
            + ", ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v:.3g}" for k, v in shown[:12])
            + more
        )
    return lines
