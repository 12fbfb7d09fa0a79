"""What tests of tasks share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def marked_bert(tmp_path_factory) -> Path:
    """Like `tiny_bert`, with a tokenizer that has marks to put around entities."""
    from ronna.model.families import preset
    from ronna.model.folder import save_folder
    from ronna.model.init import build
    from ronna.text.tokenizer import TokenizerConfig, train_tokenizer

    folder = tmp_path_factory.mktemp("marks")
    words = "the film was good bad great awful a plot with acting and music @ # made by in of".split()
    tokenizer = train_tokenizer([" ".join(words)] * 5, TokenizerConfig(kind="wordpiece", vocab=300, lowercase=True))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    family, cfg = preset("bert-tiny", vocab_size=tokenizer.vocab_size, max_position_embeddings=64, **sizes)
    save_folder(build(cfg, seed=0), family, folder)
    tokenizer.save(folder)
    return folder
