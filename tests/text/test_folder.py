"""Folders: what we write, transformers reads with the same ids; what others wrote, we read as they do."""

import json
import shutil

import numpy as np
import pytest

from ronna.base.errors import RonnaError
from ronna.text.engine import SAMPLES
from ronna.text.tokenizer import load_tokenizer, train_tokenizer

from .conftest import CONFIGS, CORPUS

TEXTS = [*SAMPLES, *CORPUS[::7]]
ROLES = ("pad", "bos", "eos", "cls", "sep", "mask", "unk")


def assert_same_as_transformers(folder, tokenizer):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    for add_special in (False, True):
        expected = theirs(TEXTS, add_special_tokens=add_special)["input_ids"]
        assert [row.tolist() for row in tokenizer.encode_batch(TEXTS, add_special)] == expected
    return theirs


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_what_we_save(trained, tmp_path, name):
    tokenizer = trained[name].with_special(["<e1>"]).with_chat_template("{{ messages[0].content }}!")
    tokenizer.save(tmp_path)
    theirs = assert_same_as_transformers(tmp_path, tokenizer)
    assert len(theirs) == tokenizer.vocab_size
    named = [r for r in ROLES if getattr(tokenizer, f"{r}_id") is not None]
    assert [getattr(theirs, f"{r}_token_id") for r in named] == [getattr(tokenizer, f"{r}_id") for r in named]
    assert theirs("<e1>", add_special_tokens=False)["input_ids"] == [tokenizer.token_to_id("<e1>")]
    assert theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    if tokenizer.max_length is not None:
        assert theirs.model_max_length == tokenizer.max_length
    pair = theirs("the boat", "天气")
    ours = tokenizer.encode_with_offsets(["the boat"], ["天气"])[0]
    assert pair["input_ids"] == ours.ids.tolist()
    assert pair.get("token_type_ids", ours.segments.tolist()) == ours.segments.tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load_changes_nothing(trained, tmp_path, name):
    before = trained[name].with_chat_template("{{ x }}")
    before.save(tmp_path / "a")
    after = load_tokenizer(tmp_path / "a")
    after.save(tmp_path / "b")
    assert after.hash == before.hash and after.chat_template == "{{ x }}"
    assert after.parts.roles == before.parts.roles and after.max_length == before.max_length
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    only_file = load_tokenizer(tmp_path / "a" / "tokenizer.json")
    assert only_file.hash == before.hash


def test_bare_tokenizer_json_knows_common_names(trained, tmp_path):
    trained["wordpiece"].save(tmp_path / "a")
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "tokenizer.json", tmp_path / "b")
    assert load_tokenizer(tmp_path / "b").parts.roles == trained["wordpiece"].parts.roles


def test_vocab_txt(trained, tmp_path):
    tokens = trained["wordpiece"].tokens
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.tokens == tokens
    for row, expected in zip(tokenizer.encode_batch(TEXTS), trained["wordpiece"].encode_batch(TEXTS), strict=True):
        assert np.array_equal(row, expected)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false, "model_max_length": 40}')
    cased = load_tokenizer(tmp_path)
    assert cased.unk_id in cased.encode("The") and cased.max_length == 40


def write_vocab_and_merges(tokenizer, folder, special=()):
    model = json.loads(tokenizer.parts.backend.to_str())["model"]
    vocab = model["vocab"] | {token: len(model["vocab"]) + n for n, token in enumerate(special)}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "RobertaTokenizer", "Qwen2Tokenizer"])
def test_vocab_json_and_merges(trained, tmp_path, kind):
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if kind == "RobertaTokenizer" else []
    write_vocab_and_merges(trained["bpe_gpt2"], tmp_path, special)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    tokenizer = load_tokenizer(tmp_path)
    assert_same_as_transformers(tmp_path, tokenizer)
    tokenizer.save(tmp_path / "saved")
    assert_same_as_transformers(tmp_path / "saved", tokenizer)


def test_special_tokens_that_only_the_config_names(trained, tmp_path):
    trained["bpe"].save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {
        "pad_token": {"content": "<new pad>", "__type": "AddedToken"},
        "eos_token": "<|im_end|>",
        "bos_token": None,
    }
    path.write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").unlink()
    tokenizer = load_tokenizer(tmp_path)
    theirs = assert_same_as_transformers(tmp_path, tokenizer)
    assert tokenizer.pad_id == theirs.pad_token_id == trained["bpe"].vocab_size
    assert tokenizer.eos_id == theirs.eos_token_id == tokenizer.token_to_id("<|im_end|>")
    assert tokenizer.bos_id is None and tokenizer.is_special[tokenizer.pad_id]


