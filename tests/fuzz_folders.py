"""Broken folders by the thousand: does loading a model, an adapter or a tokenizer ever end in anything but one or a
RonnaError?

    python -m tests.fuzz_folders [KIND ...] [--seconds 600] [--seed 0]

Each try damages some values of a JSON file in a sound folder, as `fuzz_rows` does with records, and loads the folder.
An uncaught exception is printed with the seed that makes the file again, and the exit code is 1. The seconds are of
processor time, for each kind.
"""

import json
import random
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import torch
from pydantic import TypeAdapter

from ronna.base.errors import RonnaError
from ronna.model.families import preset
from ronna.model.folder import load_folder, save_folder
from ronna.model.init import build
from ronna.peft.files import CONFIG, read_adapter
from ronna.peft.folder import attach_adapter, write_adapter
from ronna.peft.methods import PeftConfig, adapt
from ronna.text.tokenizer import load_tokenizer

from .fuzz import command, tries
from .fuzz_rows import damaged, models

PRESETS = ("bert-tiny", "roberta-base", "gpt2-tiny", "llama-tiny", "t5-tiny", "modernbert-tiny", "transformer-tiny")
METHODS = (
    {"kind": "lora", "rank": 2},
    {"kind": "lora", "rank": 2, "dora": True},
    {"kind": "prompt", "tokens": 2},
    {"kind": "prefix", "tokens": 2},
    {"kind": "prefix", "tokens": 2, "hidden": 4},
    {"kind": "houlsby", "size": 4},
    {"kind": "bitfit"},
    {"kind": "adalora"},
)
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}

Case = tuple[Path, Callable[[], object]]  # a JSON file, and what reads it


def model_cases(root: Path) -> Iterator[Case]:
    for name in PRESETS:
        sizes = SMALL if name == "roberta-base" else {}
        family, cfg = preset(name, vocab_size=64, **sizes)
        save_folder(build(cfg, seed=0), family, root / name)
        yield root / name / "config.json", lambda folder=root / name: load_folder(folder)


def adapter_cases(root: Path) -> Iterator[Case]:
    family, cfg = preset("bert-tiny", vocab_size=64, **SMALL)
    base = build(cfg, seed=0)
    for i, method in enumerate(METHODS):
        model, config, folder = deepcopy(base), TypeAdapter(PeftConfig).validate_python(method), root / str(i)
        adapt(model, config)
        write_adapter(model, family, folder, config, "base")
        if method["kind"] == "lora":
            settings = json.loads((folder / CONFIG).read_text())
            (folder / CONFIG).write_text(json.dumps(settings | {"alpha_pattern": {"query": 4, "k.*": 2}}))
        yield folder / CONFIG, lambda folder=folder: attach_adapter(deepcopy(base), family, read_adapter(folder))


def tokenizer_cases(root: Path) -> Iterator[Case]:
    def read(folder: Path) -> None:
        tokenizer = load_tokenizer(folder)
        tokenizer.encode("was it good", add_special=True)
        tokenizer.encode_with_offsets(["字 and @"], ["a film"])

    for folder in models(root).values():
        added = {"7": {"content": "<new>", "special": True, "lstrip": False}}
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": added}))
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            yield folder / name, lambda folder=folder: read(folder)


KINDS = {"model": model_cases, "adapter": adapter_cases, "tokenizer": tokenizer_cases}


def attempt(load: Callable[[], object]) -> str:
    """What loading came to: `loaded`, `refused`, or what was wrong with it."""
    try:
        load()
    except RonnaError:
        return "refused"
    except KeyboardInterrupt:
        raise
    except BaseException:  # panics of Rust are no Exception
        return traceback.format_exc()
    return "loaded"


def fuzz(kind: str, seconds: float, seed: int, folder: Path) -> Counter[str]:
    cases = list(KINDS[kind](folder / kind))
    sound = {path: path.read_text(encoding="utf-8") for path, _ in cases}

    def once(rng: random.Random) -> str:
        path, load = rng.choice(cases)
        [broken] = damaged([json.loads(sound[path])], rng)
        path.write_text(json.dumps(broken), encoding="utf-8")
        outcome = attempt(load)
        path.write_text(sound[path], encoding="utf-8")
        return outcome

    return tries(once, kind, seconds, seed, expected={"loaded", "refused"})


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(command(str(__doc__), KINDS, fuzz))
