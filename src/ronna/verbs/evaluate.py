"""Using a trained folder: measure it, predict with it, let it write."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import torch

from ronna.base.config import config_hash
from ronna.base.device import choose_device, choose_precision
from ronna.base.errors import RonnaError
from ronna.base.heap import keep_few_kernels
from ronna.base.hub import local_folder
from ronna.base.track import say
from ronna.data.badrows import BadRows
from ronna.data.sources import read_json_stream, read_records, resolve
from ronna.decoding.decode import Generation, generate, perplexity
from ronna.decoding.sampling import GenerateConfig
from ronna.model.folder import Loaded as OpenedFolder
from ronna.model.fourbit import Quantize, held_in
from ronna.model.transformer import Transformer
from ronna.peft.changes import activate
from ronna.peft.files import is_adapter
from ronna.peft.methods import NAME
from ronna.peft.own import at_work
from ronna.report import build_report, write_report
from ronna.runfile import EvaluateRun, GenerateRun, PredictRun
from ronna.stored import open_beside, open_folder
from ronna.tasks.base import Task, read_rows, unfolded
from ronna.tasks.dialogue import Dialogue
from ronna.tasks.embed import Embed
from ronna.tasks.metrics import Scores, perplexity_scores
from ronna.tasks.relation import Relation
from ronna.tasks.schema import peek
from ronna.tasks.seq2seq import Seq2Seq
from ronna.tasks.table import task_of
from ronna.tasks.tag import Tag
from ronna.tasks.writing import Writing
from ronna.text.tokenizer import Tokenizer, load_tokenizer
from ronna.verbs.prepare import texts
from ronna.verbs.triples import Triples

LENGTH = 512  # where neither the user nor the folder says one


@dataclass(frozen=True)
class Loaded:
    """A folder ready to be used; `task` is there where it has a classifier."""

    folder: str
    model: Transformer
    tokenizer: Tokenizer
    task: Task | None
    length: int  # tokens of a sequence, or of a window of a language model
    opened: OpenedFolder
    adapter: str | None = None  # what works on the model when this answers, where its folder is an adapter's

    def beside(self, folder: str, adapter: str) -> "Loaded":
        """Another adapter of the same base, on the same model, under a name of its own: both answer as if alone."""
        if self.adapter is None:
            raise RonnaError("no adapter's folder", where=self.folder, fix="load one adapter, and others beside it")
        opened = open_beside(self.opened, folder, adapter)
        return furnished(folder, opened, self.model.device, self.model.compute, adapter=adapter)

    def at_work(self) -> None:
        if self.adapter is not None and at_work(self.model) != (self.adapter,):
            activate(self.model, self.adapter)

    def predict(self, texts: Sequence[Any], pairs: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The prediction for each text or pair, or for each conversation, a list of messages: label and probabilities,
        labels, score, or text."""
        task = self.with_task()
        return self.answer(task.rows(texts, pairs))

    def with_task(self) -> Task:
        if self.task is None:
            raise RonnaError("no task head", where=self.folder, fix="`ronna finetune` one, or use generate")
        return self.task

    def answer(self, rows: Sequence[Any], account: dict[str, int] | None = None) -> list[dict[str, Any]]:
        """The prediction for each of the task's rows. What is done about long ones is counted in `account`."""
        task = self.with_task()
        self.at_work()
        examples = task.encode(rows, account)
        return task.decode(rows, examples, task.infer(self.model, examples))

    def generate(self, prompts: Sequence[Any], config: GenerateConfig | None = None) -> list[Generation]:
        """What the model writes after each prompt, for each source, or as its turn of each conversation (a text, or a
        list of messages)."""
        model, tokenizer = self.model, self.tokenizer
        self.at_work()
        if isinstance(self.task, Writing):
            return self.task.write(model, self.task.prompts(prompts), config)
        if model.head is None or model.decoder is None:
            raise RonnaError("only a model with a decoder can write", where=self.folder, fix="give a GPT or T5 folder")
        start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        # What a decoder is to continue must stay open, after the token that texts begin with.
        begin = [] if start is None else [start]
        ids = [[*begin, *i.tolist()] for i in tokenizer.encode_batch(list(prompts))]
        return generate(model, ids, config or GenerateConfig(), eos=eos, start=start, decode=tokenizer.decode)


