import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ronna.base.errors import RonnaError
from ronna.data.sources import BadRows, Record, find_splits, read_records, require, resolve


def rows(path, **options):
    bad = BadRows()
    found = [record.fields for record in read_records(path, bad=bad, **options)]
    assert bad.rows_in == bad.kept == len(found)
    return found


def test_the_same_rows_in_every_format(tmp_path):
    table = [{"text": "a, b", "label": "x"}, {"text": "中文", "label": "y"}]
    lines = "".join(json.dumps(row) + "\n" for row in table).encode()
    zstd = zstandard.ZstdCompressor()
    contents = {
        "a.jsonl": lines,
        "b.jsonl.gz": gzip.compress(lines),
        "c.jsonl.zst": zstd.compress(lines[:10]) + zstd.compress(lines[10:]),
        "compressed under a plain name.jsonl": gzip.compress(lines),
        "d.json": json.dumps(table, indent=2).encode(),
        "rows though named.json": lines,
        "no_suffix": lines,
        "e.csv": 'text,label\n"a, b",x\n中文,y\n'.encode(),
        "f.tsv": "text\tlabel\na, b\tx\n中文\ty\n".encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "g.parquet")
    for name in [*contents, "g.parquet"]:
        assert rows(tmp_path / name) == table, name


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("auto", ["one\ntwo", "three"]),
        ("paragraph", ["one\ntwo", "three"]),
        ("line", ["one", "two", "three"]),
        ("file", ["one\r\ntwo\n \nthree\n"]),
    ],
)
def test_text_units(unit, expected, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n \nthree\n")
    assert [row["text"] for row in rows(tmp_path / "a.txt", text_unit=unit)] == expected


def test_one_billion_word_is_a_sentence_a_line(tmp_path):
    path = tmp_path / "news.en-00001-of-00100"
    path.write_text("A sentence .\nAnother one .\n")
    assert rows(tmp_path) == [{"text": "A sentence ."}, {"text": "Another one ."}]


def test_pile_rows_keep_their_meta(tmp_path):
    row = {"text": "code", "meta": {"pile_set_name": "Github"}}
    (tmp_path / "00.jsonl.zst").write_bytes(zstandard.compress(json.dumps(row).encode() + b"\n"))
    assert rows(tmp_path) == [row]


def test_table_options(tmp_path):
    (tmp_path / "a.csv").write_text("I loved it.,1\nNo.,0\n")
    assert rows(tmp_path / "a.csv")[0] == {"0": "I loved it.", "1": "1"}
    assert rows(tmp_path / "a.csv", columns={"text": "0", "label": "1"})[1] == {"text": "No.", "label": "0"}
    assert rows(tmp_path / "a.csv", header=True) == [{"I loved it.": "No.", "1": "0"}]
    (tmp_path / "b.csv").write_text("text;label\na;1\n")
    assert rows(tmp_path / "b.csv", delimiter=";") == [{"text": "a", "label": "1"}]
    (tmp_path / "c.tsv").write_text('text\tlabel\n"unpaired\t1\n')
    assert rows(tmp_path / "c.tsv", quoted=False) == [{"text": '"unpaired', "label": "1"}]
    (tmp_path / "d.txt").write_text("text,label\na,1\n")
    assert rows(tmp_path / "d.txt", fmt="csv") == [{"text": "a", "label": "1"}]
    with pytest.raises(RonnaError, match="no format 'xml'"):
        rows(tmp_path / "d.txt", fmt="xml")


def test_a_wrong_column_name_gets_the_nearest(tmp_path):
    (tmp_path / "a.csv").write_text("sentence,label\na,1\n")
    with pytest.raises(RonnaError, match="missing field 'sentense': did you mean 'sentence'"):
        rows(tmp_path / "a.csv", columns={"text": "sentense"})


def test_rows_of_an_array_are_quarantined_one_by_one(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"text": "a"},\n7,\n{"text": "\\ud800"},\n{"text": "d"}]')
    bad = BadRows(limit=2)
    lines = [record.line for record in read_records(tmp_path / "a.json", bad=bad)]
    assert lines == [1, 4] and bad.reasons == {"not an object": 1, "lone surrogate": 1}


