"""What pre-training has before there is a model to train: the rows, the objective, and the shape of the model."""

from dataclasses import dataclass, replace
from pathlib import Path

from ronna.base.errors import RonnaError
from ronna.base.hub import local_folder
from ronna.data.shards import Shards
from ronna.model.config import Classifier, Model
from ronna.model.families import Family, preset, read_config
from ronna.objectives.clm import CausalLM, CLMConfig
from ronna.objectives.denoise import Denoise
from ronna.objectives.documents import PackedDocuments
from ronna.objectives.mlm import MaskedLM, MLMConfig, Vocabulary
from ronna.runfile import ModelConfig, PretrainRun
from ronna.text.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Packed:
    """loads: whether the weights come from `folder`, else they are new."""

    folder: Path
    loads: bool
    family: Family
    cfg: Model
    tokenizer: Tokenizer
    shards: Shards
    objective: MaskedLM | CausalLM | Denoise
    rows: PackedDocuments


def read_packed(run: PretrainRun) -> Packed:
    """Raises RonnaError where shards, tokenizer, objective and model do not go together."""
    if run.train.batch_tokens is not None:
        fix = "leave it out: batch rows of length tokens are a step"
        raise RonnaError("rows of pre-training are of one length", where="train.batch_tokens", fix=fix)
    shards = Shards(Path(run.data.train))
    shards.verify()  # a flipped bit in the data is as bad as one in a checkpoint, and cheaper to find now
    tokenizer = shards_tokenizer(shards, run.data.train)
    objective = build_objective(run, tokenizer, shards)
    folder = local_folder(run.model.name)
    family, cfg = architecture(run.model, folder, tokenizer)
    nsp = isinstance(run.objective, MLMConfig) and run.objective.nsp
    cfg = replace(cfg, classifier=Classifier(2, "first", "tanh") if nsp else None)
    if cfg.embedding.vocab < tokenizer.vocab_size:
        raise RonnaError(
            f"the model has {cfg.embedding.vocab} token embeddings, the tokenizer {tokenizer.vocab_size} tokens",
            where=run.model.name,
            fix="use the model's own tokenizer, or start from a preset",
        )
    if cfg.max_length is not None and run.train.length > cfg.max_length:
        raise RonnaError(
            f"rows of {run.train.length} tokens are longer than the {cfg.max_length} positions of {run.model.name}",
            where="train.length",
            fix=f"at most {cfg.max_length}",
        )
    rows = PackedDocuments(shards, run.train.length, objective.overhead)
    loads = folder.is_dir() and not run.model.scratch
    return Packed(folder, loads, family, cfg, tokenizer, shards, objective, rows)


def shards_tokenizer(shards: Shards, folder: str) -> Tokenizer:
    """The tokenizer that `prepare` laid beside the shards, which must be the one they were made with."""
    tokenizer = load_tokenizer(Path(folder) / "tokenizer")
    if tokenizer.hash != shards.manifest.identity.tokenizer_hash:
        raise RonnaError(
            "the tokenizer beside these shards is not the one they were made with",
            where=f"{folder}/tokenizer",
            fix="put it back, or run `ronna prepare` again",
        )
    return tokenizer


def build_objective(run: PretrainRun, tokenizer: Tokenizer, shards: Shards) -> MaskedLM | CausalLM | Denoise:
    def need(role: str, found: int | None) -> int:
        if found is None:
            kinds = {"cls": "wordpiece", "sep": "wordpiece", "mask": "wordpiece"}
            raise RonnaError(
                f"objective {run.objective.kind} needs a {role} token, which this tokenizer lacks",
                where=f"{run.data.train}/tokenizer",
                fix=f"train one: ronna tokenizer train --kind {kinds.get(role, 'bpe')}",
            )
        return found

    if isinstance(run.objective, MLMConfig):
        vocabulary = Vocabulary(
            size=tokenizer.vocab_size,
            cls=need("cls", tokenizer.cls_id),
            sep=need("sep", tokenizer.sep_id),
            mask=need("mask", tokenizer.mask_id),
            special=tokenizer.is_special,
            continues_word=tokenizer.continues_word,
            ends_sentence=tokenizer.ends_sentence,
        )
        return MaskedLM(run.objective, vocabulary, shards)
    eos = need("eos", tokenizer.eos_id)
    if isinstance(run.objective, CLMConfig):
        return CausalLM(eos if tokenizer.bos_id is None else tokenizer.bos_id, eos)
    sentinels = tuple(tokenizer.sentinel_ids.tolist())
    if not sentinels:
        need("sentinel (<extra_id_0>)", None)
    return Denoise(run.objective, sentinels, need("pad", tokenizer.pad_id), eos)


def architecture(config: ModelConfig, folder: Path, tokenizer: Tokenizer) -> tuple[Family, Model]:
    """The shape of a folder, or of a preset with the tokenizer's vocabulary."""
    if folder.is_dir():
        refuse_settings(config)
        return read_config(folder)
    return preset(config.name, vocab_size=tokenizer.vocab_size, **config.settings)


def refuse_settings(config: ModelConfig) -> None:
    if config.settings:
        fix = "leave them out, or start from a preset"
        raise RonnaError("a folder's shape is its own", where="model.settings", fix=fix)