def load(
    folder: str,
    *,
    device: str = "auto",
    precision: str = "auto",
    length: int | None = None,
    quantize: Quantize | None = None,
) -> Loaded:
    """A model folder (ours or Hugging Face's) on a device; `quantize` holds the linear maps of its blocks in 4 bits.

    Raises RonnaError for anything that is not one.
    """
    keep_few_kernels()
    place = choose_device(device)
    dtype, _ = choose_precision(precision, place)
    adapter = NAME if is_adapter(local_folder(folder)) else None
    return furnished(folder, open_folder(folder, quantize, dtype), place, dtype, length=length, adapter=adapter)


def opened(run: EvaluateRun | PredictRun) -> Loaded:
    return load(run.model, device=run.device, precision=run.precision, length=run.length, quantize=run.quantize)


def furnished(
    folder: str,
    loaded: OpenedFolder,
    place: torch.device,
    dtype: torch.dtype,
    *,
    length: int | None = None,
    adapter: str | None,
) -> Loaded:
    """A model as it was opened, on a device, with its tokenizer and the task that its config.json tells of."""
    tokenizer = load_tokenizer(local_folder(folder))
    model = loaded.model.to(place, dtype).eval()
    model.compute = dtype
    length = length or min(tokenizer.max_length or LENGTH, LENGTH)
    length = length if model.max_length is None else min(length, model.max_length)
    task = None
    if model.classifier is not None and model.head is None:
        task = task_of(model.classifier.cfg).restore(loaded.config, tokenizer, length)
    elif model.head is None and "embedding_pooling" in loaded.config:
        task = Embed.restore(loaded.config, tokenizer, length)
    elif (kind := writing_task(model, loaded.config, tokenizer)) is not None:
        task = kind.restore(loaded.config, tokenizer, length).on(model.cfg, loaded.config)
    return Loaded(folder, model, tokenizer, task, length, loaded, adapter)


def writing_task(model: Transformer, config: Mapping[str, Any], tokenizer: Tokenizer) -> type[Writing] | None:
    """The task of a folder whose answers are text; None for what is only a language model."""
    if model.head is None or model.decoder is None:
        return None
    if model.encoder is not None or "seq2seq" in (config.get("task_specific_params") or {}):
        return Seq2Seq
    return None if tokenizer.chat_template is None else Dialogue


def evaluate(run: EvaluateRun) -> dict[str, Any]:
    """Scores with intervals on a file: the task's metrics, or a language model's perplexity and bits per byte."""
    loaded = opened(run)
    bad = BadRows(limit=run.max_bad_rows)
    paths = resolve(list(run.data))
    if loaded.task is None or only_text(loaded.task, paths, run):
        scores, kind = measure_text(loaded, run, paths, bad)
    else:
        scores, kind = measure_task(loaded, loaded.task, run, paths, bad)
    say(scores.text())
    memory = {"held": held_in(loaded.model)}
    title = f"evaluate: {run.model}"
    report = build_report(title=title, config_hash=config_hash(run), test=scores, memory=memory, **kind)
    if run.out:
        write_report(Path(run.out), report)
    return report.model_dump(mode="json")


def only_text(task: Task, paths: list[Path], run: EvaluateRun) -> bool:
    """Whether a model that can converse is given no conversations but plain text."""
    if not isinstance(task, Dialogue):
        return False
    first = next(iter(read_records(paths, bad=BadRows(limit=run.max_bad_rows))))
    try:
        task.columns(first, text=run.text, pair=run.text_pair, label=run.label)
    except RonnaError:
        return run.label is None and isinstance(first.fields.get(run.text or "text"), str)
    return False


def measure_task(
    loaded: Loaded, task: Task, run: EvaluateRun, paths: list[Path], bad: BadRows
) -> tuple[Scores, dict[str, Any]]:
    account: dict[str, int] = {}
    first, records = peek(unfolded(type(task), read_records(paths, bad=bad), bad))
    assert first is not None
    columns = task.columns(first, text=run.text, pair=run.text_pair, label=run.label)
    say(f"columns: {columns}")
    rows = list(read_rows(type(task), records, columns, bad))
    task.check_labels(rows, where=run.data[0])
    examples = task.encode(rows, account)
    scores = task.measure(examples, task.infer(loaded.model, examples))
    return scores, {"task": task.kind, "data": {**bad.summary(), **account}}


