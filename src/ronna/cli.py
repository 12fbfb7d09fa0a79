"""The command line: flags become keys of the verb's run file, and the verb runs. Imports nothing heavy for --help."""

import argparse
import difflib
import importlib
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from ronna import __version__
from ronna.base.errors import RonnaError

INTERRUPTED = 143  # 128 + SIGTERM: stopped as asked, all saved, not finished


NUMBER = "number"


class Flag(NamedTuple):
    """`key` is where the value goes in the run file; `nargs` "+" makes a list, "flag" a switch, NUMBER a number."""

    name: str
    key: str
    help: str
    nargs: str | None = None


class Verb(NamedTuple):
    """`config` (of `ronna.runfile`) and `run` are named, not imported; `file`: whether the verb takes a run file."""

    help: str
    config: str
    run: str
    flags: tuple[Flag, ...]
    file: bool = True


OUT = Flag("--out", "out", "folder to write")
SEED = Flag("--seed", "seed", "seed of everything random", NUMBER)
DEVICE = Flag("--device", "device", "auto, cpu, cuda, cuda:1, mps")
PRECISION = Flag("--precision", "precision", "auto, fp32, bf16")
QUANTIZE = Flag("--quantize", "quantize", "hold the weights of the blocks in 4 bits: nf4, nf4_double")
BAD_ROWS = Flag("--max-bad-rows", "max_bad_rows", "bad rows to set aside before giving up (default 0)", NUMBER)
TRAINING = (
    Flag("--lr", "optim.lr", "peak learning rate", NUMBER),
    Flag("--batch", "train.batch", "sequences or packed rows a step", NUMBER),
    Flag("--micro-batch", "train.micro_batch", "as many of them at a time", NUMBER),
    Flag("--length", "train.length", "tokens of a row or, fine-tuning, the most of a sequence", NUMBER),
    Flag("--precision", "train.precision", "auto, fp32, bf16"),
    Flag("--memory", "train.memory", "the most to hold, 6GiB: the planner chooses what saves memory"),
    Flag("--tensorboard", "track.tensorboard", "also log to TensorBoard", "flag"),
)
COLUMNS = (
    Flag("--text", "text", "column of the text"),
    Flag("--text-pair", "text_pair", "column of the second text"),
)
VERBS: dict[str, Verb] = {
    "plan": Verb(
        "what fits, how long it takes, and which is the largest model that does",
        "ronna.asked:PlanRun", "ronna.verbs.plan:plan",
        (Flag("--model", "model", "preset, model folder or run file"),
         Flag("--hardware", "hardware", "auto (this machine), cpu, gpu, or a card: h200, 4xa100-80gb"),
         Flag("--memory", "memory", "the most to use of each device: 24GiB"),
         Flag("--machine", "machine", "devices in one machine, where there are several (default 8)", NUMBER),
         Flag("--network", "network", "GB/s of each device to other machines", NUMBER),
         Flag("--task", "task", "mlm, clm, denoise, or a task of finetune"),
         Flag("--peft", "peft", "train an adapter alone: lora, adalora, houlsby, bitfit, prompt, prefix"),
         Flag("--rank", "rank", "of the adapter", NUMBER),
         Flag("--quantize", "quantize", "hold the weights under the adapter in 4 bits: nf4, nf4_double"),
         Flag("--batch", "batch", "sequences or packed rows a step (default 32)", NUMBER),
         Flag("--length", "length", "tokens of each (default 512)", NUMBER),
         Flag("--vocab", "vocab", "tokens of a preset's vocabulary", NUMBER),
         Flag("--tokenizer", "tokenizer", "folder of a preset's tokenizer"),
         Flag("--optim", "optim", "adamw, adam, sgd, muon, adafactor, adamw8bit, apollo"),
         Flag("--precision", "precision", "auto, fp32, bf16"),
         Flag("--tokens", "tokens", "to train on: how long does it take?", NUMBER),
         Flag("--hours", "hours", "to train for: how many tokens, and with --largest, which size?", NUMBER),
         Flag("--price", "price", "of an hour of a device", NUMBER),
         Flag("--largest", "largest", "the largest model of the preset's family that fits", "flag"),
         Flag("--exact", "exact", "only ways that change nothing but rounding", "flag"),
         Flag("--probe", "probe", "measure this machine first", "flag"),
         Flag("--write", "write", "a run file to write, with --data and --out"),
         Flag("--data", "data", "what it is to train on"), OUT), file=False,
    ),
    "data inspect": Verb(
        "what a data file is: format, fields, lengths, labels, bad rows, leaks between splits",
        "InspectRun", "ronna.verbs.inspect:inspect",
        (Flag("input", "input", "files or folders", "+"), Flag("--tokenizer", "tokenizer", "folder, to count tokens"),
         Flag("--text", "text", "column of the text"), Flag("--label", "label", "column of the label")), file=False,
    ),
    "tokenizer train": Verb(
        "train a tokenizer", "TokenizerRun", "ronna.verbs.prepare:train_tokenizer_run",
        (Flag("--input", "input", "files or folders of text", "+"), OUT,
         Flag("--kind", "tokenizer.kind", "wordpiece, bpe (byte-level), unigram"),
         Flag("--text", "text", "columns of the text", "+"),
         Flag("--vocab", "tokenizer.vocab", "number of tokens", NUMBER), BAD_ROWS),
    ),
    "prepare": Verb(
        "text -> clean, deduplicated, tokenized shards", "PrepareRun", "ronna.verbs.prepare:prepare",
        (Flag("--input", "input", "files or folders of text", "+"), OUT,
         Flag("--tokenizer", "tokenizer", "tokenizer or model folder"), Flag("--text", "text", "column of the text"),
         Flag("--validation", "validation", "share of documents to hold out", NUMBER),
         Flag("--engine", "engine", "local, or ray: the workers of a Ray cluster"), BAD_ROWS),
    ),
    "pretrain": Verb(
        "train a language model on shards", "PretrainRun", "ronna.run:execute",
        (Flag("--model", "model.name", "preset or folder"), Flag("--data", "data.train", "shards of `prepare`"),
         Flag("--validation", "data.validation", "shards to measure the loss on"),
         Flag("--objective", "objective.kind", "mlm, clm, denoise"),
         Flag("--steps", "train.steps", "optimizer steps", NUMBER),
         Flag("--tokens", "train.tokens", "tokens to train on", NUMBER),
         Flag("--epochs", "train.epochs", "passes over the data", NUMBER), OUT, SEED, DEVICE, *TRAINING),
    ),
    "finetune": Verb(
        "train a model for a task on labelled records", "FinetuneRun", "ronna.search:finetune",
        (Flag("--task", "task.kind", "classify, tag, relation, span_qa, embed, seq2seq, dialogue, dpo"),
         Flag("--model", "model.name", "model folder, or a preset to train from scratch"),
         Flag("--tokenizer", "model.tokenizer", "tokenizer folder of a preset"),
         Flag("--peft", "peft.kind", "train an adapter alone: lora, adalora, houlsby, bitfit, prompt, prefix"),
         Flag("--quantize", "model.quantize", "hold the weights under the adapter in 4 bits: nf4, nf4_double"),
         Flag("--train", "data.train", "file, or folder with train, validation and test"),
         Flag("--validation", "data.validation", "file"), Flag("--test", "data.test", "file"),
         Flag("--text", "data.text", "column of the text"), Flag("--text-pair", "data.text_pair", "of the second text"),
         Flag("--label", "data.label", "of the label"),
         Flag("--epochs", "train.epochs", "passes over the data", NUMBER),
         Flag("--limit", "data.limit", "training rows to use", NUMBER),
         Flag("--search", "search.trials", "try so many settings on the validation data, keep the best", NUMBER),
         Flag("--scratch", "model.scratch", "new weights, to compare with", "flag"),
         Flag("--allow-overlap", "data.allow_overlap", "accept training texts in held-out data", "flag"),
         Flag("--max-bad-rows", "data.max_bad_rows", "bad rows to set aside before giving up (default 0)", NUMBER),
         OUT, SEED, DEVICE, *TRAINING),
    ),
    "evaluate": Verb(
        "measure a model on a file", "EvaluateRun", "ronna.verbs.evaluate:evaluate",
        (Flag("--model", "model", "model folder"), Flag("--data", "data", "files", "+"), OUT, *COLUMNS,
         Flag("--label", "label", "column of the label"),
         Flag("--length", "length", "tokens of a sequence or window", NUMBER),
         DEVICE, PRECISION, QUANTIZE, BAD_ROWS),
    ),
    "predict": Verb(
        "records in, records with predictions out, streaming", "PredictRun", "ronna.verbs.evaluate:predict",
        (Flag("--model", "model", "model folder"), Flag("--input", "input", "file, or - for standard input"),
         Flag("--output", "output", "file, or - for standard output"),
         Flag("--relations", "relations", "relation folder: triples of the entities that --model finds"), *COLUMNS,
         Flag("--length", "length", "most tokens of a sequence", NUMBER), DEVICE, PRECISION, QUANTIZE, BAD_ROWS),
    ),
    "generate": Verb(
        "text from a decoder or an encoder-decoder", "GenerateRun", "ronna.verbs.evaluate:generate_run",
        (Flag("--model", "model", "model folder"), Flag("--prompt", "prompt", "one or more prompts", "+"),
         Flag("--max-tokens", "decoding.max_tokens", "tokens to write at most", NUMBER),
         Flag("--temperature", "decoding.temperature", "0 is greedy", NUMBER),
         Flag("--top-k", "decoding.top_k", "draw from the likeliest K tokens only", NUMBER),
         Flag("--top-p", "decoding.top_p", "draw from the likeliest tokens of this total probability", NUMBER),
         Flag("--beams", "decoding.beams", "beam search with so many beams", NUMBER),
         Flag("--stop", "decoding.stop", "texts to stop at", "+"),
         Flag("--seed", "decoding.seed", "of sampling", NUMBER),
         DEVICE, PRECISION, QUANTIZE),
    ),
    "doctor": Verb(
        "check a run file, its data and its model before it starts", "DoctorRun", "ronna.verbs.doctor:doctor",
        (Flag("run", "run", "run file"),), file=False,
    ),
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="ronna",
        description="Train larger language models on the compute you have, and carry them to use.",
    )
    top.add_argument("--version", action="version", version=f"ronna {__version__}")
    groups = {"": top.add_subparsers(dest="verb", metavar="VERB", required=True)}
    for name, verb in VERBS.items():
        group, _, leaf = name.rpartition(" ")
        if group and group not in groups:
            within = groups[""].add_parser(group, help=f"{group} commands")
            groups[group] = within.add_subparsers(metavar="VERB", required=True)
        add_verb(groups[group], leaf, name, verb)
    return top