def test_the_limit_counts_rows_of_all_reasons(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\nx\n[]\n{"text": 1}\n{"text": "b"}\n')

    def run(limit):
        bad = BadRows(limit=limit)
        return bad, bad.sift(read_records(tmp_path / "a.jsonl", bad=bad), lambda r: require(r, {"text": str}))

    bad, kept = run(3)
    assert len(list(kept)) == 2 == bad.kept and bad.summary()["quarantined"] == 3 and bad.rows_in == 5
    bad, kept = run(2)
    with pytest.raises(RonnaError, match=r"a.jsonl:4: wrong type.*3 bad rows of 4"):
        list(kept)


def record(fields, typed=True):
    return Record(fields, Path("a"), 1, typed)


def test_require():
    assert require(record({"score": 1}), {"score": float}) == {"score": 1.0}
    assert require(record({"a": None}), {"a": str | None}) == {"a": None}
    assert require(record({"a": "x", "b": 1}), {"a": str}, others={"b"}) == {"a": "x"}
    assert require(record({"a": "x", "b": 1}), {"a": str}, others=None) == {"a": "x"}
    cells = record({"label": "-3", "score": "1e-3", "id": "007"}, typed=False)
    assert require(cells, {"label": int, "score": float, "id": str}) == {
        "label": -3,
        "score": 1e-3,
        "id": "007",
    }
    for cell in ("1_000", " 1", "٣", "nan", "inf", "0x1"):
        with pytest.raises(Exception, match="wrong type"):
            require(record({"n": cell}, typed=False), {"n": int | float})
    for number in (float("nan"), float("inf")):
        with pytest.raises(Exception, match="not finite"):
            require(record({"n": number}), {"n": float})


def test_resolve(tmp_path):
    for name in ("b.jsonl", "a.txt", "sub/c.csv.gz", "README.md", ".hidden/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x\n")
    names = ["a.txt", "b.jsonl", "sub/c.csv.gz"]
    assert resolve(tmp_path) == [tmp_path / name for name in names]
    assert resolve([tmp_path / "b.jsonl", str(tmp_path / "*.*")])[:2] == [
        tmp_path / "b.jsonl",
        tmp_path / "README.md",
    ]
    assert resolve(tmp_path / "**/*.gz") == [tmp_path / "sub/c.csv.gz"]
    with pytest.raises(RonnaError, match=r"did you mean .*b.jsonl"):
        resolve(tmp_path / "bb.jsonl")
    with pytest.raises(RonnaError, match="not a regular file"):
        resolve("/dev/null")


def test_a_folder_of_splits_is_never_read_as_one(tmp_path):
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "dev.jsonl", "test_raw.txt"):
        (tmp_path / name).touch()
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "x.txt").touch()
    splits = find_splits(tmp_path)
    assert {split: [path.name for path in paths] for split, paths in splits.items()} == {
        "train": ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        "validation": ["dev.jsonl"],
        "test": ["x.txt"],
    }
    with pytest.raises(RonnaError, match="holds the splits test, train, validation"):
        resolve(tmp_path)
    assert find_splits(tmp_path / "test") == {}
    with pytest.raises(RonnaError, match="no such folder"):
        find_splits(tmp_path / "nowhere")


@settings(max_examples=150, deadline=None)
@given(
    content=st.binary(max_size=200),
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a"]),
)
def test_no_bytes_break_a_reader(content, name, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    bad = BadRows(limit=1000)
    try:
        kept = sum(1 for _ in read_records(path, bad=bad))
    except RonnaError:
        return
    assert kept == bad.kept and bad.rows_in == kept + bad.quarantined


CELLS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1)


@settings(max_examples=60, deadline=None)
@given(table=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5))
def test_what_is_written_is_what_is_read(table, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    written = [{"a": a, "b": b} for a, b in table]
    quoted = [[cell.replace('"', '""') for cell in row] for row in table]
    csv_text = "a,b\n" + "".join(f'"{a}","{b}"\n' for a, b in quoted)
    (folder / "r.csv").write_bytes(csv_text.encode())
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written)
    (folder / "r.jsonl").write_bytes(lines.encode())
    assert rows(folder / "r.csv") == written
    assert rows(folder / "r.jsonl") == written


@pytest.mark.parametrize(
    ("name", "split", "count"),
    [("ag_news", "test", 7600), ("lm_wiki_en", "train", 420), ("conll2003", "validation", 3250)],
)
def test_real_sets_read_without_a_bad_row(name, split, count, real_data):
    found = rows(find_splits(real_data / name)[split])
    assert len(found) == count and all(row.keys() == found[0].keys() for row in found)
