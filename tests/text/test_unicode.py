"""Normalisation: exactly NFC, in linear time, keeping what writing needs."""

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ronna.text import unicode

MARKS = st.text(st.sampled_from("\u0301\u0323\u0344\u0f71\u0f73\u0f81\u3099\u05b0"), min_size=1, max_size=100)
TEXT = st.lists(st.one_of(st.text(st.characters(exclude_categories=["Cs"])), MARKS), max_size=5).map("".join)


@given(TEXT)
@example("a" + "\u0301\u0323" * 50)
@example("\u0f73" * 50 + "\u0301")
def test_nfc_is_nfc(text):
    assert unicode.nfc(text) == unicodedata.normalize("NFC", text)


def test_marks_reach_python_in_order_however_many_there_are(monkeypatch):
    # In order, CPython's insertion sort takes one step a mark; out of order, n * n: minutes for these.
    python, given_to_nfc = unicodedata.normalize, []

    def spy(form, text):
        given_to_nfc.append(text)
        return python(form, text) if form == "NFD" else text

    monkeypatch.setattr(unicodedata, "normalize", spy)
    for marks in ("\u0301\u0323", "\u0f73", "\u0344\u0316"):
        unicode.nfc("a" + marks * 100_000)
        classes = [unicodedata.combining(c) for c in given_to_nfc[-1][1:]]
        assert len(classes) >= 100_000 and classes == sorted(classes)


def test_short_runs_are_left_to_python():
    text = "e\u0301\u0323" * 10
    assert unicode.sort_marks(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",  # zero-width joiners
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # zero-width non-joiner
        "\u200f\u0645\u200e a \u202b\u05d0\u202c \u2067\u05d0\u2069",  # directions
        "x\u0332\u0333 \u0915\u094d\u0937",  # marks that compose with nothing
        "\t a\n\r\n b\u00a0c\u3000d\ufeff\u2028",
    ],
)
def test_kept_as_it_is(text):
    assert unicode.nfc(unicode.strip_controls(text)) == text


def test_controls_go_and_line_breaks_stay():
    assert unicode.strip_controls("a\x00b\x1b[0m\x7f\x9f c\ud800d\udfff") == "ab[0m cd"
    assert unicode.strip_controls("one\x0ctwo\x0bthree\x85four") == "one\ntwo\nthree\nfour"
