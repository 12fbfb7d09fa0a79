"""What a summary is worth that is nothing but the beginning of the text: the first one, two, three sentences or turns.

    python benchmarks/lead.py --data FOLDER_OF_SPLITS [--text text] [--label summary] [--split test]

Prints one JSON line for each length, with the scores of `ronna evaluate` on the same file.
"""

import argparse
import json
import re
from pathlib import Path

from ronna.data.badrows import BadRows
from ronna.data.sources import find_splits, read_records
from ronna.tasks.ngrams import cut_of, text_scores
from ronna.tasks.schema import Columns
from ronna.tasks.seq2seq import Pair, Seq2Seq

SENTENCE = re.compile(r"[^\n]+?(?:[.!?]+[\"')\]]*(?=\s)|[。！？；]+|(?=\n)|$)")


def lead(text: str, sentences: int) -> str:
    found = [match.group().strip() for match in SENTENCE.finditer(text)]
    between = "" if cut_of([text]) == "zh" else " "
    return between.join([s for s in found if s][:sentences])


def rows(data: str, split: str, text: str | None, label: str | None) -> list[Pair]:
    bad = BadRows(limit=1000)
    records = list(read_records(find_splits(data)[split], bad=bad))
    columns: Columns = Seq2Seq.columns(records[0], text=text, pair=None, label=label)
    return [Seq2Seq.row(record, columns) for record in records]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--text")
    parser.add_argument("--label")
    parser.add_argument("--split", default="test")
    a = parser.parse_args()
    if not (a.data and Path(a.data).is_dir()):
        print("skipped: name a folder of splits with --data")
        return
    pairs = rows(a.data, a.split, a.text, a.label)
    references = [pair.references for pair in pairs]
    cut = cut_of([pair.label or "" for pair in pairs])
    for n in (1, 2, 3):
        scores = text_scores([lead(pair.text, n) for pair in pairs], references, cut)
        values = {name: round(metric.value or 0.0, 4) for name, metric in scores.metrics.items()}
        print(json.dumps({"sentences": n, "rows": len(pairs), **values}))


if __name__ == "__main__":
    main()
