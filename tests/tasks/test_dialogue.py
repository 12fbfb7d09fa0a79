"""Dialogues: every layout, loss on what the assistant says alone, one template for training and use."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import ronna
from ronna.base.errors import RonnaError
from ronna.cli import main
from ronna.data.badrows import BadRow
from ronna.data.sources import Record
from ronna.labelled import hold_out
from ronna.model.families import preset, read_config
from ronna.model.folder import load_folder, save_folder
from ronna.model.init import build
from ronna.objectives.base import collate
from ronna.tasks.conversation import Conversation
from ronna.tasks.dialogue import Dialogue, DialogueConfig
from ronna.text.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer

ASKED = {"role": "user", "content": "was the film good"}
TOLD = {"role": "assistant", "content": "the plot was bad"}
AGAIN = {"role": "user", "content": "and the music"}
MORE = {"role": "assistant", "content": "dull"}
SYSTEM = {"role": "system", "content": "always fun"}


def record(**fields) -> Record:
    return Record(fields, Path("f"), 1)


def read(labelled: bool = True, **fields) -> Conversation:
    columns = Dialogue.columns(record(**fields), text=None, pair=None, label=None, labelled=labelled)
    return Dialogue.row(record(**fields), columns if labelled else columns._replace(label=None))


def task(folder: Path, length: int = 256, **config) -> Dialogue:
    own = DialogueConfig(**config)
    return Dialogue.learn(own, [], load_tokenizer(folder), length).on(read_config(folder)[1], {})


@pytest.fixture(scope="module")
def tiny_chat(tmp_path_factory) -> Path:
    """A Llama folder of a few thousand random weights, whose tokenizer has ChatML's marks."""
    folder = tmp_path_factory.mktemp("tiny-chat")
    texts = [
        "was the film good",
        "the plot was bad",
        "and the music dull bright story always fun user assistant system",
    ]
    config = TokenizerConfig(kind="bpe", vocab=300, extra_special=("<|im_start|>", "<|im_end|>"))
    tokenizer = train_tokenizer(texts * 5, config)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    family, cfg = preset("llama-tiny", vocab_size=tokenizer.vocab_size, **sizes, num_key_value_heads=2)
    save_folder(build(cfg, seed=0), family, folder)
    tokenizer.save(folder)
    return folder


# Layouts


def test_every_layout_is_the_same_conversation():
    plain = (ASKED, TOLD)
    asked, told = ASKED["content"], TOLD["content"]
    rows = [
        read(messages=[ASKED, TOLD]),
        read(messages=[ASKED, {"role": "assistant", "content": [{"type": "text", "text": told}]}]),
        read(conversations=[{"from": "human", "value": asked}, {"from": "gpt", "value": told}]),
        read(dialog=[asked, told, "and what nobody answered"]),
        read(instruction=asked, input="", output=told),
        read(prompt=asked, completion=told),
        read(question=asked, answer=told),
        read(prompt=[ASKED], completion=[TOLD]),
        read(prompt=[ASKED], chosen=[ASKED, TOLD]),
    ]
    assert all(row == Conversation(plain, True) for row in rows)
    assert rows[0].label == told and asked in rows[0].key and told not in rows[0].key
    kept, held = hold_out([read(prompt=f"{asked} {i}", completion=told) for i in range(200)])
    assert 10 < len(held) < 40 and len(kept) + len(held) == 200
    assert read(instruction=asked, input="a b", output=told).messages[0]["content"] == f"{asked}\n\na b"
    assert read(system="always fun", prompt=asked, response=told).messages == (SYSTEM, *plain)


def test_what_is_to_be_answered_has_no_answer_yet():
    assert read(labelled=False, messages=[ASKED, TOLD, AGAIN, MORE]) == Conversation((ASKED, TOLD, AGAIN), False)
    assert read(labelled=False, instruction="was the film good", output="x") == Conversation((ASKED,), False)
    assert read(labelled=False, prompt="was the film good") == Conversation((ASKED,), False)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"messages": [ASKED]}, "no assistant turn"),
        ({"messages": []}, "no message"),
        ({"messages": [ASKED, {"role": "wizard", "content": "x"}]}, "unknown role"),
        ({"messages": [ASKED, {"role": "assistant", "content": None}]}, "message is not a text"),
        ({"messages": [ASKED, {"role": "assistant", "content": " "}]}, "empty message"),
        ({"messages": [ASKED, 7]}, "message is not an object"),
        ({"messages": [ASKED, {"role": "assistant", "content": [{"type": "image"}]}]}, "message is not a text"),
        ({"instruction": 3, "output": "x"}, "prompt is not a text"),
        ({"instruction": "x", "output": None}, "message is not a text"),
    ],
)
def test_bad_rows_say_why(fields, reason):
    with pytest.raises(BadRow) as error:
        read(**fields)
    assert error.value.reason == reason


