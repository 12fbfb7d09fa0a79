"""`ronna data inspect`: what a file of records or text really holds, before anything is trained on it."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ronna.base.errors import RonnaError
from ronna.base.track import say
from ronna.data.badrows import BadRows
from ronna.data.files import recognise
from ronna.data.sources import find_splits, read_records, resolve
from ronna.runfile import InspectRun
from ronna.tasks.classify import detect_problem, label_name
from ronna.tasks.schema import Columns, find_columns, overlap
from ronna.text.tokenizer import Tokenizer, load_tokenizer

QUANTILES = (0.5, 0.9, 0.99, 1.0)


def inspect(run: InspectRun) -> dict[str, Any]:
    """Format, fields, lengths, labels, duplicates and bad rows of each split, and texts that splits share."""
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
    report["overlap"] = overlap(seen)
    for pair, n in report["overlap"].items():
        say(f"{n:,} texts stand in both {pair.replace('/', ' and ', 1)}")
    return report


def inspect_split(paths: list[Path], run: InspectRun, tokenizer: Tokenizer | None) -> tuple[dict[str, Any], list[str]]:
    bad = BadRows(limit=run.max_bad_rows)
    fields: Counter[str] = Counter()
    columns: Columns | None = None
    texts: list[str] = []
    labels: list[Any] = []
    for record in read_records(paths, bad=bad):
        fields.update(f"{name}: {type(value).__name__}" for name, value in record.fields.items())
        if columns is None:
            columns = guess(record, run)
        if columns is not None:
            value = record.fields.get(columns.text)
            texts.append(value if isinstance(value, str) else "")
            if columns.label and record.fields.get(columns.label) is not None:
                labels.append(record.fields[columns.label])
    report: dict[str, Any] = {
        "files": [str(p) for p in paths],
        "format": recognise(paths[0]),
        "rows": bad.summary(),
        "fields": dict(fields),
        "columns": columns._asdict() if columns else None,
        "characters": quantiles(map(len, texts)),
        "duplicates": len(texts) - len(set(texts)),
    }
    if tokenizer is not None:
        report["tokens"] = quantiles(len(ids) for ids in tokenizer.encode_batch(texts))
    if labels:
        report["problem"] = detect_problem(labels)
        report["labels"] = label_counts(labels, report["problem"])
    return report, texts


def guess(record: Any, run: InspectRun) -> Columns | None:
    try:
        return find_columns(record, text=run.text, pair=None, label=run.label, need_label=False)
    except RonnaError:
        if run.text or run.label:
            raise
        return None


def label_counts(labels: list[Any], problem: str) -> dict[str, Any]:
    if problem == "regression":
        return {"least": min(labels), "most": max(labels), "mean": float(np.mean(labels))}
    flat = [label_name(x) for label in labels for x in (label if isinstance(label, list) else [label])]
    return dict(Counter(flat).most_common())


def quantiles(lengths: Iterable[int]) -> dict[str, int] | None:
    values = np.fromiter(lengths, dtype=np.int64)
    if len(values) == 0:
        return None
    points = np.quantile(values, QUANTILES, method="higher")
    return {
        "total": int(values.sum()),
        **{f"p{q * 100:g}": int(x) for q, x in zip(QUANTILES, points, strict=True)},
    }


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
    if r.get("labels"):
        shown = list(r["labels"].items())
        more = f", and {len(shown) - 12} more" if len(shown) > 12 else ""
        lines.append(
            f"  {r['problem']} labels: "
            + ", ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v:.3g}" for k, v in shown[:12])
            + more
        )
    return lines
