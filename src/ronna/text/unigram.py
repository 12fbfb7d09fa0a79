"""Unigram tokenizers (Kudo 2018, arXiv:1804.10959): sentencepiece model files as `tokenizers` backends.

A `.model` or `.spm` file is one protobuf message; the few fields needed are read here, so that nobody
has to install sentencepiece to use a model (training one does need it, see training.py).
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from ronna.base.errors import RonnaError

UNKNOWN, BYTE = 2, 6  # ModelProto.SentencePiece.Type
UNIGRAM = 1  # TrainerSpec.ModelType
SPACE = "\u2581"
# A private character that no text holds: a piece behind it can be decoded, but never be found in text.
HIDDEN = "\U0010fffd"


@dataclass(frozen=True)
class UnigramModel:
    """What a sentencepiece file says: pieces `(text, score, type)` in the order of their ids."""

    pieces: Sequence[tuple[str, float, int]]
    charsmap: bytes
    dummy_prefix: bool

    @property
    def unk_id(self) -> int:
        return next(i for i, (_, _, kind) in enumerate(self.pieces) if kind == UNKNOWN)

    @property
    def byte_fallback(self) -> bool:
        return any(kind == BYTE for _, _, kind in self.pieces)


def read(path: Path) -> UnigramModel:
    """Read a sentencepiece Unigram model; RonnaError for another file or another kind of model."""
    try:
        return parse(path.read_bytes())
    except (ValueError, IndexError, struct.error, StopIteration) as error:
        raise RonnaError(
            f"not a sentencepiece Unigram model: {error}", where=str(path), fix="copy the file again"
        ) from None


def parse(data: bytes) -> UnigramModel:
    """Fields after sentencepiece_model.proto; ValueError where the bytes are something else."""
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            piece = dict(_fields(value))
            score = struct.unpack("<f", bytes(piece.get(2, bytes(4))))[0]
            # Nine digits say a single precision number exactly, and survive JSON to the last bit.
            pieces.append((bytes(piece[1]).decode(), float(f"{score:.9g}"), int(piece.get(3, 1))))
        elif number == 2 and isinstance(value, bytes):
            trainer = dict(_fields(value))
        elif number == 3 and isinstance(value, bytes):
            normalizer = dict(_fields(value))
    if not any(kind == UNKNOWN for _, _, kind in pieces):
        raise ValueError("it has no unknown piece")
    if trainer.get(3, UNIGRAM) != UNIGRAM:
        raise ValueError("its pieces are of another kind (BPE, words or characters)")
    return UnigramModel(pieces, bytes(normalizer.get(2, b"")), bool(normalizer.get(3, True)))


def t5_backend(model: UnigramModel, sentinels: int) -> tokenizers.Tokenizer:
    """T5's tokenizer: ids as in the file, then the sentinels, `<extra_id_0>` last (arXiv:1910.10683)."""
    names = [f"<extra_id_{i}>" for i in reversed(range(sentinels))]
    vocab = [(text, score) for text, score, _ in model.pieces] + [(name, 0.0) for name in names]
    backend = _backend(model, vocab, model.unk_id)
    backend.add_special_tokens(["<pad>", "</s>", "<unk>", *names])
    _end_with(backend, "</s>")
    return backend


def marian_backend(model: UnigramModel, vocab: Mapping[str, int], roles: Mapping[str, str]) -> tokenizers.Tokenizer:
    """One side of a Marian (OPUS-MT) tokenizer: text cut by `model`, ids from the shared `vocab`.

    A piece that `model` does not know, but the other side does, is unknown here by id, and known by its
    token: whoever wants Marian's ids looks the token up (arXiv:1804.00344).
    """
    scores = {text: score for text, score, _ in model.pieces}
    lowest = min(score for _, score, _ in model.pieces)
    unk = roles["unk"]
    table = [(HIDDEN, lowest)] * (max(vocab.values()) + 1)
    codes = sorted(token for token in vocab if token.startswith(">>") and token.endswith("<<"))
    for token, i in vocab.items():
        visible = token in scores or token in codes or token in roles.values()
        table[i] = (token if visible else HIDDEN + token, scores.get(token, lowest))
    backend = _backend(model, table, vocab[unk])
    # sentencepiece parts words at spaces alone; other white space left by the normalizer is text.
    spaces = [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex("^ | $"), "")]
    backend.normalizer = normalizers.Sequence([*filter(None, [backend.normalizer]), *spaces])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    backend.add_special_tokens([*dict.fromkeys(roles.values()), *codes])
    _end_with(backend, roles["eos"])
    return backend


def marian_decoder(vocab: Mapping[str, int], roles: Mapping[str, str]) -> tokenizers.Tokenizer:
    """Ids back to text, whichever side they come from."""
    decoder = tokenizers.Tokenizer(models.WordLevel(dict(vocab), unk_token=roles["unk"]))
    decoder.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    decoder.add_special_tokens([AddedToken(token, normalized=False) for token in dict.fromkeys(roles.values())])
    return decoder


def _backend(model: UnigramModel, vocab: list[tuple[str, float]], unk_id: int) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram(vocab, unk_id, model.byte_fallback))
    if model.charsmap:
        backend.normalizer = normalizers.Precompiled(model.charsmap)
    scheme = "always" if model.dummy_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True),
        ]
    )
    backend.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme=scheme)
    if model.byte_fallback:
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace(SPACE, " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    return backend


def _end_with(backend: tokenizers.Tokenizer, eos: str) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}",
        pair=f"$A {eos} $B {eos}",
        special_tokens=[(eos, backend.token_to_id(eos))],
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Protobuf's wire format: numbers as int, everything that has a length as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        value: int | bytes
        match key & 7:
            case 0:
                value, at = _varint(data, at)
            case 1 | 2 | 5 as wire:
                size = {1: 8, 5: 4}.get(wire)
                if size is None:
                    size, at = _varint(data, at)
                value, at = data[at : at + size], at + size
            case wire:
                raise ValueError(f"unknown protobuf wire type {wire}")
        if at > len(data):
            raise ValueError("it is cut short")
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if shift > 63:
            raise ValueError("a number is too long")
    return value | data[at] << shift, at + 1
