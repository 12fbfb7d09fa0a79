"""Cleaning: every row accounted for, duplicates found in English and Chinese, the same result every time."""

import json
import random
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ronna.base.errors import RonnaError
from ronna.text.clean import (
    CleanConfig,
    CleanReport,
    clean,
    duplicate_line_share,
    shingles,
    top_ngram_share,
)

OFF = CleanConfig(unicode="none", control=False, min_chars=0, dedup="none")
WORDS = ("harbour", "sailor", "teacher", "morning", "window", "letter", "garden", "bridge", "stone", "river")
CHARACTERS = "今天我们在海边看到了很多小船和几只白色的鸟它们飞得又高又远老师说明天还会再来学生都高兴地笑起来"

rows = st.lists(st.one_of(st.text(max_size=30), st.sampled_from(["twice", " TWICE ", "e\u0301", "é", "", "\x00"])))
configs = st.builds(
    CleanConfig,
    unicode=st.sampled_from(["nfc", "none"]),
    control=st.booleans(),
    min_chars=st.integers(0, 5),
    max_chars=st.one_of(st.none(), st.integers(5, 20)),
    max_duplicate_lines=st.sampled_from([None, 0.3]),
    max_top_ngram=st.sampled_from([None, 0.2]),
    dedup=st.sampled_from(["none", "exact", "near"]),
)


def run(texts, **fields):
    report = CleanReport()
    return list(clean(texts, CleanConfig(**{**dict(OFF), **fields}), report)), report


def sentence(rng: random.Random, count: int) -> list[str]:
    return [rng.choice(WORDS) + str(rng.randrange(50)) for _ in range(count)]


@given(texts=rows, config=configs)
def test_every_row_is_kept_or_dropped_for_a_reason(texts, config):
    report = CleanReport()
    kept = list(clean(texts, config, report))
    assert report.rows_in == len(texts) and report.kept == len(kept)
    assert report.rows_in == report.kept + sum(report.dropped.values())
    assert all(count > 0 for count in (*report.dropped.values(), *report.changed.values()))
    if config.unicode == "nfc":
        assert all(unicodedata.is_normalized("NFC", text) for text in kept)
    # What is clean stays as it is.
    again = CleanReport()
    assert list(clean(kept, config, again)) == kept and not again.dropped and not again.changed


@given(texts=rows, config=configs, stop=st.integers(0, 10))
def test_the_report_adds_up_for_those_who_stop_early(texts, config, stop):
    report = CleanReport()
    for n, _ in enumerate(clean(texts, config, report)):
        assert report.rows_in == report.kept + sum(report.dropped.values())
        if n == stop:
            break


@given(texts=rows)
def test_keys_are_left_alone(texts):
    keyed = list(clean(enumerate(texts), CleanConfig(), CleanReport()))
    assert [text for _, text in keyed] == list(clean(texts, CleanConfig(), CleanReport()))
    assert [key for key, _ in keyed] == sorted({key for key, _ in keyed})


def test_nothing_on_changes_nothing():
    texts = ["", "e\u0301", "a\x00\ud800", "a\x00\ud800"]
    kept, report = run(texts)
    assert kept == texts and not report.dropped and not report.changed


def test_changes_are_counted():
    kept, report = run(["e\u0301", "plain", "a\x00e\u0301", "\ud800ok"], unicode="nfc", control=True)
    assert kept == ["é", "plain", "aé", "ok"] and report.changed == {"nfc": 2, "control": 2}


def test_lengths_count_after_the_changes():
    kept, report = run(["", "  ", "ab\x00", "abc", "abcd"], control=True, min_chars=3, max_chars=3)
    assert kept == ["abc"] and report.dropped == {"too_short": 3, "too_long": 1}


def test_languages():
    english = "The weather is fine today and the boats are leaving the harbour."
    chinese = "今天天气很好，船都离开了港口。"
    german = "Das Wetter ist heute schön und die Boote verlassen den Hafen."
    kept, report = run([english, chinese, german], languages=("en", "zh"))
    assert kept == [english, chinese] and report.dropped == {"language": 1}
    with pytest.raises(RonnaError, match="does not know the language xx"):
        run([english], languages=("xx",))


def test_repeated_lines():
    assert duplicate_line_share("a\nb\n\nc\nd") == 0
    assert duplicate_line_share("a\n a \nb\na") == 0.5
    assert duplicate_line_share("") == 0
    kept, report = run(["buy now\n" * 5, "one\ntwo"], max_duplicate_lines=0.3)
    assert kept == ["one\ntwo"] and report.dropped == {"duplicate_lines": 1}