def test_columns_that_are_no_conversation_are_refused():
    for fields in ({"a": "b"}, {"instruction": "x"}):
        with pytest.raises(RonnaError, match="no column looks like"):
            read(**fields)


# What is learnt


def learnt(own: Dialogue, example) -> str:
    return own.tokenizer.decode(example.sample.labels, skip_special=False)


@pytest.mark.parametrize("folder", ["tiny_chat", "tiny_gpt"])
def test_only_what_the_assistant_says_and_its_end_is_learnt(folder, request):
    own = task(request.getfixturevalue(folder))
    end = own.tokenizer.tokens[own.ends.eos[0]]
    example = own.encode([Conversation((SYSTEM, ASKED, TOLD, AGAIN, MORE), True)])[0]
    assert learnt(own, example) == f"the plot was bad{end}dull{end}"
    sample = example.sample
    assert (sample.tokens[sample.predict[:-1] + 1] == sample.labels[:-1]).all()
    last = task(request.getfixturevalue(folder), turns="last").encode([Conversation((ASKED, TOLD, AGAIN, MORE), True)])
    assert learnt(own, last[0]) == f"dull{end}"


@pytest.mark.parametrize("folder", ["tiny_chat", "tiny_gpt"])
def test_tokens_at_training_are_tokens_at_use_and_those_of_transformers(folder, request, tmp_path):
    own = task(request.getfixturevalue(folder), system="always fun")
    trained = own.encode([Conversation((ASKED, TOLD, AGAIN, MORE), True)])[0]
    asked = own.encode([Conversation((ASKED, TOLD, AGAIN), False)])[0]
    n = len(asked.prompt)
    assert (trained.prompt == asked.prompt).all() and (trained.sample.tokens[:n] == asked.prompt).all()
    own.tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(Path(request.getfixturevalue(folder), "config.json").read_text())
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    messages = [SYSTEM, ASKED, TOLD, AGAIN, MORE]
    prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert prompt == asked.prompt.tolist()
    whole = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = np.array(whole["input_ids"]), np.array(whole["assistant_masks"], bool)
    assert (ids[mask] == trained.sample.labels).all()
    assert (ids[: len(trained.sample.tokens)] == trained.sample.tokens).all()


def test_a_token_over_the_edge_of_an_answer_is_cut_the_same_way_at_use(tiny_gpt, tmp_path):
    """A template that runs question and answer together, with a tokenizer that would merge over the border."""
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    own = task(tiny_gpt, template=str(tmp_path / "t.jinja"))
    word = max((w for w in own.tokenizer.tokens if w.isalpha() and w.isascii()), key=len)
    asked, told = {"role": "user", "content": word[:-1]}, {"role": "assistant", "content": f"{word[-1]} was good"}
    trained, used = own.encode([Conversation((asked, told), True), Conversation((asked,), False)])
    whole = own.tokenizer.encode(f"{word} was good").tolist()
    assert whole[: len(used.prompt)] != used.prompt.tolist()  # the border does cut a token
    assert (trained.prompt == used.prompt).all() and learnt(own, trained) == f"{word[-1]} was good<|endoftext|>"
    two = (asked, told, asked)
    trained, used = own.encode([Conversation((*two, told), True), Conversation(two, False)])
    assert (trained.prompt == used.prompt).all()


def test_packed_conversations_do_not_see_each_other(tiny_chat):
    own = task(tiny_chat)
    model = load_folder(tiny_chat).model.double()
    model.compute = torch.float64
    rows = [Conversation((ASKED, TOLD), True), Conversation((AGAIN, MORE), True), Conversation((ASKED, MORE), True)]
    samples = [e.sample for e in own.encode(rows)]
    together = own.loss(model, collate(own, samples)).sums["dialogue"]
    apart = sum(own.loss(model, collate(own, [s])).sums["dialogue"] for s in samples)
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=0)
    changed = own.encode([Conversation((AGAIN, TOLD), True)])[0].sample
    first = own.loss(model, collate(own, [changed, samples[2]])).sums["dialogue"]
    second = own.loss(model, collate(own, [samples[1], samples[2]])).sums["dialogue"]
    alone = [own.loss(model, collate(own, [s])).sums["dialogue"] for s in (changed, samples[1])]
    torch.testing.assert_close(first - alone[0], second - alone[1], rtol=1e-10, atol=1e-12)


# Too long, and refused


