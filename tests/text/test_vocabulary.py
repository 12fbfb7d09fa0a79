"""Tables that the spelling of tokens decides."""

import pytest

from ronna.text.vocabulary import continues_word, ends_sentence


def byte_level(text: bytes) -> str:
    from tokenizers.pre_tokenizers import ByteLevel

    whole = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text.decode("latin-1"))
    # Latin-1 text goes through UTF-8: undo that, so that any single byte can be spelled.
    table = dict(zip(text.decode("latin-1").encode(), "".join(t for t, _ in whole), strict=True))
    return "".join(table[b] if b < 0x80 else latin_byte(b) for b in text)


def latin_byte(byte: int) -> str:
    hidden = [b for b in range(256) if b not in {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}]
    return chr(0x100 + hidden.index(byte)) if byte in hidden else chr(byte)


WORDPIECE = {"saw": False, "##ing": True, "##中": False, "中": False, "##": False, ",": False, "##é": True}
METASPACE = {
    "▁saw": False,
    "ing": True,
    "▁": False,
    "中": False,
    "中国": False,
    "，": False,
    "<0xE4>": False,
}
METASPACE |= {"<0xB8>": True, "<0xC3>": True, "é": True, "-": True}


@pytest.mark.parametrize(("spelling", "tokens"), [("wordpiece", WORDPIECE), ("metaspace", METASPACE)])
def test_continues_word(spelling, tokens):
    assert dict(zip(tokens, continues_word(list(tokens), spelling).tolist(), strict=True)) == tokens


@pytest.mark.parametrize(
    ("text", "continues"),
    [
        (b"ing", True),
        (b" saw", False),
        (b"\n", False),
        (b",", True),
        ("中国".encode(), False),
        ("，".encode(), False),
        ("中".encode()[:2], False),  # the first two bytes of three
        ("中".encode()[1:], True),
        ("中".encode()[2:] + "国".encode(), True),
        ("\U00020000".encode()[:1], False),
        ("é".encode(), True),
        ("é".encode()[:1], True),
        ("の".encode(), True),
    ],
)
def test_continues_word_in_bytes(text, continues):
    assert continues_word([byte_level(text)], "byte_level").tolist() == [continues]


@pytest.mark.parametrize("mark", [".", "!", "?", "。", "！", "？", "…", "...", "end."])
def test_ends_sentence(mark):
    spelled = {"wordpiece": f"##{mark}", "metaspace": f"▁{mark}", "byte_level": byte_level(mark.encode())}
    for spelling, token in spelled.items():
        assert ends_sentence([token, "a", ".a", ","], spelling).tolist() == [True, False, False, False]


def test_a_line_break_ends_a_sentence():
    assert ends_sentence([byte_level(b"\n\n  "), byte_level(b"  "), "<0x0A>"], "byte_level").tolist()[:2] == [
        True,
        False,
    ]
    assert ends_sentence(["<0x0A>", "<0x2E>", "<0x41>"], "metaspace").tolist() == [True, True, False]
