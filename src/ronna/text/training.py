"""Training a tokenizer: WordPiece, byte-level BPE or Unigram; the same texts give the same bytes.

WordPiece (Schuster & Nakajima 2012; BERT, arXiv:1810.04805), byte-level BPE (GPT-2), Unigram
(arXiv:1804.10959). WordPiece and BPE are trained by `tokenizers`, Unigram by `sentencepiece`: the
trainer in `tokenizers` sums in the order of a randomly seeded hash table and gives other scores every time.
"""

import io
import json
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Self

import tokenizers
from pydantic import Field, model_validator
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from ronna.base.config import Config
from ronna.base.errors import RonnaError
from ronna.text import unigram
from ronna.text.folder import TokenizerParts
from ronna.text.unicode import SURROGATE

# The splitting pattern of Llama 3 (and of GPT-4's cl100k): numbers in groups of three, newlines apart.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Sums over threads are part of the result, so their number must not depend on the machine.
SENTENCEPIECE_THREADS = 4
# sentencepiece skips lines above its limit in silence, so lines are cut below it.
LINE_CHARS = 4_000

UNUSED = {
    "wordpiece": ("byte_fallback", "pattern"),
    "bpe": ("alphabet", "byte_fallback"),
    "unigram": ("min_frequency", "pattern"),
}


@dataclass(frozen=True)
class Style:
    """A family's special tokens, and where its template puts them around one text and two."""

    roles: dict[str, str]
    single: str | None = None
    pair: str | None = None


