"""What the planner answers, in a terminal and as JSON."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ronna.asked import Asked, PlanRun
from ronna.base.config import Tree
from ronna.base.rates import cache_folder
from ronna.plan import record
from ronna.plan.hardware import Device, gib
from ronna.plan.scaling import best_tokens, expected_loss
from ronna.plan.search import Plan, Work
from ronna.plan.time import step_time

if TYPE_CHECKING:
    from ronna.trial import Taken

SHOWN = 6  # plans that fit; of those that do not, half as many
BAR = 30  # characters of the longest bar


@dataclass(frozen=True)
class Answer:
    """All plans of a question, the best first. room: bytes that a run may grow by on a device. work: of all devices
    together."""

    title: str
    device: Device
    devices: int
    room: int
    asked: Asked
    work: Work
    plans: list[Plan]
    settings: Tree
    taken: "Taken | None" = None  # by real steps of the best plan

    @property
    def chosen(self) -> Plan | None:
        return self.plans[0] if self.plans and self.plans[0].fits else None

    def rate(self, plan: Plan) -> float:
        """Tokens a second, all devices together."""
        whole = self.work.shape(self.work.batch)
        tokens = whole.lengths.total + (0 if whole.source is None else whole.source.total)
        return tokens / plan.seconds

    def waits(self, plan: Plan) -> float:
        """Share of a step."""
        return step_time(self.work.model, plan.step, self.device).communication / plan.seconds

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.title,
            "settings": self.settings,
            "parameters": self.work.model.params(),
            "device": self.device.name,
            "devices": self.devices,
            "memory_bytes": self.device.memory,
            "tried": None if self.taken is None else asdict(self.taken),
            "plans": [self.of_plan(plan) for plan in self.plans],
        }

    def of_plan(self, plan: Plan) -> dict[str, Any]:
        return {
            "name": plan.name,
            "fits": plan.fits,
            "exact": plan.exact,
            "micro_batch": plan.micro,
            "peak_bytes": plan.peak + self.device.taken,
            "missing_bytes": plan.missing,
            "held": plan.memory.held,
            "where": plan.memory.where,
            "ranks": asdict(plan.step.ranks),
            "waiting": self.waits(plan),
            "step_seconds": plan.seconds,
            "tokens_per_second": self.rate(plan),
        }


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:,.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:,.1f} days"


def number(n: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:,.3g} {unit}"
    return f"{n:,.0f}"


def show(answer: Answer, question: PlanRun) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    where, work = answer.device, answer.work
    several = f"{answer.devices} x " if answer.devices > 1 else ""
    console.print(f"{answer.title}: {number(work.model.params())} parameters, {answer.asked.task}"
                  + "".join(f", {key} {value}" for key, value in answer.settings.items()))  # fmt: skip
    console.print(f"on {several}{where.name}: {gib(where.memory)}; {work.step.compute}, "
                  f"{work.batch} sequences a step")  # fmt: skip
    console.print(f"memory {basis(where)}, times by {where.source}")
    console.print(plans(answer))
    if (best := answer.chosen) is not None:
        bars(console, answer, best)
        if (taken := answer.taken) is not None:
            console.print(f"tried: {gib(taken.grown + where.taken)}, {duration(taken.seconds)} a step")
        for line in account(answer, question, best):
            console.print(line)


def basis(where: Device) -> str:
    """What an estimate of memory rests on, and how far to trust it."""
    lines = record.read(cache_folder(), where.kind)
    margin = f"{record.margin(lines, where.kind):.0%}"
    if len(lines) < record.ENOUGH and where.kind == "cuda":
        return f"by arithmetic; most runs on one H200 took at most {margin} more"
    if len(lines) < record.ENOUGH:
        return f"by arithmetic, which has been up to {margin} too low"
    return f"by arithmetic; nineteen of twenty runs here took at most {margin} more"


def plans(answer: Answer) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("way")
    for name in ("memory", "a step", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    fitting = [p for p in answer.plans if p.fits]
    shown = fitting[:SHOWN] + [p for p in fitting[SHOWN:] if not p.exact][: SHOWN // 2]
    for plan in shown:
        note = "" if plan.exact else "not the same training"
        if answer.devices > 1:
            note = f"waits {answer.waits(plan):.0%} for others"
        cells = (gib(plan.peak + answer.device.taken), duration(plan.seconds), f"{answer.rate(plan):,.0f}")
        best = plan is answer.chosen
        note = ", ".join(filter(None, ("best" if best else "", note if answer.devices > 1 or not best else "")))
        table.add_row(plan.name, *cells, note, style="bold" if best else None)
    for plan in [p for p in answer.plans if not p.fits][: SHOWN // 2]:
        table.add_row(
            plan.name, gib(plan.peak + answer.device.taken), "", "", f"lacks {gib(plan.missing)}", style="dim"
        )
    return table


def bars(console: Console, answer: Answer, best: Plan) -> None:
    """The fullest moment of a step by component."""
    held = {"process": answer.device.taken} | {name: size for name, size in best.memory.held.items() if size}
    most = max(held.values())
    console.print(f"fullest at {best.memory.where}:")
    for name, size in sorted(held.items(), key=lambda part: -part[1]):
        console.print(f"  {name:12} {gib(size):>12}  {'█' * max(1, round(BAR * size / most))}")


def account(answer: Answer, question: PlanRun, best: Plan) -> list[str]:
    """Tokens and time, what they cost, and how good the model may become."""
    rate, params, lines = answer.rate(best), answer.work.model.params(), []
    of_words = answer.asked.task == "clm" and question.peft is None
    tokens, hours = question.tokens, question.hours
    if tokens is None and hours is None and of_words:
        tokens = best_tokens(params)
        lines.append(f"{number(tokens)} tokens make the most of a model of this size (Besiroglu et al. 2024)")
    if hours is None and tokens is not None:
        hours = tokens / rate / 3600
    elif tokens is None and hours is not None:
        tokens = hours * 3600 * rate
    if tokens is None or hours is None:
        return lines
    lines.append(f"{number(tokens)} tokens take {duration(hours * 3600)}, {tokens / params:,.3g} for each parameter")
    if of_words:
        lines.append(f"expected loss on web text: {expected_loss(params, tokens):.2f} nats a token")
    energy = answer.devices * answer.device.watts * hours / 1000
    money = "" if question.price is None else f", {answer.devices * question.price * hours:,.2f} to pay"
    lines.append(f"about {energy:,.3g} kWh{money}")
    return lines
