"""The table of bad input: every malformed file has a stated fate, and rows in = kept + quarantined.

R refuse with path:line:byte, Q quarantine and count, K keep exactly, S stated policy, counted.
"""

import json
import re
import time
import tracemalloc
from pathlib import Path

import pytest

from ronna.base.errors import RonnaError
from ronna.data.sources import BadRows, read_records, require

GOOD = b'{"text": "good", "label": 1}\n'
LABELLED = {"text": str, "label": int}


def read(path: Path, content: bytes, bad: BadRows, schema=None):
    path.write_bytes(content)
    records = read_records(path, bad=bad)
    return list(bad.sift(records, lambda r: require(r, schema)) if schema else (r.fields for r in records))


def balanced(bad: BadRows, kept: int) -> bool:
    """The account closes, and by a count that is not the account's own."""
    return bad.kept == kept and bad.rows_in == kept + sum(bad.reasons.values())


QUARANTINED_JSONL = {
    "malformed line": (b'{"text": \n', "malformed JSON", 2),
    "truncated last line": (b'{"text": "ab', "truncated last line", 2),
    "bad UTF-8": (b'{"text": "\xff\xfe", "label": 1}\n', "bad UTF-8", 2),
    "raw NUL": (b'{"text": "a\0b", "label": 1}\n', "raw NUL byte", 2),
    "lone surrogate": (b'{"text": "\\ud83d", "label": 1}\n', "lone surrogate", 2),
    "lone surrogate in a key": (b'{"\\uDE00": 1}\n', "lone surrogate", 2),
    "depth 5,000": (b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}\n", "nested too deep", 2),
    "depth 500": (b'{"text": ' + b"[" * 500 + b"]" * 500 + b"}\n", "nested too deep", 2),
    "duplicate key": (b'{"text": "a", "text": "b", "label": 1}\n', "duplicate key", 2),
    "missing field": (b'{"text": "a"}\n', "missing field 'label'", 2),
    "extra field": (b'{"text": "a", "label": 1, "x": 2}\n', "extra field", 2),
    "wrong type": (b'{"text": "a", "label": "1"}\n', "wrong type of field 'label'", 2),
    "bool for a number": (b'{"text": "a", "label": true}\n', "wrong type of field 'label'", 2),
    "null": (b'{"text": "a", "label": null}\n', "null field 'label'", 2),
    "NaN": (b'{"text": "a", "label": NaN}\n', "malformed JSON", 2),
    "not an object": (b"[1, 2]\n", "not an object", 2),
    "a number of 10,000 digits": (b'{"text": "a", "label": ' + b"1" * 10_000 + b"}\n", "malformed JSON", 2),
    "after a blank line": (b"\n \r\nx\n", "malformed JSON", 4),
}


@pytest.mark.parametrize("case", QUARANTINED_JSONL)
def test_jsonl_quarantined(case, tmp_path):
    row, reason, line = QUARANTINED_JSONL[case]
    path, bad = tmp_path / "rows.jsonl", BadRows(limit=1, quarantine_file=tmp_path / "bad.jsonl")
    after = b"" if case == "truncated last line" else GOOD
    kept = read(path, GOOD + row + after, bad, LABELLED)
    assert kept == [json.loads(GOOD)] * (1 + bool(after))
    assert bad.reasons == {reason: 1} and bad.places == {reason: [f"{path}:{line}"]} and balanced(bad, len(kept))
    aside = json.loads((tmp_path / "bad.jsonl").read_text())
    assert (aside["line"], aside["reason"]) == (line, reason) and aside["raw"]
    with pytest.raises(RonnaError, match=re.escape(f"{path}:{line}: {reason}")) as refused:
        read(path, GOOD + row + after, BadRows(), LABELLED)
    assert "--max-bad-rows" in str(refused.value)


KEPT_JSONL = {
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, "good"),
    "escaped NUL": (b'{"text": "a\\u0000b", "label": 1}\n', "a\0b"),
    "surrogate pair": (b'{"text": "\\ud83d\\ude00", "label": 1}\n', "\U0001f600"),
    "backslash before u": (b'{"text": "\\\\ud83d", "label": 1}\n', "\\ud83d"),
    "CRLF": (b'{"text": "good", "label": 1}\r\n', "good"),
    "no newline at the end": (b'{"text": "good", "label": 1}', "good"),
    "line separators in the text": ('{"text": "a\u2028b\x85c", "label": 1}\n'.encode(), "a\u2028b\x85c"),
    "zero width joiner": ('{"text": "👩\u200d🚀", "label": 1}\n'.encode(), "👩\u200d🚀"),
    "right to left": ('{"text": "\u202eשלם\u202c", "label": 1}\n'.encode(), "\u202eשלם\u202c"),
    "10k combining marks": (
        b'{"text": "a' + "\u0301".encode() * 10_000 + b'", "label": 1}\n',
        "a" + "\u0301" * 10_000,
    ),
}