STYLES = {
    "bert": Style(
        {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
        "[CLS] $A [SEP]",
        "[CLS] $A [SEP] $B:1 [SEP]:1",
    ),
    # A padding token of its own: with pad = eos, a model whose padding is ignored never learns to stop.
    "gpt": Style({"bos": "<|endoftext|>", "eos": "<|endoftext|>", "pad": "<|pad|>"}),
    "t5": Style({"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}, "$A </s>", "$A </s> $B </s>"),
}


class TokenizerConfig(Config):
    """What tokenizer to train. `vocab` counts everything: special tokens, sentinels and extras too.

    alphabet: keep only the most frequent characters (Chinese has tens of thousands; the rest is [UNK]).
    specials: bert [PAD] [UNK] [CLS] [SEP] [MASK]; gpt <|endoftext|> <|pad|>; t5 <pad> </s> <unk>.
    By default they follow `kind`: wordpiece bert, bpe gpt, unigram t5.
    sentinels: how many <extra_id_N> for span denoising; None is 100 for t5 specials and 0 for others.
    extra_special: more special tokens, such as <|im_start|> and <|im_end|> for dialogue.
    max_length: tokens the model will read, for those who load the folder.
    """

    kind: Literal["wordpiece", "bpe", "unigram"] = "bpe"
    vocab: int = Field(default=32_000, ge=300)
    lowercase: bool = False
    min_frequency: int = Field(default=2, ge=1)
    alphabet: int | None = Field(default=None, ge=1)
    byte_fallback: bool = False
    pattern: Literal["gpt2", "llama3"] = "llama3"
    specials: Literal["bert", "gpt", "t5"] | None = None
    sentinels: int | None = Field(default=None, ge=0)
    extra_special: tuple[str, ...] = ()
    max_length: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        for name in UNUSED[self.kind]:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no meaning for kind = {self.kind!r}")
        allowed = {"wordpiece": ("bert", "t5"), "bpe": ("bert", "gpt", "t5"), "unigram": ("t5",)}[self.kind]
        if self.specials not in (None, *allowed):
            raise ValueError(f"kind = {self.kind!r} goes with specials {' or '.join(allowed)}")
        return self

    @property
    def style(self) -> str:
        return self.specials or {"wordpiece": "bert", "bpe": "gpt", "unigram": "t5"}[self.kind]

    @property
    def sentinel_tokens(self) -> list[str]:
        """In T5's order: `<extra_id_0>` has the highest id."""
        count = (100 if self.style == "t5" else 0) if self.sentinels is None else self.sentinels
        return [f"<extra_id_{i}>" for i in reversed(range(count))]


def train(texts: Iterable[str], config: TokenizerConfig) -> TokenizerParts:
    """Train on `texts`, which are read more than once (a one-way iterator is spooled to a temporary file)."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as spool:
        again = _rereadable(texts, spool)
        _check(again())
        backend = {"wordpiece": _wordpiece, "bpe": _byte_level_bpe, "unigram": _unigram}[config.kind](again, config)
    style = STYLES[config.style]
    named = dict.fromkeys([*style.roles.values(), *config.sentinel_tokens, *config.extra_special])
    backend.add_special_tokens(list(named))
    if config.kind != "unigram":
        backend.post_processor = _template(backend, config.kind, style)
    return TokenizerParts(backend, style.roles, config.max_length, None, _described(config))


def _check(texts: Iterator[str]) -> None:
    """The trainers would stop at such text with an error that names neither the text nor the mend."""
    number = 0
    for number, text in enumerate(texts, start=1):
        if half := SURROGATE.search(text):
            raise RonnaError(
                f"half of a surrogate pair ({half[0]!r}) at character {half.start()}",
                where=f"non-empty text {number}",
                fix="clean the texts first (ronna.text.clean removes lone surrogates)",
            )
    if number == 0:
        raise RonnaError("no text to train a tokenizer on", fix="give at least one non-empty text")


def _rereadable(texts: Iterable[str], spool: io.TextIOBase) -> Callable[[], Iterator[str]]:
    if iter(texts) is not texts:
        return lambda: (text for text in texts if text)
    for text in texts:
        spool.write(json.dumps(text) + "\n")

    def again() -> Iterator[str]:
        spool.seek(0)
        return (text for line in spool if (text := json.loads(line)))

    return again


def _alphabet(texts: Iterable[str], normalize: Callable[[str], str], limit: int | None) -> list[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalize(text))
    # Ties by code point: the library would break them by the order of a random hash.
    ranked = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    return sorted(ranked[:limit])


def _room(config: TokenizerConfig, needed: int, what: str) -> None:
    if config.vocab < needed:
        raise RonnaError(
            f"vocab = {config.vocab} is too small: {what} alone take {needed}",
            where="tokenizer.vocab",
            fix=f"set vocab above {needed}" + ("" if config.kind == "bpe" else ", or limit `alphabet`"),
        )


def _reserved(config: TokenizerConfig) -> tuple[list[str], int]:
    """The tokens with the first ids, and how many more are added after training."""
    first = list(dict.fromkeys(STYLES[config.style].roles.values()))
    after = {*config.sentinel_tokens, *config.extra_special} - set(first)
    return first, len(after)


def _wordpiece(texts: Callable[[], Iterator[str]], config: TokenizerConfig) -> tokenizers.Tokenizer:
    normalizer = normalizers.BertNormalizer(handle_chinese_chars=True, lowercase=config.lowercase)
    splitter = pre_tokenizers.BertPreTokenizer()
    alphabet = _alphabet(texts(), normalizer.normalize_str, config.alphabet)
    # A Chinese character or a punctuation mark is a word of its own and never continues one.
    inner = [c for c in alphabet if len(splitter.pre_tokenize_str(normalizer.normalize_str("a" + c))) == 1]
    first, after = _reserved(config)
    # Given first, in order: the trainer would number "##" characters in the order of a random hash,
    # and break ties between merges by those numbers.
    seeds = [*first, *alphabet, *(f"##{c}" for c in inner)]
    _room(config, len(seeds) + after, "special tokens and characters")
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocab - after,
        min_frequency=config.min_frequency,
        special_tokens=seeds,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    unk = STYLES[config.style].roles["unk"]
    trained = tokenizers.Tokenizer(models.WordPiece({}, unk_token=unk))
    trained.normalizer, trained.pre_tokenizer = normalizer, splitter
    trained.train_from_iterator(texts(), trainer)
    backend = tokenizers.Tokenizer(models.WordPiece(trained.get_vocab(with_added_tokens=False), unk_token=unk))
    backend.normalizer, backend.pre_tokenizer = normalizer, splitter
    backend.decoder = decoders.WordPiece()
    return backend


def _byte_level_bpe(texts: Callable[[], Iterator[str]], config: TokenizerConfig) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    if config.lowercase:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=config.pattern == "gpt2")
    if config.pattern == "llama3":
        split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, backend.pre_tokenizer])
    backend.decoder = decoders.ByteLevel()
    first, after = _reserved(config)
    _room(config, len(first) + 256 + after, "special tokens and bytes")
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab - after,
        min_frequency=config.min_frequency,
        special_tokens=first,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts(), trainer)
    return backend


def _unigram(texts: Callable[[], Iterator[str]], config: TokenizerConfig) -> tokenizers.Tokenizer:
    try:
        import sentencepiece
    except ImportError:
        raise RonnaError('training kind = "unigram" needs sentencepiece', fix="pip install sentencepiece") from None

    def normalize(text: str) -> str:
        text = unicodedata.normalize("NFKC", text)
        return text.casefold() if config.lowercase else text

    kept = set(_alphabet(texts(), normalize, config.alphabet)) if config.alphabet else None
    _, after = _reserved(config)
    file = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts(), normalize, kept),
            model_writer=file,
            model_type="unigram",
            vocab_size=config.vocab - after,
            hard_vocab_limit=False,
            character_coverage=1.0,
            byte_fallback=config.byte_fallback,
            normalization_rule_name="nmt_nfkc_cf" if config.lowercase else "nmt_nfkc",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=SENTENCEPIECE_THREADS,
            max_sentence_length=16 * LINE_CHARS,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise RonnaError(
            f"sentencepiece cannot train this tokenizer: {error}",
            where="tokenizer.vocab",
            fix="raise vocab, limit `alphabet`, or give more text",
        ) from None
    return unigram.t5_backend(unigram.parse(file.getvalue()), len(config.sentinel_tokens))


def _lines(texts: Iterable[str], normalize: Callable[[str], str], kept: set[str] | None) -> Iterator[str]:
    for text in texts:
        for line in normalize(text).splitlines():
            if kept is not None:
                line = "".join(c if c in kept else " " for c in line)
            for start in range(0, len(line), LINE_CHARS):
                yield line[start : start + LINE_CHARS]


def _template(backend: tokenizers.Tokenizer, kind: str, style: Style) -> processors.PostProcessor | None:
    parts: list[processors.PostProcessor] = []
    if kind == "bpe":
        # Offsets of the word, without the space before it.
        parts.append(processors.ByteLevel(trim_offsets=True))
    if style.single is not None:
        used = [t for t in dict.fromkeys(style.roles.values()) if t in style.single]
        ids = [(token, backend.token_to_id(token)) for token in used]
        parts.append(processors.TemplateProcessing(single=style.single, pair=style.pair, special_tokens=ids))
    return processors.Sequence(parts) if len(parts) > 1 else parts[0]


def _described(config: TokenizerConfig) -> dict[str, object]:
    """tokenizer_config.json: the class of transformers that would build exactly this tokenizer."""
    recipe = (config.kind, config.style)
    described: dict[str, object] = {
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": [*config.sentinel_tokens, *config.extra_special],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if recipe == ("wordpiece", "bert"):
        described |= {"tokenizer_class": "BertTokenizerFast", "do_lower_case": config.lowercase}
        described |= {"tokenize_chinese_chars": True, "strip_accents": None}
    elif recipe == ("bpe", "gpt") and config.pattern == "gpt2" and not config.lowercase:
        described["tokenizer_class"] = "GPT2TokenizerFast"
    elif recipe == ("unigram", "t5") and not config.byte_fallback:
        described |= {"tokenizer_class": "T5TokenizerFast", "extra_ids": len(config.sentinel_tokens)}
    if config.style == "bert":
        described["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    return described
