"""What every test shares: no network, reproducible examples, the way to the real data."""

import os
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# Set before transformers is imported anywhere: a test that reaches for the network fails at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What was measured of this machine, and what runs took, is the user's: tests neither read it nor add to it.
CACHE = tempfile.TemporaryDirectory(prefix="ronna-cache-")
os.environ["XDG_CACHE_HOME"] = CACHE.name
settings.register_profile("ronna", derandomize=True, database=None, deadline=None, max_examples=50)
settings.load_profile("ronna")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets beside the checkout; the test is skipped where there is none."""
    folder = Path(os.environ.get("RONNA_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("needs the real data sets: set RONNA_TEST_DATA to their folder")
    return folder


WORDS = "the film was good bad great awful a plot with acting and music dull bright story never always fun".split()


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT folder of a few thousand random weights with its own small tokenizer."""
    from ronna.model.families import preset
    from ronna.model.folder import save_folder
    from ronna.model.init import build
    from ronna.text.tokenizer import TokenizerConfig, train_tokenizer

    folder = tmp_path_factory.mktemp("tiny-bert")
    tokenizer = train_tokenizer([" ".join(WORDS)] * 5, TokenizerConfig(kind="wordpiece", vocab=300, lowercase=True))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    family, cfg = preset("bert-tiny", vocab_size=tokenizer.vocab_size, max_position_embeddings=64, **sizes)
    save_folder(build(cfg, seed=0), family, folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 folder of a few thousand random weights with its own small tokenizer."""
    from ronna.model.families import preset
    from ronna.model.folder import save_folder
    from ronna.model.init import build
    from ronna.text.tokenizer import TokenizerConfig, train_tokenizer

    folder = tmp_path_factory.mktemp("tiny-gpt")
    tokenizer = train_tokenizer([" ".join(WORDS)] * 5, TokenizerConfig(kind="bpe", vocab=300))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    family, cfg = preset("gpt2-tiny", vocab_size=tokenizer.vocab_size, max_position_embeddings=64, **sizes)
    save_folder(build(cfg, seed=0), family, folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 folder of a few thousand random weights with its own small tokenizer."""
    from ronna.model.families import preset
    from ronna.model.folder import save_folder
    from ronna.model.init import build
    from ronna.text.tokenizer import TokenizerConfig, train_tokenizer

    folder = tmp_path_factory.mktemp("tiny-t5")
    config = TokenizerConfig(kind="bpe", specials="t5", sentinels=0, vocab=300)
    tokenizer = train_tokenizer([" ".join(WORDS)] * 5, config)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "d_kv": 16, "d_ff": 64}
    family, cfg = preset("t5-tiny", vocab_size=tokenizer.vocab_size, **sizes)
    save_folder(build(cfg, seed=0), family, folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Token shards of a little text, one folder per kind of tokenizer."""
    from ronna.runfile import PrepareRun, TokenizerRun
    from ronna.text.training import TokenizerConfig
    from ronna.verbs.prepare import prepare, train_tokenizer_run

    root = tmp_path_factory.mktemp("shards")
    words = "the cat dog sat ran on under a mat tree and then slept . it was warm cold bright dark !".split()
    rng = random.Random(0)
    lines = [" ".join(rng.choices(words, k=rng.randint(20, 120))) for _ in range(60)]
    (root / "text.txt").write_text("\n\n".join(lines), encoding="utf-8")
    made = {}
    for kind in ("wordpiece", "bpe", "unigram"):
        config = TokenizerConfig(kind=kind, vocab=400)
        train_tokenizer_run(TokenizerRun(out=f"{root}/{kind}", input=(f"{root}/text.txt",), tokenizer=config))
        prepare(PrepareRun(out=f"{root}/{kind}-shards", input=(f"{root}/text.txt",), tokenizer=f"{root}/{kind}"))
        made[kind] = root / f"{kind}-shards" / "train"
    return made