def add_verb(group: Any, leaf: str, name: str, verb: Verb) -> None:
    sub = group.add_parser(leaf, help=verb.help, description=verb.help, allow_abbrev=False)
    sub.set_defaults(verb_name=name)
    if verb.file:
        sub.add_argument("file", nargs="?", metavar="RUN.toml", help="run file; flags and --set win over it")
    for flag in verb.flags:
        options: dict[str, Any] = {"help": flag.help}
        if flag.nargs == "flag":
            options |= {"action": "store_true", "default": None}
        elif flag.nargs == "+":
            options |= {"nargs": "+"}
        if flag.name.startswith("-"):
            options |= {"dest": f"flag:{flag.key}"}
            options |= {} if flag.nargs == "flag" else {"metavar": flag.name.lstrip("-").replace("-", "_").upper()}
            sub.add_argument(flag.name, **options)
        else:
            sub.add_argument(f"flag:{flag.key}", metavar=flag.name.upper(), **options)
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the run file")
    sub.add_argument("--json", action="store_true", help="print one JSON object on standard output at the end")
    if name in ("pretrain", "finetune"):
        sub.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint")
        sub.add_argument("--nproc", type=int, metavar="N", help="train on N processes of this machine (see torchrun)")
        where = "where they are started: local (this machine), ray (a Ray cluster)"
        sub.add_argument("--launcher", choices=["local", "ray"], default="local", help=where)
        again = "times that all processes start again when one is lost (default 3)"
        sub.add_argument("--restarts", type=int, default=3, metavar="N", help=again)