@pytest.mark.parametrize("case", KEPT_JSONL)
def test_jsonl_kept_exactly(case, tmp_path):
    content, text = KEPT_JSONL[case]
    bad = BadRows()
    assert read(tmp_path / "rows.jsonl", content, bad, LABELLED) == [{"text": text, "label": 1}]
    assert balanced(bad, 1)


def test_jsonl_mixed_crlf(tmp_path):
    bad = BadRows()
    assert len(read(tmp_path / "rows.jsonl", GOOD + GOOD[:-1] + b"\r\n" + GOOD, bad)) == 3 and balanced(bad, 3)


def test_jsonl_line_of_50_mb_takes_at_most_four_times_its_size(tmp_path):
    size = 50_000_000
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "' + b"long " * (size // 5) + b'"}\n' + GOOD)
    tracemalloc.start()
    try:
        lengths = [len(record.fields["text"]) for record in read_records(path, bad=BadRows())]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert lengths == [size, 4] and peak <= 4 * size


REFUSED = {
    "empty file": ("rows.jsonl", b"", "holds no row", "1:0"),
    "blank lines only": ("rows.jsonl", b"\n  \n\r\n", "holds no row", "1:0"),
    "byte order mark only": ("rows.jsonl", b"\xef\xbb\xbf", "holds no row", "1:0"),
    "UTF-16": ("rows.jsonl", GOOD.decode().encode("utf-16"), "UTF-16", "1:0"),
    "UTF-16 without a mark": ("rows.jsonl", GOOD.decode().encode("utf-16-le"), "UTF-16", "1:0"),
    "UTF-32": ("rows.jsonl", GOOD.decode().encode("utf-32"), "UTF-32", "1:0"),
    "truncated gzip": ("rows.jsonl.gz", b"\x1f\x8b\x08\x00\x00", "cannot be read", "1:0"),
    "unclosed quote": ("rows.csv", b'text,label\na,1\nb,"2\nc,3\n', "unclosed quote", "3:15"),
    "unclosed quote met by a later one": ("rows.csv", b'text,label\n"a,1\n"b",2\n', "unclosed quote", "2:11"),
    "unclosed quote on the last line": ("rows.csv", b'text,label\na,"1', "unclosed quote", "2:11"),
    "wrong delimiter": (
        "rows.csv",
        b"text;label\na;1\n",
        "wrong delimiter: ',' gives 1 column, ';' gives 2",
        "1:0",
    ),
    "wrong delimiter in TSV": ("rows.tsv", b"text,label\na,1\n", "wrong delimiter", "1:0"),
    "two columns of one name": (
        "rows.csv",
        b"text,label,text\na,1,b\n",
        "two columns are named 'text'",
        "1:0",
    ),
    "empty CSV": ("rows.csv", b"", "holds no row", "1:0"),
    "CSV of a header alone": ("rows.csv", b"text,label\n", "holds no row", "1:0"),
    "array cut after a row": ("rows.json", b'[{"text": "a"}', "expected ',' or ']'", "1:14"),
    "array cut after a comma": ("rows.json", b'[{"text": "a"},', "not closed", "1:15"),
    "malformed array": ("rows.json", b'[{"text": "a"},\n {"text"}]', "malformed JSON", "2:17"),
    "duplicate key in an array": ("rows.json", b'[{"text": "a", "text": "b"}]', "duplicate key", "1:1"),
    "empty array": ("rows.json", b"[]", "holds no row", "1:0"),
    "not Parquet": ("rows.parquet", b"PAR1 is not enough", "Parquet", "1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_place_and_the_mend(case, tmp_path):
    name, content, message, place = REFUSED[case]
    with pytest.raises(RonnaError, match=re.escape(message)) as refused:
        read(tmp_path / name, content, BadRows(limit=100))
    assert refused.value.where == f"{tmp_path / name}:{place}" and refused.value.fix


QUARANTINED_CSV = {
    "extra column": (b"b,2,3\n", "extra column"),
    "short row": (b"b\n", "short row"),
    "blank label": (b"b,\n", "null field 'label'"),
    "float for an integer": (b"b,1.0\n", "wrong type of field 'label'"),
    "text after a closing quote": (b'"b"c,2\n', "malformed CSV"),
    "bad UTF-8": (b"\xff,2\n", "bad UTF-8"),
    "raw NUL": (b"a\0b,2\n", "raw NUL byte"),
}


@pytest.mark.parametrize("case", QUARANTINED_CSV)
def test_csv_quarantined(case, tmp_path):
    row, reason = QUARANTINED_CSV[case]
    path, bad = tmp_path / "rows.csv", BadRows(limit=1)
    kept = read(path, b"text,label\na,1\n" + row + b"c,3\n", bad, LABELLED)
    assert kept == [{"text": "a", "label": 1}, {"text": "c", "label": 3}]
    assert [type(row["label"]) for row in kept] == [int, int]
    assert bad.places == {reason: [f"{path}:3"]} and balanced(bad, 2)


KEPT_CSV = {
    "quoted newline": (b'"a\nb\r\nc",1\n', {"text": "a\nb\r\nc", "label": "1"}),
    "doubled quote": (b'"say ""a""",1\n', {"text": 'say "a"', "label": "1"}),
    "NA": (b"NA,nan\n", {"text": "NA", "label": "nan"}),
    "leading zeros": (b"007,01\r\n", {"text": "007", "label": "01"}),
    "spaces": (b" a ,1\n", {"text": " a ", "label": "1"}),
    "a cell of a million characters": (b"x" * 10**6 + b",1\n", {"text": "x" * 10**6, "label": "1"}),
}


@pytest.mark.parametrize("case", KEPT_CSV)
def test_csv_kept_exactly(case, tmp_path):
    row, fields = KEPT_CSV[case]
    bad = BadRows()
    assert read(tmp_path / "rows.csv", b"\xef\xbb\xbftext,label\n" + row, bad) == [fields] and balanced(bad, 1)


def test_csv_lines_are_counted_through_quoted_newlines(tmp_path):
    bad = BadRows(limit=1)
    path = tmp_path / "rows.csv"
    read(path, b'text,label\n"a\nb\nc",1\nshort\n', bad)
    assert bad.places == {"short row": [f"{path}:5"]}


POLICIES = {
    "NFC and NFD twins": (
        "caf\u00e9 cafe\u0301",
        {"not NFC, kept as written": 1, "not NFKC, kept as written": 1},
    ),
    "NFKC 1 to 18": ("\ufdfa", {"not NFKC, kept as written": 1}),
    "plain": ("café 中文", {}),
}


@pytest.mark.parametrize("case", POLICIES)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.txt"])
def test_normal_forms_are_counted_and_nothing_changes(case, name, tmp_path):
    text, policies = POLICIES[case]
    row = json.dumps({"text": text}) if name.endswith("jsonl") else text
    content = f"text\n{row}\n" if name.endswith("csv") else f"{row}\n"
    bad = BadRows()
    assert read(tmp_path / name, content.encode(), bad) == [{"text": text}]
    assert bad.policies == policies and balanced(bad, 1)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.txt", "rows.csv"])
def test_a_word_of_a_million_characters_takes_linear_time(name, tmp_path):
    def seconds(characters: int) -> float:
        word = "字" * characters
        content = json.dumps({"text": word}, ensure_ascii=False) if name.endswith("jsonl") else f"text\n{word}"
        took = []
        for _ in range(3):
            began = time.perf_counter()
            assert read(tmp_path / name, content.encode(), BadRows())[-1] == {"text": word}
            took.append(time.perf_counter() - began)
        return min(took)

    small = seconds(10**6)
    assert seconds(4 * 10**6) <= 8 * small + 0.05


@pytest.mark.parametrize(
    ("row", "reason"),
    [(b"a\0b\n", "raw NUL byte"), (b"\xc3(\n", "bad UTF-8"), (b"\xed\xa0\x80\n", "bad UTF-8")],
)
def test_text_quarantined(row, reason, tmp_path):
    bad = BadRows(limit=1)
    assert read(tmp_path / "a.txt", b"one\n" + row + b"three\n", bad) == [{"text": "one"}, {"text": "three"}]
    assert bad.places == {reason: [f"{tmp_path / 'a.txt'}:2"]} and balanced(bad, 2)
