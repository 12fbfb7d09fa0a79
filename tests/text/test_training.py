"""Training: what comes out has the right tokens, fits the size asked for, and is the same every time."""

import os
import subprocess
import sys

import numpy as np
import pytest
from pydantic import ValidationError

from ronna.base.errors import RonnaError
from ronna.text.tokenizer import TokenizerConfig, train_tokenizer

from .conftest import CONFIGS, CORPUS


@pytest.mark.parametrize("name", CONFIGS)
def test_vocabulary_is_within_the_size_asked_for_and_has_no_holes(trained, name):
    tokenizer, config = trained[name], CONFIGS[name]
    assert 200 < tokenizer.vocab_size <= config.vocab
    assert "" not in tokenizer.tokens
    assert len(set(tokenizer.tokens)) == tokenizer.vocab_size


@pytest.mark.parametrize("name", CONFIGS)
def test_list_and_iterator_train_the_same_file(trained, name, tmp_path):
    again = train_tokenizer(iter(CORPUS), CONFIGS[name])
    trained[name].save(tmp_path / "a")
    again.save(tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_another_process_trains_the_same_tokenizers(trained, repository):
    # Hash tables are seeded per process: only another process can show that nothing depends on them.
    script = (
        "from tests.text.conftest import *\n"
        "print([train_tokenizer(CORPUS, CONFIGS[n]).hash for n in ('wordpiece', 'bpe', 'unigram')])"
    )
    path = os.pathsep.join([str(repository), str(repository / "src")])
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == str([trained[n].hash for n in ("wordpiece", "bpe", "unigram")])


def test_alphabet_keeps_the_most_frequent_characters():
    texts = ["一二三" * 10, "四" * 5, "五"]
    for kind in ("wordpiece", "unigram"):
        config = TokenizerConfig(kind=kind, vocab=300, alphabet=4, min_frequency=2, sentinels=0)
        tokenizer = train_tokenizer(texts, config)
        assert tokenizer.unk_id in tokenizer.encode("五")
        assert tokenizer.unk_id not in tokenizer.encode("一二三四")


def test_alphabet_ties_go_by_code_point():
    tokenizer = train_tokenizer(["甲乙丙丁"], TokenizerConfig(kind="wordpiece", vocab=300, alphabet=2))
    assert tokenizer.token_to_id("丁") is not None and tokenizer.token_to_id("丙") is not None
    assert tokenizer.token_to_id("乙") is None and tokenizer.token_to_id("甲") is None


def test_wordpiece_wastes_no_token_on_chinese_inside_a_word(trained):
    assert trained["wordpiece"].token_to_id("天") is not None
    assert trained["wordpiece"].token_to_id("##天") is None
    assert trained["wordpiece"].token_to_id("##e") is not None


def test_min_frequency_and_case():
    rare = train_tokenizer(["zebra " * 3 + "apple " * 30], TokenizerConfig(kind="wordpiece", min_frequency=10))
    assert "apple" in rare.tokens and "zebra" not in rare.tokens
    for kind in ("wordpiece", "bpe", "unigram"):
        config = TokenizerConfig(kind=kind, vocab=500, lowercase=True)
        tokenizer = train_tokenizer(CORPUS, config)
        assert np.array_equal(tokenizer.encode("The OLD Sailor"), tokenizer.encode("the old sailor"))


def test_pattern_decides_how_numbers_are_split():
    texts = ["2024 20 24 2024 202 4"] * 50
    gpt2 = train_tokenizer(texts, TokenizerConfig(pattern="gpt2", vocab=400))
    llama3 = train_tokenizer(texts, TokenizerConfig(pattern="llama3", vocab=400))
    assert len(gpt2.encode("2024")) == 1 and len(llama3.encode("2024")) == 2


def test_special_tokens_by_style(trained):
    bert, gpt, t5 = trained["wordpiece"], trained["bpe"], trained["unigram"]
    assert (bert.pad_id, bert.unk_id, bert.cls_id, bert.sep_id, bert.mask_id) == (0, 1, 2, 3, 4)
    assert bert.bos_id is None and bert.eos_id is None
    assert gpt.eos_id == gpt.bos_id == 0 and gpt.pad_id == 1 and gpt.unk_id is None
    assert gpt.encode("<|im_start|>a")[0] == gpt.token_to_id("<|im_start|>")
    assert (t5.pad_id, t5.eos_id, t5.unk_id, t5.mask_id) == (0, 1, 2, None)
    assert t5.encode("a", add_special=True)[-1] == t5.eos_id


def test_sentinels_count_down_to_the_last_id_as_in_t5(trained):
    t5 = trained["unigram"]
    assert t5.sentinel_ids.tolist() == list(range(t5.vocab_size - 1, t5.vocab_size - 101, -1))
    assert len(trained["wordpiece_t5"].sentinel_ids) == 5
    assert len(trained["bpe"].sentinel_ids) == 0
    assert trained["wordpiece_t5"].encode("<extra_id_0>").tolist() == [trained["wordpiece_t5"].sentinel_ids[0]]


def test_byte_fallback_leaves_nothing_unknown(trained):
    tokenizer = trained["unigram_bytes"]
    text = "日本語 \U0001f600 ü"
    assert tokenizer.unk_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("bpe", {"alphabet": 10}),
        ("bpe", {"byte_fallback": True}),
        ("wordpiece", {"pattern": "gpt2"}),
        ("wordpiece", {"specials": "gpt"}),
        ("unigram", {"min_frequency": 5}),
        ("unigram", {"specials": "bert"}),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(kind, fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        TokenizerConfig(kind=kind, **fields)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_no_text_is_an_error(kind):
    with pytest.raises(RonnaError, match="no text"):
        train_tokenizer(iter(["", ""]), TokenizerConfig(kind=kind))


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_lone_surrogate_is_an_error(kind):
    with pytest.raises(RonnaError, match=r"text 2: half of a surrogate pair .* at character 1"):
        train_tokenizer(iter(["fine", "", "a\ud800"]), TokenizerConfig(kind=kind))


def test_vocabulary_smaller_than_the_alphabet_is_an_error():
    characters = "".join(chr(0x4E00 + i) for i in range(400))
    for config in (
        TokenizerConfig(kind="wordpiece", vocab=300),
        TokenizerConfig(kind="unigram", vocab=300, sentinels=0),
        TokenizerConfig(kind="bpe", vocab=300, sentinels=100),
    ):
        with pytest.raises(RonnaError, match=r"fix: (set|raise) vocab"):
            train_tokenizer([characters], config)