def test_the_oldest_turns_go_and_answers_are_never_cut(tiny_chat):
    long = Conversation((SYSTEM, ASKED, TOLD, AGAIN, MORE, ASKED, TOLD), True)
    whole = task(tiny_chat).encode([long])[0]
    short = len(task(tiny_chat).encode([Conversation((SYSTEM, ASKED, TOLD), True)])[0].sample.tokens) + 6
    account: dict[str, int] = {}
    cut = task(tiny_chat, length=short).encode([long], account)[0]
    assert account == {"cut": 1, "answers that do not fit": 0}
    assert learnt(task(tiny_chat), cut) == "the plot was bad<|im_end|>" and len(cut.sample.tokens) < short
    text = task(tiny_chat).tokenizer.decode(cut.sample.tokens, skip_special=False)
    assert text.startswith("<|im_start|>system\nalways fun") and whole.sample is not None
    lost = task(tiny_chat, length=16).encode([long], account := {})[0]
    assert lost.sample is None and account["answers that do not fit"] == 1
    drops = task(tiny_chat, length=short, truncation="drop")
    account = {}
    assert drops.encode([long], account, training=True) == [] and account == {"dropped": 1}
    assert drops.encode([long], account)[0].sample is not None and account["cut"] == 1
    with pytest.raises(RonnaError, match="too long"):
        task(tiny_chat, length=short, truncation="refuse").encode([long])


def test_a_prompt_that_fills_the_model_gets_no_answer_and_others_get_theirs(tiny_chat):
    model, own = load_folder(tiny_chat).model, task(tiny_chat, decoding={"max_tokens": 4})
    rows = own.rows(["was the film good", "the plot was bad " * 400, "and the music"], None)
    made = own.infer(model, own.encode(rows)).made
    assert (made[1].text, made[1].finish) == ("", "length")
    assert made[0] == own.infer(model, own.encode(rows[:1])).made[0] and made[2].tokens
    with pytest.raises(RonnaError, match="but the model reads 512 at most"):
        own.write(model, own.prompts(["the plot was bad " * 400]))


def test_a_template_without_an_end_is_refused(tiny_gpt, tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(RonnaError, match="no special token"):
        task(tiny_gpt, template=str(tmp_path / "t.jinja")).encode([Conversation((ASKED, TOLD), True)])
    with pytest.raises(RonnaError, match=r"missing\.jinja"):
        task(tiny_gpt, template=str(tmp_path / "missing.jinja"))


def test_models_and_tokenizers_that_cannot_converse_are_refused(tiny_bert, tiny_t5):
    with pytest.raises(RonnaError, match="needs a model with a decoder"):
        task(tiny_bert)
    with pytest.raises(RonnaError, match="no conversation to continue"):
        task(tiny_t5)


def test_nothing_to_learn_is_refused(tiny_chat, tmp_path):
    rows = [json.dumps({"messages": [ASKED, {"role": "assistant", "content": "bad " * 80}]})] * 2
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / "validation.jsonl").write_text(json.dumps({"messages": [AGAIN, MORE]}))
    with pytest.raises(RonnaError, match="anything to learn"):
        ronna.finetune(out=str(tmp_path / "o"), model={"name": str(tiny_chat)}, data={"train": str(tmp_path)},
                       task={"kind": "dialogue"}, train={"length": 32})  # fmt: skip


# A run


def test_a_small_model_learns_to_answer_and_to_stop(tiny_chat, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    rows = [[ASKED, TOLD, AGAIN, MORE], [AGAIN, {"role": "assistant", "content": "bright"}]]
    lines = [json.dumps({"messages": m}) for m in rows]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    flags = ["--model", str(tiny_chat), "--train", str(tmp_path), "--out", str(tmp_path / "o"), "--lr", "1e-2"]
    flags += ["--allow-overlap", "--set", "train.steps=60", "--precision", "fp32"]
    assert main(["finetune", "--task", "dialogue", *flags]) == 0
    shown = capsys.readouterr().err
    assert "[[the plot was bad<|im_end|>]]" in shown and "[[was the film good" not in shown
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert report["test"]["perplexity"]["value"] < 1.1 and report["data"]["cut"] == 0
    folder = str(tmp_path / "o" / "model")
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"messages": m[:-1]}) for m in rows))
    out = tmp_path / "out.jsonl"
    assert main(["predict", "--model", folder, "--input", str(tmp_path / "in.jsonl"), "--output", str(out)]) == 0
    said = [json.loads(line)["prediction"] for line in out.read_text().splitlines()]
    assert [(s["text"], s["finish"]) for s in said] == [("dull", "eos"), ("bright", "eos")]
    assert main(["generate", "--model", folder, "--prompt", "and the music"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "bright"
    loaded = ronna.load(folder)
    assert loaded.predict([rows[0][:-1], "and the music"])[0]["text"] == "dull"
    assert [g.text for g in loaded.generate([rows[0][:-1], "and the music"])] == ["dull", "bright"]
    with pytest.raises(RonnaError, match="conversation 0: unknown role"):
        loaded.generate([[{"role": "wizard", "content": "x"}]])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(rows[0][:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**ids, max_new_tokens=20)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(made, skip_special_tokens=True) == "dull"
    # Plain text is still measured as text.
    (tmp_path / "plain.jsonl").write_text(json.dumps({"text": "the film was good"}))
    assert main(["evaluate", "--model", folder, "--data", str(tmp_path / "plain.jsonl"), "--json"]) == 0
    assert "bits_per_byte" in json.loads(capsys.readouterr().out.splitlines()[-1])["test"]