def test_add_bos_token_counts_only_without_a_template(trained, tmp_path):
    write_vocab_and_merges(trained["bpe_gpt2"], tmp_path)
    ends = {"add_bos_token": True, "add_eos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **ends}))
    tokenizer = load_tokenizer(tmp_path)
    assert_same_as_transformers(tmp_path, tokenizer)
    trained["bpe"].save(tmp_path / "json")
    path = tmp_path / "json" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **ends}))
    assert_same_as_transformers(tmp_path / "json", load_tokenizer(tmp_path / "json"))
    assert tokenizer.encode("saw", add_special=True)[[0, -1]].tolist() == [tokenizer.bos_id, tokenizer.eos_id]


def test_chat_template_file_and_named_templates(trained, tmp_path):
    trained["bpe"].save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": named}))
    assert load_tokenizer(tmp_path).chat_template == "yes"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(tmp_path).chat_template == "from the file"


def test_code_beside_a_tokenizer_is_neither_run_nor_passed_on(trained, tmp_path):
    trained["bpe"].save(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {
        "tokenizer_class": "Evil",
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
    }
    path.write_text(json.dumps(config))
    load_tokenizer(tmp_path).save(tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no tokenizer"),
        ({"tokenizer.json": '{"model": {'}, r"tokenizer.json:1:12: not valid JSON"),
        ({"tokenizer.json": "{}"}, 'key "model" is missing'),
        ({"tokenizer.json": "[" * 100_000}, "not a JSON text file"),
        ({"tokenizer.json": '{"model": {"type": "Nonsense"}}'}, "refuses this tokenizer"),
        ({"tokenizer_config.json": "[]", "vocab.txt": "a"}, "expected a JSON object"),
        ({"tokenizer_config.json": '{"model_max_length": "long"}', "vocab.txt": "a"}, "model_max_length"),
        ({"tokenizer_config.json": '{"cls_token": ["[CLS]"]}', "vocab.txt": "a"}, "cls_token"),
        ({"tokenizer_config.json": '{"additional_special_tokens": 7}', "vocab.txt": "a"}, "additional_special_tokens"),
        ({"vocab.txt": "a\nb\n"}, r"lacks \[UNK\], \[CLS\], \[SEP\]"),
        ({"tokenizer.model": "x", "config.json": '{"model_type": "llama"}'}, r"tokenizer.model \(llama\)"),
        ({"spiece.model": "x", "config.json": '{"model_type": "t5"}'}, "not a sentencepiece Unigram model"),
        ({"vocab.json": "{}", "merges.txt": "a b\n"}, "do not belong together"),
        ({"vocab.json": "{}", "merges.txt": "", "config.json": '{"model_type": "clip"}'}, "vocab.json"),
    ],
)
def test_errors_say_what_and_where(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(RonnaError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in caught.value.where and caught.value.fix


def test_a_template_of_tokens_that_are_not_there_is_refused(trained, tmp_path):
    trained["wordpiece"].save(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["post_processor"]["special_tokens"] = {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(RonnaError, match="refuses this tokenizer"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_without_its_unknown_token_is_told(trained, tmp_path):
    trained["wordpiece"].save(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["model"]["unk_token"] = "<gone>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = load_tokenizer(tmp_path)
    for cut in (tokenizer.encode_batch, tokenizer.encode_with_offsets):
        with pytest.raises(RonnaError, match="cannot cut a text"):
            cut(["\u4e00\u263a"])


def test_added_tokens_may_be_written_as_objects(trained, tmp_path):
    trained["bpe"].save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    named = {"additional_special_tokens": [{"content": "<one>", "lstrip": False}]}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    more = load_tokenizer(tmp_path).with_special(["<two>"])
    assert more.parts.config["additional_special_tokens"] == ["<one>", "<two>"]
    assert more.token_to_id("<two>") == more.token_to_id("<one>") + 1


def test_paths_that_are_no_tokenizer(tmp_path):
    with pytest.raises(RonnaError, match="no such file"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(RonnaError, match="not a tokenizer file"):
        load_tokenizer(tmp_path / "model.bin")


def test_training_from_python_and_from_a_folder_agree(tmp_path):
    config = CONFIGS["bpe"]
    train_tokenizer(CORPUS, config).save(tmp_path)
    assert load_tokenizer(tmp_path).hash == train_tokenizer(CORPUS, config).hash
