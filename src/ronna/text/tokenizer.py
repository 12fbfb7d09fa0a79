"""Tokenizers: train one, load anyone's, use it, save it so that everyone can load it.

L tokens of a text, V vocabulary.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
from tokenizers import models

from ronna.base.errors import RonnaError
from ronna.text import training, unigram, vocabulary
from ronna.text.engine import EncodeBatch, try_gigatoken
from ronna.text.folder import Side, TokenizerParts, read_folder, write_folder
from ronna.text.settings import content
from ronna.text.training import TokenizerConfig

__all__ = ["Encoded", "EncodedWords", "Tokenizer", "TokenizerConfig", "load_tokenizer", "train_tokenizer"]


@dataclass(frozen=True)
class Encoded:
    """One text or pair with its special tokens, and where in the text each token comes from."""

    ids: np.ndarray  # (L,) int32
    offsets: np.ndarray  # (L, 2) int32, characters [start, end) of the token's own text; (0, 0) if special
    special: np.ndarray  # (L,) bool, added by the template
    segments: np.ndarray  # (L,) int32, segment (token type) ids as the template says
    text_index: np.ndarray  # (L,) int8, 0 in the first text, 1 in the second, -1 added by the template


@dataclass(frozen=True)
class EncodedWords:
    """The tokens of a text that comes in words, without special tokens."""

    ids: np.ndarray  # (L,) int32
    word: np.ndarray  # (L,) int32, number of the word each token comes from, rising; a word may have none


class Tokenizer:
    """Text to ids and back; never truncates, never pads. From `load_tokenizer` or `train_tokenizer`."""

    def __init__(self, parts: TokenizerParts):
        self.parts = parts
        self._backend = parts.backend
        self._decoder = parts.decoder or parts.backend
        self._fast: EncodeBatch | None = None
        self._engine_reason: str | None = None

    def __repr__(self) -> str:
        kind = type(self._backend.model).__name__
        return f"Tokenizer({kind}, vocab_size={self.vocab_size}, hash={self.hash[:12]})"

    def __len__(self) -> int:
        return self.vocab_size

    # Special tokens: ids, None where the tokenizer has no such token.

    @property
    def pad_id(self) -> int | None:
        return self._role("pad")

    @property
    def bos_id(self) -> int | None:
        return self._role("bos")

    @property
    def eos_id(self) -> int | None:
        return self._role("eos")

    @property
    def cls_id(self) -> int | None:
        return self._role("cls")

    @property
    def sep_id(self) -> int | None:
        return self._role("sep")

    @property
    def mask_id(self) -> int | None:
        return self._role("mask")

    @property
    def unk_id(self) -> int | None:
        return self._role("unk")

    def _role(self, role: str) -> int | None:
        token = self.parts.roles.get(role)
        return None if token is None else self.token_to_id(token)

    @cached_property
    def sentinel_ids(self) -> np.ndarray:
        """Ids of <extra_id_0>, <extra_id_1>, ... (n,) int32, as far as they go."""
        ids: list[int] = []
        while (i := self.token_to_id(f"<extra_id_{len(ids)}>")) is not None:
            ids.append(i)
        return np.array(ids, np.int32)

    @property
    def special_tokens(self) -> dict[str, str]:
        """Tokens by the names that chat templates have for them: bos_token, eos_token, ..."""
        return {f"{role}_token": token for role, token in self.parts.roles.items()}

    # The vocabulary.

    @cached_property
    def vocab_size(self) -> int:
        """Highest id + 1, added tokens included: the rows an embedding needs."""
        return max(self._decoder.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def max_length(self) -> int | None:
        """Tokens the model was made for, where the folder says so. Nothing is ever cut to it here."""
        return self.parts.max_length

    @property
    def chat_template(self) -> str | None:
        """Jinja text; rendering it (in a sandbox) is not this room's work."""
        return self.parts.chat_template

    @cached_property
    def hash(self) -> str:
        """sha256 of all that determines ids: same hash, same ids."""
        # Unigram scores may move by the last bit of a double on their way through a file.
        document = json.loads(self._backend.to_str(), parse_float=lambda digits: f"{float(digits):.9g}")
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    @cached_property
    def tokens(self) -> list[str]:
        """(V,) tokens as the vocabulary spells them; "" for an id without a token."""
        names = [""] * self.vocab_size
        for token, i in self._decoder.get_vocab(with_added_tokens=True).items():
            names[i] = token
        return names

    def token_to_id(self, token: str) -> int | None:
        return self._decoder.token_to_id(token)

    @cached_property
    def is_special(self) -> np.ndarray:
        """(V,) bool: special tokens, which `decode` skips by default."""
        table = np.zeros(self.vocab_size, bool)
        for backend in {id(b): b for b in (self._backend, self._decoder)}.values():
            added = backend.get_added_tokens_decoder()
            table[[i for i, token in added.items() if token.special]] = True
        return table

    @cached_property
    def continues_word(self) -> np.ndarray:
        """(V,) bool: the token continues the word before it (for whole-word masking)."""
        return vocabulary.continues_word(self.tokens, self._spelling) & ~self.is_special

    @cached_property
    def ends_sentence(self) -> np.ndarray:
        """(V,) bool: the token's text ends a sentence, or has a line break in it."""
        return vocabulary.ends_sentence(self.tokens, self._spelling) & ~self.is_special

    @cached_property
    def _spelling(self) -> vocabulary.Spelling:
        model = self._backend.model
        if isinstance(model, models.WordPiece):
            return "wordpiece"
        return "byte_level" if "ByteLevel" in str(self._decoder.decoder) else "metaspace"

    # Encoding and decoding.

    @property
    def engine(self) -> Literal["gigatoken", "tokenizers"]:
        """What `encode_batch` runs on; decided at its first call."""
        return "tokenizers" if self._fast is None else "gigatoken"

    @property
    def engine_reason(self) -> str:
        return self._engine_reason or "not decided before the first encode_batch"

    def encode(self, text: str, add_special: bool = False) -> np.ndarray:
        """Ids (L,) int32 of one text; with the template's special tokens if `add_special`."""
        return self._plain([text], add_special)[0]

    def encode_batch(self, texts: Sequence[str], add_special: bool = False) -> list[np.ndarray]:
        """Ids, one (L,) int32 array a text, each as `encode` gives it; on all cores.

        Raises RonnaError for text that is not Unicode (lone surrogates).
        """
        texts = list(texts)
        if self._engine_reason is None:
            self._choose_engine(texts)
        if self._fast is None or (add_special and self._around is None):
            return self._plain(texts, add_special)
        try:
            rows = self._fast(texts)
        except (TypeError, UnicodeEncodeError):
            return self._plain(texts, add_special)
        if not add_special or self._around is None:
            return rows
        before, after = self._around
        return [np.concatenate((before, row, after)) for row in rows]

    def encode_with_offsets(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, special: bool = True
    ) -> list[Encoded]:
        """Encode with offsets and special tokens, unless `special` is false; `pairs[i]` is the second of `texts[i]`."""
        if pairs is not None and len(pairs) != len(texts):
            raise ValueError(f"{len(texts)} texts and {len(pairs)} pairs")
        rows = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        try:
            encodings = self._backend.encode_batch(rows, add_special_tokens=special)
        except Exception as error:  # the library raises bare Exception
            raise self._refused([*texts, *(pairs or ())], error) from None
        return [_encoded(encoding, self._ids(encoding)) for encoding in encodings]

    def encode_words(self, texts: Sequence[str], words: Sequence[Sequence[tuple[int, int]]]) -> list[EncodedWords]:
        """Encode texts word by word, so that no token has parts of two; `words[i]` are characters of `texts[i]`.

        A word behind a space keeps it, which byte-level and SentencePiece vocabularies write into their tokens.
        """
        if len(words) != len(texts):
            raise ValueError(f"{len(texts)} texts and words of {len(words)}")
        spaced = self._words_keep_spaces
        rows = [
            [text[a - 1 if spaced and text[a - 1 : a] == " " else a : b] for a, b in some]
            for text, some in zip(texts, words, strict=True)
        ]
        try:
            encodings = self._backend.encode_batch(rows, is_pretokenized=True, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise self._refused(texts, error) from None
        return [EncodedWords(self._ids(e), np.array(e.word_ids, np.int32)) for e in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = True) -> str:
        """Text of ids (L,)."""
        return self.decode_batch([np.asarray(ids, np.int64)], skip_special)[0]

    def decode_batch(
        self, rows: Sequence[Sequence[int]] | Sequence[np.ndarray], skip_special: bool = True
    ) -> list[str]:
        plain = [row.tolist() if isinstance(row, np.ndarray) else list(row) for row in rows]
        for i in {i for row in plain for i in row}:
            if not 0 <= i < self.vocab_size:
                raise RonnaError(
                    f"id {i} is not in a vocabulary of {self.vocab_size}",
                    fix="decode with the tokenizer the ids were made with",
                )
        texts = self._decoder.decode_batch(plain, skip_special_tokens=skip_special)
        return texts if self.parts.decoder is None else [text.strip() for text in texts]

    # Changing and saving: a Tokenizer itself never changes.

    def with_special(self, tokens: Iterable[str]) -> "Tokenizer":
        """A tokenizer with more special tokens; new ones get the next ids."""
        if self.parts.files:
            raise RonnaError("tokens cannot be added to a Marian tokenizer", fix="use its own tokens")
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.add_special_tokens(list(tokens))
        config = dict(self.parts.config)
        listed = map(content, config.get("additional_special_tokens") or [])
        config["additional_special_tokens"] = list(dict.fromkeys([*listed, *tokens]))
        return Tokenizer(dataclasses.replace(self.parts, backend=backend, config=config))

    def with_chat_template(self, template: str | None) -> "Tokenizer":
        """A tokenizer that carries another chat template; the ids are the same."""
        return Tokenizer(dataclasses.replace(self.parts, chat_template=template))

    def for_targets(self) -> "Tokenizer":
        """What cuts the texts that a translation model is to write: another one than this for Marian alone."""
        files = self.parts.files
        if not files:
            return self
        model, vocab = unigram.parse(files["target.spm"]), json.loads(files["vocab.json"])
        backend = unigram.marian_backend(model, vocab, self.parts.roles)
        return Tokenizer(dataclasses.replace(self.parts, backend=backend))

    def with_max_length(self, max_length: int | None) -> "Tokenizer":
        """A tokenizer that tells its users another length; the ids are the same."""
        return Tokenizer(dataclasses.replace(self.parts, max_length=max_length))

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face folder, which `transformers.AutoTokenizer` loads for the same ids."""
        write_folder(Path(folder), self.parts)

    def _plain(self, texts: Sequence[str], add_special: bool = False) -> list[np.ndarray]:
        encode = self._backend.encode_batch_fast
        if self.parts.decoder is not None:
            encode = self._backend.encode_batch  # the fast form leaves out the tokens `_ids` looks up
        try:
            return [self._ids(row) for row in encode(list(texts), add_special_tokens=add_special)]
        except Exception as error:  # the library raises bare Exception
            raise self._refused(texts, error) from None

    def _ids(self, encoding: tokenizers.Encoding) -> np.ndarray:
        ids = np.array(encoding.ids, np.int32)
        if self.parts.decoder is not None:
            # What one side of a Marian tokenizer does not know, the shared vocabulary may.
            for at in np.flatnonzero(ids == self.unk_id):
                known = self.parts.decoder.token_to_id(encoding.tokens[at])
                if known is not None:
                    ids[at] = known
        return ids

    def _refused(self, texts: Sequence[object], error: Exception) -> Exception:
        """What to raise for texts that the backend does not take: they are no Unicode, or it is at fault itself."""
        if not isinstance(error, TypeError):
            return RonnaError(f"the tokenizer cannot cut a text: {error}", fix="copy the tokenizer's files again")
        for n, text in enumerate(texts):
            if not isinstance(text, str):
                return TypeError(f"text {n} is {type(text).__name__}, not str")
            try:
                text.encode()
            except UnicodeEncodeError as half:
                return RonnaError(
                    f"half of a surrogate pair ({text[half.start]!r}) at character {half.start}",
                    where=f"text {n} of the batch",
                    fix="clean the text first (ronna.text.clean removes lone surrogates)",
                )
        return TypeError("tokenizers refuses the batch")

    def _choose_engine(self, first_batch: Sequence[str]) -> None:
        if self._spelling != "byte_level" or not isinstance(self._backend.model, models.BPE):
            self._engine_reason = "only byte-level BPE has a faster engine"
            return
        self._fast, self._engine_reason = try_gigatoken(self._backend, self._plain, first_batch)

    @cached_property
    def _around(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The ids the template puts before and after one text; None for a template that does more."""
        inner, full = self.encode("a b"), self.encode("a b", add_special=True)
        for start in range(len(full) - len(inner) + 1):
            if np.array_equal(full[start : start + len(inner)], inner):
                return full[:start], full[start + len(inner) :]
        return None

    @property
    def around(self) -> tuple[np.ndarray, np.ndarray]:
        """The special tokens (n,) before and after one text. Raises RonnaError for a template that does more."""
        if self._around is None:
            raise RonnaError("this tokenizer does not simply put tokens before and after a text", fix="use another one")
        return self._around

    @cached_property
    def _words_keep_spaces(self) -> bool:
        """Whether " b" as a word of "a b" gives the tokens of "a b"; else "b" does, and a normalizer adds the space."""
        whole = self.encode("a b").tolist()
        apart = self._backend.encode(["a", " b"], is_pretokenized=True, add_special_tokens=False)
        return whole == self._ids(apart).tolist()


def _encoded(encoding: tokenizers.Encoding, ids: np.ndarray) -> Encoded:
    return Encoded(
        ids=ids,
        offsets=np.array(encoding.offsets, np.int32).reshape(-1, 2),
        special=np.array(encoding.special_tokens_mask, bool),
        segments=np.array(encoding.type_ids, np.int32),
        text_index=np.array([-1 if i is None else i for i in encoding.sequence_ids], np.int8),
    )


def load_tokenizer(path: str | Path, side: Side = "source") -> Tokenizer:
    """Load the tokenizer of a Hugging Face folder, or one tokenizer.json.

    `side` matters only for Marian (OPUS-MT), whose source and target texts are cut differently into one
    vocabulary. Raises RonnaError for a folder without a tokenizer and for broken files; code that a
    folder brings along is never run.
    """
    return Tokenizer(read_folder(Path(path), side))


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Train a tokenizer; the same texts in the same order give the same tokenizer.json, byte for byte.

    `texts` are read more than once (an iterator is spooled to disk). Raises RonnaError for no text, for
    lone surrogates, and for a vocabulary too small for the characters it must hold.
    """
    return Tokenizer(training.train(texts, config))