def settings(verb: Verb, arguments: argparse.Namespace) -> Any:
    """The verb's config out of file, flags and --set."""
    from ronna.base.config import apply_sets, build, read_toml

    file = getattr(arguments, "file", None)
    tree: dict[str, Any] = read_toml(file) if file else {}
    flags = {f"flag:{flag.key}": flag for flag in verb.flags}
    sets = [
        # A number is read as TOML; all else is quoted, or `--out 2024` would be one.
        f"{flags[name].key}={value if flags[name].nargs == NUMBER else json.dumps(value, ensure_ascii=False)}"
        for name, value in vars(arguments).items()
        if name in flags and value is not None
    ]
    tree = apply_sets(tree, sets + arguments.set)
    module, _, name = verb.config.rpartition(":")
    config = getattr(importlib.import_module(module or "ronna.runfile"), name)
    if file:
        return build(config, tree, where=file)
    ways = {flag.key: f"give {flag.name} ({flag.help})" for flag in verb.flags}
    return build(config, tree, "the command line", ways)


def unknown(verb: str, argument: str) -> RonnaError:
    known = [flag.name.lstrip("-") for flag in VERBS[verb].flags if flag.name.startswith("-")]
    near = difflib.get_close_matches(argument.lstrip("-"), [*known, "set", "json", "resume", "nproc"], n=1)
    what = f"no argument {argument}" + (f"; did you mean --{near[0]}?" if near else "")
    fix = f"`ronna {verb} --help` lists them, and --set KEY=VALUE gives any key of a run file: --set optim.kind=muon"
    return RonnaError(what, where=verb, fix=fix if VERBS[verb].file else f"`ronna {verb} --help` lists them")