def measure_text(loaded: Loaded, run: EvaluateRun, paths: list[Path], bad: BadRows) -> tuple[Scores, dict[str, Any]]:
    documents = list(texts(paths, [run.text or "text"], bad))
    if loaded.model.cfg.encoder is not None:
        fix = "give a causal model or a classifier"
        raise RonnaError("perplexity on a text needs a decoder", where=run.model, fix=fix)
    start = loaded.tokenizer.eos_id if loaded.tokenizer.bos_id is None else loaded.tokenizer.bos_id
    length = loaded.length
    ids = [i.tolist() for i in loaded.tokenizer.encode_batch(documents)]
    nll, tokens = perplexity(loaded.model, ids, length=length, stride=length // 2, bos=start)
    scores = perplexity_scores(nll, tokens, sum(len(d.encode()) for d in documents))
    return scores, {"objective": "clm", "data": bad.summary()}


def predict(run: PredictRun) -> dict[str, Any]:
    """Each record comes out with the prediction beside its own fields, in order, as soon as its batch is done."""
    loaded = opened(run)
    bad = BadRows(limit=run.max_bad_rows)
    task = loaded.with_task()
    triples = None if run.relations is None else triples_of(loaded, run.relations, run)
    account: dict[str, int] = {}
    answer = partial(loaded.answer, account=account) if triples is None else triples.answer
    given = (
        read_json_stream(sys.stdin.buffer, "standard input", bad=bad)
        if run.input == "-"
        else read_records(run.input, bad=bad)
    )
    first, records = peek(unfolded(type(task), given, bad))
    if first is None:
        raise RonnaError("no record came", where="standard input", fix='send lines such as {"text": "..."}')
    columns = task.columns(first, text=run.text, pair=run.text_pair, label=None, labelled=False)._replace(label=None)
    stream = bad.sift(records, lambda record: (record.fields, task.row(record, columns)))
    with writer(run.output) as file:
        while some := list(islice(stream, run.batch)):
            for (fields, _), said in zip(some, answer([row for _, row in some]), strict=True):
                file.write(json.dumps({**fields, "prediction": said}, ensure_ascii=False, default=str) + "\n")
            file.flush()
    if triples is None:
        if long := ", ".join(f"{number:,} {word}" for word, number in account.items() if number):
            say(f"longer than {loaded.length} tokens: {long}")
        return {"data": {**bad.summary(), **account}}
    say(triples.account.text(run.pairs))
    return {"data": bad.summary(), "triples": asdict(triples.account)}


def triples_of(entities: Loaded, folder: str, run: PredictRun) -> Triples:
    """The two models as one. Raises RonnaError for one that is of another task."""
    if not isinstance(entities.task, Tag):
        fix = "give --model a folder that `ronna finetune --task tag` wrote"
        raise RonnaError("finds no entities, which relations are asked of", where=run.model, fix=fix)
    relations = opened(run.model_copy(update={"model": folder}))
    if not isinstance(relations.task, Relation):
        fix = "give --relations a folder that `ronna finetune --task relation` wrote"
        raise RonnaError("finds no relations", where=folder, fix=fix)
    return Triples(entities.answer, relations.answer, relations.task.labels, run.pairs)


@contextmanager
def writer(path: str) -> Iterator[TextIO]:
    if path == "-":
        yield sys.stdout
        return
    try:
        with open(path, "w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise RonnaError(f"cannot be written: {error.strerror}", where=path, fix="choose another --output") from None


def generate_run(run: GenerateRun) -> dict[str, Any]:
    """What the model writes after each prompt."""
    loaded = load(run.model, device=run.device, precision=run.precision, quantize=run.quantize)
    made = loaded.generate(run.prompt, run.decoding)
    lines = [{"prompt": p, "text": g.text, "finish": g.finish} for p, g in zip(run.prompt, made, strict=True)]
    return {"lines": lines}
