"""A faster engine for byte-level BPE (gigatoken), used only where it agrees with `tokenizers`."""

from collections.abc import Callable, Sequence

import numpy as np
import tokenizers

from ronna.text.unicode import SURROGATE

# Where tokenizers differ: normalisation, whitespace, digits, contractions, special tokens, broken emoji.
SAMPLES = (
    "",
    " ",
    "   ",
    "\n\n\n",
    "\t\tx = 1\r\n\r\n  y",
    "Hello, world! It's what we'll do; they've said I'D.",
    "The quick brown fox jumps over the lazy dog.  Two spaces.",
    "a" * 300,
    "trailing spaces    ",
    "    leading spaces",
    "1 12 123 1234 12345 3.14159 1,000,000 ½ Ⅷ ٣٤",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}\n\n# end\n",
    '<div class="a">&nbsp;</div>\n<!-- c -->\\n\\t',
    "https://example.org/a_b-c?d=e&f=%20#g user@example.org",
    "今天天气很好，我们去公园吧。好！",
    "繁體中文「引號」\u20002024年3月",
    "日本語のテキスト 한국어 문장",
    "Привет, мир! Γειά σου",
    "שלום \u200fمرحبا\u200e ",
    "ह\u093fन\u094dद\u0940 ไทย",
    "😀👨\u200d👩\u200d👧🇨🇳❤\ufe0f👍🏽",
    "e\u0301 é n\u0303 ẛ\u0323 Z\u0351\u036b\u0343\u036a\u0302",
    "\u00a0\u2003\u3000\u200b\ufeff\u2028\u2029\u0085",
    "\x00\x01\x1b[0m\x7f",
    "\ufffd \U0010ffff \ue000 ﷺ",
    "<|endoftext|>",
    "a<|endoftext|> b <|endoftext|>\n<|im_start|>user\nhi<|im_end|>",
    "<s></s> [MASK] [CLS] <pad> <extra_id_0> <|pad|> <|begin_of_text|>",
    "<|endoftext <|endoftext| |endoftext|>",
    "snake_case camelCase SCREAMING kebab-case x86_64",
    "‘quoted’ “double” — dash … €5 £9",
    "!!!???...,,,;;;:::((()))[[[]]]",
    "'s 't 're 've 'm 'll 'd 'S 'T ’s",
    "a\u0300\u0301\u0302\u0303" * 20,
    "word " * 100,
)
# From the first batch: real data knows cases that no list does.
CHECKED, CHECKED_CHARS = 32, 4_096

EncodeBatch = Callable[[Sequence[str]], list[np.ndarray]]


def try_gigatoken(
    backend: tokenizers.Tokenizer, plain: EncodeBatch, first_batch: Sequence[str]
) -> tuple[EncodeBatch | None, str]:
    """gigatoken's encode for the same ids as `plain`, or None; and the reason in words.

    It is compared on built-in samples, on the tokenizer's own special tokens, and on the start of some
    texts of the first batch.
    """
    try:
        import awkward
        import gigatoken
    except ImportError:
        return None, "gigatoken is not installed"
    try:
        fast = gigatoken.Tokenizer.from_json(backend.to_str())
    except (RuntimeError, ValueError) as error:
        return None, f"gigatoken refuses this tokenizer: {str(error).splitlines()[0]}"

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        rows = fast.encode_batch(list(texts))
        ids = np.asarray(awkward.flatten(rows)).astype(np.int32)
        ends = np.cumsum(np.asarray(awkward.num(rows)))
        return np.split(ids, ends[:-1]) if len(texts) else []

    added = [f"x{token.content} y" for token in backend.get_added_tokens_decoder().values()]
    step = max(1, len(first_batch) // CHECKED)
    starts = (text[:CHECKED_CHARS] for text in first_batch[::step][:CHECKED])
    # Text that is no Unicode is the caller's mistake: neither engine takes it.
    some = [text for text in starts if not SURROGATE.search(text)]
    samples = [*SAMPLES, *added[:CHECKED], *added[CHECKED:][-CHECKED:], *some]
    try:
        pairs = zip(samples, encode(samples), plain(samples), strict=True)
        wrong = next((text for text, a, b in pairs if not np.array_equal(a, b)), None)
    except (RuntimeError, ValueError) as error:
        return None, f"gigatoken failed on a sample: {str(error).splitlines()[0]}"
    if wrong is not None:
        return None, f"gigatoken gives other ids for {wrong[:40]!r}"
    return encode, f"gigatoken gives the same ids on {len(samples)} samples"
