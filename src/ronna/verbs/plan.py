"""`ronna plan`: what fits, how long it takes, and which is the largest model that does.

Closed forms, from the model's shape alone: no torch and no data, unless it is about a run file or `--probe`
measures.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ronna.asked import Asked, PlanRun, asked, has_gpu, published, this_machine, vocabulary
from ronna.base.config import Tree, dump_toml
from ronna.base.errors import RonnaError
from ronna.base.track import say
from ronna.model import config as c
from ronna.model.families import PRESETS, preset
from ronna.plan.hardware import CARDS, GB, Device, device, gib, parse_bytes
from ronna.plan.ranks import STEP_IN_PARTS, layouts
from ronna.plan.scaling import expected_loss, largest, proportions
from ronna.plan.search import Plan, Work, micro_of, search, some_way_fits
from ronna.plan.shapes import Dtype
from ronna.plan.time import step_time
from ronna.verbs.answer import Answer, show

if TYPE_CHECKING:
    from ronna.planned import AnyRun

SHARE = 0.98  # of the memory that may be planned with
LENGTHY = 4096  # tokens of a text that ranks may share
SIZES = 40  # to compare where time decides
TRIALS, CLOSE, CAREFUL = 5, 0.03, 1.1  # of a plan; what may be left of the room; what one took that had too little
OF_A_RUN = set("verb model hardware memory machine network precision exact probe price tokens hours write".split())


@dataclass(frozen=True)
class Subject:
    """What a question is about, on which devices. settings: of a preset, where it is not as published."""

    question: PlanRun
    devices: int
    device: Device
    compute: Dtype
    settings: Tree = field(default_factory=dict)

    @property
    def room(self) -> int:
        """Bytes that a run may grow by."""
        return int(self.device.memory * SHARE) - self.device.taken

    def seconds(self, work: Work) -> float:
        return step_time(work.model, work.step, self.device).total


def plan(question: PlanRun) -> dict[str, Any]:
    """Raises RonnaError where the question makes no sense or nothing fits."""
    devices, where = hardware(question)
    subject = Subject(question, devices, where, precision(question, where))
    if devices > 1:
        refuse_alone(question)
    if subject.room <= 0:
        what = f"{gib(where.memory)} is less than a process takes before it has a model, {gib(where.taken)}"
        raise RonnaError(what, where="memory", fix="give more memory")
    run: AnyRun | None = None
    if question.model.endswith(".toml"):
        answer, run = of_run(subject)
    else:
        answer = of_largest(subject) if question.largest else of_named(subject)
    if question.probe and subject.device.kind == "cpu" and run is None:
        answer = tried(subject, answer)
    show(answer, question)
    best = answer.chosen
    if best is None:
        lacking = answer.plans[0]
        what = f"nothing fits: the leanest way ({lacking.name}) lacks {gib(lacking.missing)} of {gib(where.memory)}"
        raise RonnaError(what, where=answer.title, fix=advice(question, devices, where))
    if question.write is not None:
        write(question, run, answer, best)
    return answer.as_json()


def advice(question: PlanRun, devices: int, where: Device) -> str:
    ways = ["a smaller --batch or --length"]
    if question.peft is None:
        ways.insert(0, "an adapter (--peft lora)")
    elif question.quantize is None:
        ways.insert(0, "weights in 4 bits (--quantize nf4)")
    if any(card.name == where.name for card in CARDS):
        ways.append(f"more devices (--hardware {2 * devices}x{where.name})")
    return f"try {', '.join(ways)}, more memory, or ask for the largest model that fits (--largest)"


# The hardware


def hardware(question: PlanRun) -> tuple[int, Device]:
    """How many devices, and one of them with no more memory than may be used."""
    limit = None if question.memory is None else parse_bytes(question.memory)
    name = question.hardware.strip().lower()
    if name in ("auto", "cpu"):
        number, found = 1, this_machine("cuda" if name == "auto" and has_gpu() else "cpu", question.probe)
    elif name == "gpu":
        if limit is None:
            raise RonnaError("which one?", where="hardware gpu", fix="say how much memory it has: --memory 24GiB")
        near = min(CARDS, key=lambda card: abs(card.memory - limit))
        number, found = (
            1,
            replace(near, name=f"a GPU of {gib(limit)}", memory=limit, source=f"the data sheet of {near.name}"),
        )
    else:
        number, found = device(name)
    network = found.network if question.network is None else question.network * GB
    found = replace(found, machine=min(question.machine, number), network=network)
    return number, found if limit is None else replace(found, memory=min(found.memory, limit))


def precision(question: PlanRun, where: Device) -> Dtype:
    chosen: Dtype = where.precision() if question.precision == "auto" else question.precision
    if not where.rates[chosen]:
        fix = f"use {'fp32' if chosen == 'bf16' else 'bf16'}"
        raise RonnaError(f"{where.name} does not compute in {chosen}", where="precision", fix=fix)
    return chosen


# The answers


def of_named(subject: Subject) -> Answer:
    question = subject.question
    family, cfg = published(question, question.model)
    found = asked(question, family, cfg, subject.device.kind, subject.compute, subject.devices)
    return answered(subject, question.model, found)


def of_run(subject: Subject) -> "tuple[Answer, AnyRun]":
    """Of a run file, as if all its data were as long as it allows."""
    from ronna.compatible import refuse_shared
    from ronna.planned import expected, read_run, work_of

    question = subject.question
    if others := sorted(question.model_fields_set - OF_A_RUN):
        fix = "change the run file, or leave them out"
        raise RonnaError(f"the run file says {', '.join(others)} itself", where=question.model, fix=fix)
    run, family, cfg = read_run(question.model)
    if subject.devices > 1:
        refuse_shared(run)
    model, shape = expected(run, family, cfg)
    work = work_of(run, model, shape, kind=subject.device.kind, compute=subject.compute, exact=question.exact)
    task = run.task.kind if run.verb == "finetune" else run.objective.kind
    return answered(subject, question.model, Asked(family, cfg, task, work)), run


def answered(subject: Subject, title: str, found: Asked, correction: float = 1.0) -> Answer:
    work, works = found.work, list(shared(subject, found.work))
    plans: list[Plan] = []
    for one in works:
        plans += search(one, subject.room, lambda step: step_time(work.model, step, subject.device).total, correction)
    plans.sort(key=lambda p: (not p.fits, p.missing, not p.exact, p.seconds if subject.devices > 1 else 0))
    return Answer(title, subject.device, subject.devices, subject.room, found, work, plans, subject.settings)


def tried(subject: Subject, answer: Answer) -> Answer:
    """The same question answered by real steps of the plan: what they take by its estimate corrects all others. Of the
    largest model the next try lies between those that have been seen to fit and those that have not."""
    from ronna.trial import Subject as Model
    from ronna.trial import trial

    question = subject.question
    found: Answer | None = None  # the largest that has been seen to fit
    below: float = math.inf  # parameters of the smallest that has not
    correction = 1.0
    for _ in range(TRIALS):
        best = answer.chosen
        if best is None:
            return found or answer
        pretraining = question.peft is None and answer.asked.task in ("mlm", "clm", "denoise")
        vocab = {} if question.vocab is None else {"vocab_size": question.vocab}
        model = Model(question.model, answer.settings | vocab, answer.asked.task, pretraining)
        taken = trial(model, best.step)
        grown = int(CAREFUL * max(best.peak, answer.room)) if taken is None else taken.grown
        say(f"tried {best.name}: {gib(grown + subject.device.taken)}" + ("" if taken else " or more"))
        answer = replace(answer, taken=taken)
        fits = taken is not None and grown <= answer.room
        if fits:
            found = answer
            if not question.largest or grown >= answer.room * (1 - CLOSE):
                return found
        else:
            below = answer.asked.cfg.params()
        if fits or found is None:
            correction = grown / best.memory.peak
        answer = again(subject, answer, correction, below)
        if found is not None and answer.asked.cfg.params() <= found.asked.cfg.params():
            return found
    return found or answer


def again(subject: Subject, answer: Answer, correction: float, below: float) -> Answer:
    if subject.question.largest and subject.question.hours is None:
        return of_largest(replace(subject, settings={}), correction, below)
    return answered(replace(subject, settings=answer.settings), answer.title, answer.asked, correction)


def shared(subject: Subject, work: Work) -> Iterator[Work]:
    """One device's part of a step, for each way to share it. Raises RonnaError where there is none."""
    if subject.devices == 1:
        yield work
        return
    whole = work.step.adapter is None
    lengthy = work.step.lengths.length >= LENGTHY
    found = list(layouts(work.model, subject.devices, subject.device.machine, work.batch, whole, lengthy))
    if not found:
        what = f"{work.batch} sequences a step are too few for {subject.devices} devices"
        raise RonnaError(what, where="batch", fix=f"give at least {subject.devices}")
    for ranks in found:
        batch = -(-work.batch // ranks.parts)
        micro = min(batch, -(-micro_of(work) // ranks.parts))
        step = replace(work.shape(micro).of(work.step), micro_batches=-(-batch // micro), ranks=ranks)
        yield replace(work, batch=batch, step=step, micro=micro)


def refuse_alone(question: PlanRun) -> None:
    """RonnaError for what works on one device alone; `ronna.compatible` has the same of runs."""
    asked = [
        ("optim", f"the optimizer {question.optim}", question.optim not in STEP_IN_PARTS),
        ("quantize", "a base in 4 bits", question.quantize is not None),
        ("task", f"the task {question.task}", question.task in ("embed", "dpo")),
        ("peft", "adalora", question.peft == "adalora"),
    ]
    for where, what, there in asked:
        if there:
            raise RonnaError(f"{what} does not work on several devices yet", where=where, fix="ask for one device")


def of_largest(subject: Subject, correction: float = 1.0, below: float = math.inf) -> Answer:
    """The largest of the family's sizes, `below` so many parameters, that fits in some way or, with `hours`, the one
    that becomes best in them."""
    question = subject.question
    if question.model not in PRESETS:
        fix = "name a preset of the family, such as llama-130m"
        raise RonnaError("the largest of which family?", where=f"model {question.model}", fix=fix)
    family, base = published(question, question.model)
    every = ladder(question, base)
    sizes = [size for size in every if size[1].params() < below]

    def ask(i: int) -> Asked:
        return asked(question, family, sizes[i][1], subject.device.kind, subject.compute, subject.devices)

    def fits(i: int) -> bool:
        return any(some_way_fits(one, room) for one in shared(subject, ask(i).work))

    room = int(subject.room / correction)
    most = largest(len(sizes), fits)
    if most is None:
        what = f"not even the smallest of the family, {every[0][1].params():,} parameters, fits"
        raise RonnaError(what, where=f"memory {gib(subject.device.memory)}", fix="give more, or a smaller --batch")
    if question.hours is not None:
        some = sorted({round(most * i / SIZES) for i in range(SIZES + 1)})
        most = min(some, key=lambda i: loss_after(subject, ask(i), question.hours or 0.0))
    return answered(replace(subject, settings=sizes[most][0]), question.model, ask(most), correction)


def loss_after(subject: Subject, found: Asked, hours: float) -> float:
    work = next(shared(subject, found.work))
    tokens = work.step.micro_batches * work.step.lengths.total * work.step.ranks.parts
    return expected_loss(found.cfg.params(), hours * 3600 * tokens / subject.seconds(work))


def ladder(question: PlanRun, base: c.Model) -> list[tuple[Tree, c.Model]]:
    """Sizes of a preset's family by settings, small to large, heads and feed-forward in its proportions."""
    block = base.last.blocks[0]
    attention, hidden = block.attention, block.ffn.hidden / base.dim
    found, vocab = [], vocabulary(question)
    for width, blocks in proportions(attention.head_dim):
        heads = width // attention.head_dim
        settings: Tree = {
            "hidden_size": width,
            "num_hidden_layers": blocks,
            "num_attention_heads": heads,
            "intermediate_size": round(hidden * width / 8) * 8,
        }
        if attention.kv != attention.heads:
            if heads % (shares := attention.heads // attention.kv):
                continue
            settings["num_key_value_heads"] = heads // shares
        found.append((settings, preset(question.model, **settings, **vocab)[1]))
    return sorted(found, key=lambda size: size[1].params())


# The run file


def write(question: PlanRun, run: "AnyRun | None", answer: Answer, best: Plan) -> None:
    """A run file that does as the plan says, of `run` where the question was about one."""
    from ronna.planned import named_run, with_plan

    assert question.write is not None
    run = named_run(question, answer.asked, answer.settings) if run is None else run
    path = Path(question.write)
    if path.suffix != ".toml":
        raise RonnaError("not the name of a run file", where=f"write {path}", fix="end it in .toml")
    planned = with_plan(run, best, answer.work)
    if best.step.tight and not best.step.lean:  # what a heap that gives back is for, only a limit tells
        train = planned.train.model_copy(update={"memory": question.memory})
        planned = planned.model_copy(update={"train": train})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump_toml(planned), encoding="utf-8")
    except OSError as error:
        raise RonnaError(f"cannot be written: {error.strerror}", where=str(path), fix="choose another path") from None
    machine, several = answer.device.machine, ""
    if answer.devices > machine:
        several = f", by torchrun with {machine} processes on each of {answer.devices // machine} machines"
    elif answer.devices > 1:
        several = f" --nproc {answer.devices}"
    say(f"written: ronna {planned.verb} {path}{several}")
