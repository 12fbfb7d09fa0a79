"""Text of a stream: whole characters, no stop string, the same as decoding at the end, at linear cost."""

import random

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from ronna.decoding.stream import Detokenizer, TextStream

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTE_OF = {char: i for i, char in enumerate(ALPHABET)}


def byte_level(extra=()):
    """A tokenizer of single bytes, and tokens of several in `extra`."""
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    words = [*ALPHABET, *extra]
    backend = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    return backend, lambda text: [BYTE_OF[c] for piece, _ in spell(text) for c in piece]


def metaspace():
    vocab = [(word, 0.0) for word in ("<unk>", "▁", "▁a", "▁boat", "s", "你")]
    vocab += [(f"<0x{i:02X}>", 0.0) for i in range(256)]
    backend = tokenizers.Tokenizer(models.Unigram(vocab, 0, byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.add_special_tokens(["<s>"])
    return backend


BYTES, spell = byte_level()
META = metaspace()


def pieces(decode, tokens):
    stream = Detokenizer(decode)
    return [*(stream.push(token) for token in tokens), stream.close()]


@given(st.text())
def test_bytes_of_text_come_out_as_the_text(text):
    out = pieces(BYTES.decode, spell(text))
    assert "".join(out) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in out)


@given(st.lists(st.integers(0, 255), max_size=80))
def test_broken_bytes_come_out_as_when_decoded_at_once(tokens):
    out = pieces(BYTES.decode, tokens)
    assert "".join(out) == BYTES.decode(tokens)


def test_a_flood_of_broken_bytes_is_no_more_work():
    broken = [i for i in range(256) if BYTES.decode([i]) == "\ufffd"]
    flood, work = random.Random(0).choices(broken, k=1000), []

    def decode(ids):
        work.append(len(ids))
        return BYTES.decode(ids)

    assert "".join(pieces(decode, flood)) == BYTES.decode(flood)
    assert max(work) <= 16 and len(work) <= 12 * len(flood)


def test_the_cost_is_linear():
    work = []

    def decode(ids):
        work.append(len(ids))
        return BYTES.decode(ids)

    text = "So 你好, café 👩‍👩‍👧! " * 200
    assert "".join(pieces(decode, spell(text))) == text
    assert max(work) <= 16 and len(work) <= 2 * len(spell(text)) + 1


def test_tokens_that_end_within_characters():
    """Every token ends in the middle of a character, and still whole characters come as they are finished."""
    text = "日本語中文字" * 4
    raw = spell("a" + text)
    words = ["".join(ALPHABET[i] for i in raw[k : k + 3]) for k in range(0, len(raw), 3)]
    backend, _ = byte_level(sorted({word for word in words if len(word) > 1}))
    tokens = [backend.token_to_id(word) for word in words]
    out = pieces(backend.decode, tokens)
    assert "".join(out) == "a" + text
    assert all(len(piece) <= 2 and "\ufffd" not in piece for piece in out)


@given(st.lists(st.sampled_from(["<s>", "▁", "▁a", "▁boat", "s", "你"])))
def test_spaces_between_words_survive(words):
    tokens = [META.token_to_id(word) for word in words]
    assert "".join(pieces(META.decode, tokens)) == META.decode(tokens)


def test_characters_spelled_in_bytes():
    words = ["▁a", "<0xE4>", "<0xBD>", "<0xA0>", "<0xE4>", "<0xBD>", "<0xA0>", "▁boat", "<0xE4>"]
    out = pieces(META.decode, [META.token_to_id(word) for word in words])
    assert out == ["a", "", "", "你", "", "", "你", " boat", "", "\ufffd"]
    for broken in range(12):
        tokens = [META.token_to_id(word) for word in ["<0xA0>"] * broken + words]
        assert "".join(pieces(META.decode, tokens)) == META.decode(tokens)


def stream_of(text, stop, cuts):
    stream = TextStream(lambda ids: "".join(cuts[i] for i in ids), stop)
    shown = []
    for i in range(len(cuts)):
        shown.append(stream.push(i))
        if stream.stopped:
            break
    else:
        shown.append(stream.close())
    return stream, shown


@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_text_ends_before_the_first_stop_string(text, stop, data):
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=len(text), max_size=len(text)))
    cuts, at = [], 0
    for size in sizes:
        cuts.append(text[at : at + size])
        at += size
    stream, shown = stream_of(text, tuple(stop), cuts)
    ends = [place for s in stop if (place := text.find(s)) >= 0]
    assert stream.stopped == bool(ends)
    # Tokens are looked at one by one, so a longer stop string that begins earlier may still be incomplete.
    reached = len("".join(cuts[: len(shown) - (not stream.stopped)]))
    first = min((p for s in stop if (p := text[:reached].find(s)) >= 0), default=len(text))
    assert stream.text == "".join(shown) == text[:first]


@pytest.mark.parametrize(("held", "shown"), [("x", "x"), ("a", ""), ("xab", "x"), ("xabx", "xabx"), ("aab", "a")])
def test_only_what_may_become_a_stop_string_is_held(held, shown):
    stream = TextStream(lambda ids: held if ids else "", ("abc",))
    assert stream.push(0) == shown
    assert stream.close() == held[len(shown) :]


def test_the_first_stop_string_counts():
    stream = TextStream(lambda ids: "xbxa" if ids else "", ("a", "b"))
    assert stream.push(0) == "x" == stream.text
    assert stream.stopped and stream.push(0) == stream.close() == ""
