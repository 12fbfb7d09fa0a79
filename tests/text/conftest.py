"""A small corpus of English, Chinese and code, and one trained tokenizer of each kind."""

import pytest

from ronna.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

ENGLISH = [
    f"The {a} {b} saw {n} small boats near the harbour, and it wasn't surprised. Was the {b} right?"
    for n, a in enumerate(("old", "young", "tired", "clever", "unhappy", "quickest"))
    for b in ("sailor", "teacher", "painter", "walker", "builder", "runner")
]
CHINESE = [
    f"{who}今天在{where}看到了{n}条小船，天气很好。你喜欢{where}吗？我们明天再去！"
    for n, who in enumerate(("老师", "学生", "船长", "画家", "工人", "朋友"))
    for where in ("海边", "公园", "学校", "河边", "城里")
]
CODE = [f"def f_{n}(x):\n    return {{'a': x ** {n}}}\n\n" for n in range(20)]
CORPUS = [*ENGLISH, *CHINESE, *CODE]

CONFIGS = {
    "wordpiece": TokenizerConfig(kind="wordpiece", vocab=600, min_frequency=1, lowercase=True),
    "wordpiece_t5": TokenizerConfig(kind="wordpiece", specials="t5", sentinels=5, vocab=500),
    "bpe": TokenizerConfig(kind="bpe", vocab=600, extra_special=("<|im_start|>", "<|im_end|>")),
    "bpe_gpt2": TokenizerConfig(kind="bpe", vocab=500, pattern="gpt2", max_length=64),
    "bpe_bert": TokenizerConfig(kind="bpe", vocab=500, specials="bert", lowercase=True, sentinels=3),
    "unigram": TokenizerConfig(kind="unigram", vocab=500, max_length=512),
    "unigram_bytes": TokenizerConfig(kind="unigram", vocab=600, byte_fallback=True, sentinels=4),
}


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return CORPUS


@pytest.fixture(scope="session")
def trained() -> dict[str, Tokenizer]:
    return {name: train_tokenizer(CORPUS, config) for name, config in CONFIGS.items()}