def test_repeated_ngrams():
    assert top_ngram_share("one two three four five") == 0
    assert top_ngram_share("") == 0
    assert top_ngram_share("ab cd ab cd xx yy zz ww") == 0.5
    assert top_ngram_share("ha " * 7) == pytest.approx(6 / 7)  # three times "ha ha", one left
    assert top_ngram_share("哈" * 8) == 1
    assert top_ngram_share("好评好评好评" + CHARACTERS) == pytest.approx(6 / (6 + len(CHARACTERS)))
    kept, report = run(["很好很好很好很好", CHARACTERS], max_top_ngram=0.2)
    assert kept == [CHARACTERS] and report.dropped == {"repeated_ngrams": 1}


def test_exact_duplicates_up_to_case_space_and_composition():
    kept, report = run(["Same text", "same  TEXT\n", "e\u0301", "\xe9", "other"], dedup="exact")
    assert kept == ["Same text", "e\u0301", "other"] and report.dropped == {"exact_duplicate": 2}


@pytest.mark.parametrize("chinese", [False, True])
def test_near_duplicates_keep_the_first(chinese):
    rng = random.Random(0)
    originals = [sentence(rng, 200) for _ in range(60)]
    if chinese:
        originals = [[rng.choice(CHARACTERS) for _ in range(200)] for _ in range(60)]
    glue = "" if chinese else " "
    texts = [glue.join(words) for words in originals]
    # One word in 200 changes 5 shingles of 196: a similarity of 0.95. Thirty changes leave about 0.3.
    near = [glue.join(["新" if chinese else "new", *words[1:]]) for words in originals]
    far = [glue.join("另" if i % 7 == 0 else w for i, w in enumerate(words)) for words in originals]
    kept, report = run([*texts, *near, *far], dedup="near")
    assert kept == [*texts, *far]
    assert report.dropped == {"near_duplicate": 60}


def test_near_includes_exact_and_short_texts_are_whole():
    kept, report = run(["one two", "One  two", "one three", "好", "坏", "!!!", "???"], dedup="near")
    assert kept == ["one two", "one three", "好", "坏", "!!!", "???"]
    assert report.dropped == {"exact_duplicate": 1}


def test_threshold_decides():
    rng = random.Random(1)
    words = sentence(rng, 100)
    other = [*words[:90], *sentence(rng, 10)]  # 86 shingles of 106 shared: 0.81
    pair = [" ".join(words), " ".join(other)]
    assert len(run(pair, dedup="near", near_threshold=0.5)[0]) == 1
    assert len(run(pair, dedup="near", near_threshold=0.99)[0]) == 2


def test_same_result_as_a_stream_and_in_pieces():
    rng = random.Random(2)
    texts = [" ".join(sentence(rng, 20)) for _ in range(50)] * 2
    config = CleanConfig(dedup="near")

    def in_pieces():
        for start in range(0, len(texts), 7):
            yield from texts[start : start + 7]

    assert list(clean(in_pieces(), config, CleanReport())) == list(clean(texts, config, CleanReport()))


def test_a_word_of_a_million_characters_is_one_unit():
    for word in ("a" * 1_000_000, "é" * 1_000_000, "a" + "\u0301\u0323" * 500_000):
        config = CleanConfig(dedup="near", max_top_ngram=0.9, max_duplicate_lines=0.9, languages=None)
        kept = list(clean([word], config, CleanReport()))
        assert len(kept) == 1 and len(shingles(kept[0])) <= 2


def test_work_grows_with_length_and_no_faster():
    for unit in ("词", "word "):
        assert len(shingles(unit * 4000)) < 4.1 * len(shingles(unit * 1000))


@pytest.mark.parametrize(
    "fields",
    [
        {"languages": ()},
        {"languages": ("English",)},
        {"min_chars": 5, "max_chars": 4},
        {"max_top_ngram": 2.0},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(fields):
    with pytest.raises(ValidationError):
        CleanConfig(**fields)


def test_missing_packages_are_named(monkeypatch):
    import sys

    for package, fields in (("rensa", {"dedup": "near"}), ("py3langid.langid", {"languages": ("en",)})):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(RonnaError, match=f"pip install {package.split('.')[0]}"):
            run(["text"], **fields)


def test_real_news_has_the_duplicates_put_into_it(real_data):
    import gzip
    import json

    with gzip.open(real_data / "lm_modern_zh" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(next(file))["text"] for _ in range(300)]
    alone, _ = run(texts, dedup="near")
    edited = [text.replace("。", "！", 1) for text in alone if len(shingles(text)) > 200]
    kept, report = run([*alone, *edited], dedup="near")
    assert kept == alone and len(edited) > 50 and sum(report.dropped.values()) == len(edited)


def test_a_report_is_ready_for_json():
    report = CleanReport()
    list(clean(["one text", "one text", "", "a\x07b"], CleanConfig(), report))
    said = {"rows_in": 4, "kept": 2, "dropped": {"exact_duplicate": 1, "too_short": 1}, "changed": {"control": 1}}
    assert json.loads(json.dumps(report.summary())) == said
