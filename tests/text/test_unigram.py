"""sentencepiece files: cut and numbered as sentencepiece and transformers do."""

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ronna.base.errors import RonnaError
from ronna.text import unigram
from ronna.text.engine import SAMPLES
from ronna.text.tokenizer import load_tokenizer

from .conftest import CHINESE, CODE, CORPUS, ENGLISH

sentencepiece = pytest.importorskip("sentencepiece")
# `tokenizers` looks up whole letters with their marks where sentencepiece looks up one mark at a time.
TEXTS = [*(t for t in SAMPLES if "\u0300" not in t), *CORPUS]


def model_bytes(texts, **options) -> bytes:
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=file, vocab_size=400, hard_vocab_limit=False,
        minloglevel=2, **{"model_type": "unigram", **options},
    )  # fmt: skip
    return file.getvalue()


@pytest.fixture(scope="module")
def marian_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("marian")
    tokens = ["</s>", "<unk>", ">>deu<<"]
    for side, texts in (("source", [*ENGLISH, *CODE]), ("target", CHINESE)):
        data = model_bytes(texts)
        (folder / f"{side}.spm").write_bytes(data)
        tokens += [text for text, _, _ in unigram.parse(data).pieces[3:]]
    vocab = {token: i for i, token in enumerate([*dict.fromkeys(tokens), "<pad>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "config.json").write_text('{"model_type": "marian"}')
    (folder / "tokenizer_config.json").write_text('{"source_lang": "en", "target_lang": "zh"}')
    return folder


def test_pieces_are_read_as_sentencepiece_reads_them():
    data = model_bytes(CORPUS, byte_fallback=True, user_defined_symbols=["<sep>"])
    model = unigram.parse(data)
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert len(model.pieces) == reference.get_piece_size() and model.unk_id == reference.unk_id()
    assert [text for text, _, _ in model.pieces] == [reference.id_to_piece(i) for i in range(len(model.pieces))]
    scores = [reference.get_score(i) for i in range(len(model.pieces))]
    assert np.array_equal(np.float32([score for _, score, _ in model.pieces]), np.float32(scores))
    assert model.byte_fallback and model.charsmap and model.dummy_prefix


def test_t5_from_its_sentencepiece_file_alone(tmp_path):
    data = model_bytes(CORPUS, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    (tmp_path / "spiece.model").write_bytes(data)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    tokenizer = load_tokenizer(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    for text, ids in zip(CORPUS, tokenizer.encode_batch(CORPUS, add_special=True), strict=True):
        assert ids.tolist() == [*reference.encode(text), 1]
    assert tokenizer.vocab_size == reference.get_piece_size() + 100
    assert tokenizer.sentinel_ids[0] == tokenizer.vocab_size - 1
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)


@pytest.mark.parametrize("side", ["source", "target"])
def test_marian_is_what_transformers_gives(marian_folder, tmp_path, side):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(marian_folder), load_tokenizer(marian_folder, side)
    texts = [*TEXTS, ">>deu<< The sailor saw it.", "a</s>b <pad> <unk>", "The 学生 saw (7) 船"]
    expected = theirs(texts)["input_ids"] if side == "source" else theirs(text_target=texts)["input_ids"]
    rows = ours.encode_batch(texts, add_special=True)
    assert [row.tolist() for row in rows] == expected
    assert [row.ids.tolist() for row in ours.encode_with_offsets(texts)] == expected
    assert ours.decode_batch(rows) == [theirs.decode(row, skip_special_tokens=True) for row in expected]
    assert (ours.pad_id, ours.eos_id, ours.unk_id) == (theirs.pad_token_id, 0, 1)
    assert ours.vocab_size == len(theirs) and ours.is_special[[0, 1, ours.pad_id]].all()
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path, side)
    assert again.hash == ours.hash
    assert AutoTokenizer.from_pretrained(tmp_path)(texts)["input_ids"] == theirs(texts)["input_ids"]


def test_marian_sides_share_ids_and_differ_in_cutting(marian_folder):
    source, target = (load_tokenizer(marian_folder, side) for side in ("source", "target"))
    assert source.tokens == target.tokens and source.hash != target.hash
    assert target.decode(target.encode("天气很好")) == "天气很好" == source.decode(target.encode("天气很好"))
    with pytest.raises(RonnaError, match="cannot be added"):
        source.with_special(["<x>"])


def test_marian_with_two_vocabularies_is_refused(marian_folder, tmp_path):
    for file in marian_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"separate_vocabs": true}')
    with pytest.raises(RonnaError, match="two vocabularies"):
        load_tokenizer(tmp_path)


def test_bpe_models_are_refused(tmp_path):
    (tmp_path / "spiece.model").write_bytes(model_bytes(CORPUS, model_type="bpe"))
    with pytest.raises(RonnaError, match="of another kind"):
        unigram.read(tmp_path / "spiece.model")


@given(data=st.binary(max_size=60), cut=st.integers(0, 4000))
def test_any_bytes_give_a_model_or_a_clear_error(tmp_path_factory, data, cut):
    path = tmp_path_factory.getbasetemp() / "fuzz.model"
    for content in (data, GOOD[:cut] + data):
        path.write_bytes(content)
        try:
            unigram.read(path)
        except RonnaError as error:
            assert "not a sentencepiece Unigram model" in str(error)


GOOD = model_bytes(ENGLISH)
