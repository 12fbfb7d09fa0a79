"""What the spelling of a token tells: does it continue a word, does it end a sentence. V vocabulary."""

import re
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from ronna.text.unigram import SPACE

Spelling = Literal["wordpiece", "byte_level", "metaspace"]

# Ideographs, and the punctuation written between them: each is a word of its own.
IDEOGRAPHS = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
CJK = re.compile(f"[{IDEOGRAPHS}\u3001-\u3003\u3007-\u301f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]")
SENTENCE_END = (".", "!", "?", "。", "！", "？", "…")
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def continues_word(tokens: Sequence[str], spelling: Spelling) -> np.ndarray:
    """(V,) bool: the token continues the word of the token before it.

    WordPiece: `##`. Byte-level BPE and Metaspace: no space at its start. A Chinese character is a word
    of its own in all three; where bytes are tokens, the inner bytes of a character continue it.
    """
    as_bytes = _spelled(spelling)
    return np.array([_continues(token, as_bytes(token), spelling) for token in tokens], bool)


def ends_sentence(tokens: Sequence[str], spelling: Spelling) -> np.ndarray:
    """(V,) bool: the token's text ends with a full stop, `!`, `?`, an ellipsis, or has a line break."""
    as_bytes = _spelled(spelling)
    texts = (as_bytes(token).decode("utf-8", "replace") for token in tokens)
    return np.array([text.rstrip(" ").endswith(SENTENCE_END) or "\n" in text for text in texts], bool)


def _continues(token: str, text: bytes, spelling: Spelling) -> bool:
    if not text or (spelling == "wordpiece" and not token.startswith("##")):
        return False
    lead = text[0]
    if 0x80 <= lead < 0xC0:
        return True
    # A cut character has only its first byte to show: E3 to E9 and F0 lead Chinese characters.
    start = text[:4].decode("utf-8", "ignore")[:1]
    if not start:
        return not (0xE3 <= lead <= 0xE9 or lead == 0xF0)
    return not (start.isspace() or CJK.match(start))


def _spelled(spelling: Spelling) -> Callable[[str], bytes]:
    if spelling == "byte_level":
        table = _byte_of_character()
        # An added token is spelled as it is, with characters that stand for no byte.
        return lambda token: bytes(table[c] for c in token) if table.keys() >= set(token) else token.encode()
    if spelling == "wordpiece":
        return lambda token: token.removeprefix("##").encode("utf-8", "replace")
    return _metaspace


def _metaspace(token: str) -> bytes:
    if byte := BYTE.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace(SPACE, " ").encode("utf-8", "replace")


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 stands for itself, other bytes for characters from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (byte for byte in range(256) if byte not in visible)
    return {chr(b): b for b in visible} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}