def launched(arguments: argparse.Namespace, config: Any, argv: Sequence[str] | None) -> int | None:
    """The exit code of a run of several processes, None where this one is to carry it out."""
    ranks, launcher = (getattr(arguments, name, None) for name in ("nproc", "launcher"))
    command = sys.argv[1:] if argv is None else argv
    if launcher == "ray":
        if ranks is None:
            raise RonnaError("how many ranks is not said", where="--launcher ray", fix="give --nproc N as well")
        launch = importlib.import_module("ronna.launch_ray").launch_on_ray
        return int(launch(ranks, command, arguments.restarts, config.out, config.device != "cpu"))
    if ranks is None:
        return None
    return int(importlib.import_module("ronna.launch").launch(ranks, command, arguments.restarts))


def joined(argv: Sequence[str]) -> list[str]:
    """`--memory -3GiB` -> `--memory=-3GiB`, which is refused as a value: argparse takes for a flag what begins like one
    and is neither a number nor has a space."""
    found: list[str] = []
    for word in argv:
        if found and found[-1].startswith("--") and re.fullmatch(r"-\d\S*?[^\d.\s]\S*", word):
            word = f"{found.pop()}={word}"
        found.append(word)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 the user can mend it, 1 our fault, 143 stopped as asked."""
    arguments, rest = parser().parse_known_args(joined(sys.argv[1:] if argv is None else argv))
    verb = VERBS[arguments.verb_name]
    try:
        if rest:
            raise unknown(arguments.verb_name, rest[0].partition("=")[0])
        config = settings(verb, arguments)
        if arguments.json and getattr(config, "output", None) == "-":
            raise RonnaError("--json and the predictions both want standard output", fix="give --output FILE")
        if "WORLD_SIZE" not in os.environ and (code := launched(arguments, config, argv)) is not None:
            return code
        module, _, function = verb.run.partition(":")
        options = {"resume": True} if getattr(arguments, "resume", False) else {}
        result = getattr(importlib.import_module(module), function)(config, **options)
    except RonnaError as error:
        rank = int(os.environ.get("RANK", "0"))
        if not error.said:
            print(f"ronna: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if type(error).__name__ == "RankLost":
            print(f"ronna: {error}", file=sys.stderr)
            return 1
        if type(error).__name__ != "Interrupted":
            raise
        print("ronna: stopped as asked; go on with --resume", file=sys.stderr)
        return INTERRUPTED
    if arguments.json and result:  # which on other ranks than the first is empty
        print(json.dumps(result, ensure_ascii=False, allow_nan=False, default=str))
    else:
        for line in result.get("lines", ()):
            print(json.dumps(line, ensure_ascii=False))
    return 0
