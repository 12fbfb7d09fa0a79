"""What a run says: metrics.jsonl always; TensorBoard, W&B and trackio when asked; progress on stderr."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ronna.base.config import Config
from ronna.base.device import resident_bytes
from ronna.base.errors import RonnaError

METRICS_FILE = "metrics.jsonl"
Numbers = Mapping[str, float]


class WandbConfig(Config):
    """Weights & Biases: `offline` writes below the run folder and needs no account."""

    project: str = "ronna"
    name: str | None = None  # None: the run folder's name
    mode: Literal["online", "offline"] = "online"


def say(text: str) -> None:
    """One line of prose on stderr, above the progress bar if there is one; of several ranks, the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def say_marked(title: str, pieces: Sequence[tuple[str, bool]]) -> None:
    """A text in pieces on stderr, those that are marked in green or, where there are no colours, in brackets."""
    colours = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    on, off = ("\x1b[32m", "\x1b[0m") if colours else ("[[", "]]")
    # What comes out of data files must not be able to steer the terminal.
    plain = [
        ("".join(c if c == "\n" or c.isprintable() else "\ufffd" for c in text), marked) for text, marked in pieces
    ]
    say(f"{title}:")
    say("".join(f"{on}{text}{off}" if marked else text for text, marked in plain))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in order; a line that a crash left torn is passed over."""
    records = []
    for line in path.read_bytes().splitlines():
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and "step" in record:
                records.append({name: _from_json(value) for name, value in record.items()})
    return records


class Tracker:
    """Records a run's numbers into `out`; one per run, on the first rank only.

    Use it as a context manager: entering raises RonnaError when a tracker asked for is not installed.
    `total_steps` gives the progress an end; `quiet` silences the progress, never `say`.
    """

    def __init__(
        self,
        out: Path,
        *,
        tensorboard: bool = False,
        wandb: WandbConfig | None = None,
        trackio: bool = False,
        total_steps: int | None = None,
        quiet: bool = False,
    ):
        self.out, self.total_steps, self.quiet = out, total_steps, quiet
        self._tensorboard, self._wandb, self._trackio = tensorboard, wandb, trackio
        self._sinks: dict[str, _Sink] = {}
        self._bar: Progress | None = None
        self._started, self._first_step, self._disk_failed = time.monotonic(), 0, False

    def __enter__(self) -> Self:
        self.out.mkdir(parents=True, exist_ok=True)
        self._metrics = _LineFile(self.out / METRICS_FILE)
        if self._tensorboard:
            self._sinks["tensorboard"] = _open_tensorboard(self.out, first_step=None)
        if self._wandb:
            self._sinks["wandb"] = _open_wandb(self.out, self._wandb)
        if self._trackio:
            self._sinks["trackio"] = _open_trackio(self.out)
        console = Console(stderr=True)
        if console.is_terminal and not self.quiet:
            columns = BarColumn(bar_width=24), TextColumn("{task.description}", markup=False)
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("starting", total=self.total_steps)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        for sink in self._sinks.values():
            sink.close()
        self._metrics.close()

    def resume(self, step: int) -> None:
        """Forget what was logged at `step` and after: `step` is the first that will be logged again."""
        keep = [record for record in read_metrics(self._metrics.path) if record["step"] < step]
        self._metrics.replace("".join(map(_json_line, keep)))
        if board := self._sinks.get("tensorboard"):
            board.close()
            self._sinks["tensorboard"] = _open_tensorboard(self.out, first_step=step)
        self._started, self._first_step = time.monotonic(), max(0, step - 1)

    def log(self, step: int, numbers: Numbers, kind: str = "train") -> None:
        """One record: `loss`, `tokens_per_second` and `memory_bytes` show in the progress of kind `train`."""
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in numbers.items()}
        record = {"step": step, "kind": kind, "time": round(time.time(), 3)}
        if clash := record.keys() & numbers.keys():
            raise ValueError(f"a record has its own {', '.join(sorted(clash))}")
        try:
            self._metrics.append(_json_line({**record, **numbers}))
        except OSError as error:
            # A full disk must not end a run of days; the checkpoint has its own say.
            if not self._disk_failed:
                say(f"{self._metrics.path}: {error.strerror}; training goes on, these numbers are lost")
            self._disk_failed = True
        for sink in self._sinks.values():
            sink.log(step, {f"{kind}/{name}": value for name, value in numbers.items()})
        if not self.quiet:
            self._show(step, numbers, kind)

    def _show(self, step: int, numbers: Numbers, kind: str) -> None:
        if kind != "train":
            say(f"step {step}  {kind}: " + "  ".join(f"{n} {v:.5g}" for n, v in numbers.items()))
        elif self._bar:
            self._bar.update(self._task, completed=step, description=self._status(step, numbers))
        else:
            say(self._status(step, numbers))

    def _status(self, step: int, numbers: Numbers) -> str:
        parts = [f"step {step}" + (f"/{self.total_steps}" if self.total_steps else "")]
        if "loss" in numbers:
            parts.append(f"loss {numbers['loss']:.4f}")
        if "tokens_per_second" in numbers:
            parts.append(f"{numbers['tokens_per_second']:,.0f} tokens/s")
        done = step - self._first_step
        if self.total_steps and done > 0:
            left = (time.monotonic() - self._started) / done * max(0, self.total_steps - step)
            parts.append(f"ETA {left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60:02.0f}")
        parts.append(f"{numbers.get('memory_bytes', resident_bytes()) / 2**30:.2f} GiB")
        return "  ".join(parts)


class _LineFile:
    """Appends whole lines or nothing: a full disk or a kill leaves at most one torn line, the last."""

    def __init__(self, path: Path):
        self.path = path
        self._open()

    def _open(self) -> None:
        self._file = self.path.open("ab", buffering=0)
        self._size = self.path.read_bytes().rfind(b"\n") + 1
        self._file.truncate(self._size)

    def append(self, line: str) -> None:
        data = line.encode()
        try:
            if self._file.write(data) != len(data):
                raise OSError(None, "only part of a line could be written")
        except OSError:
            with suppress(OSError):
                self._file.truncate(self._size)
            raise
        self._size += len(data)

    def replace(self, text: str) -> None:
        self._file.close()
        draft = self.path.with_suffix(".tmp")
        with draft.open("wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path)
        self._open()

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class _Sink:
    log: Callable[[int, Numbers], None]
    close: Callable[[], None]


def _open_tensorboard(out: Path, first_step: int | None) -> _Sink:
    _require("tensorboard")
    board = _require("torch.utils.tensorboard").SummaryWriter(str(out / "tensorboard"), purge_step=first_step)

    def log(step: int, numbers: Numbers) -> None:
        for name, value in numbers.items():
            board.add_scalar(name, value, step)

    return _Sink(log, board.close)


def _open_wandb(out: Path, config: WandbConfig) -> _Sink:
    # The id follows from the folder, so that a resumed run goes on in its own curves.
    wandb, identity = _require("wandb"), sha256(str(out.resolve()).encode()).hexdigest()[:16]
    name = config.name or out.name
    try:
        run = wandb.init(project=config.project, name=name, mode=config.mode, dir=str(out), id=identity, resume="allow")
    except wandb.Error as error:
        fix = 'run `wandb login`, or write mode = "offline"'
        raise RonnaError(f"W&B refuses: {error}", where="tracking", fix=fix) from None
    # W&B's own step may only grow, which a resumed run's does not.
    run.define_metric("*", step_metric="step")
    return _Sink(lambda step, numbers: run.log({"step": step, **numbers}), run.finish)


def _open_trackio(out: Path) -> _Sink:
    trackio = _require("trackio")
    # It prints; stdout belongs to --json.
    with redirect_stdout(sys.stderr):
        trackio.init(project="ronna", name=out.name, resume="allow")

    def close() -> None:
        with redirect_stdout(sys.stderr):
            trackio.finish()

    return _Sink(lambda step, numbers: trackio.log(dict(numbers), step=step), close)


def _require(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        fix = "pip install 'ronna[track]', or leave this tracker off"
        raise RonnaError(f"{package} is not installed", where="tracking", fix=fix) from None


def _json_line(record: Mapping[str, Any]) -> str:
    # NaN and Infinity are not JSON: the strings keep the line readable by every parser.
    strict = {name: value if _is_finite(value) else str(value) for name, value in record.items()}
    return json.dumps(strict, allow_nan=False) + "\n"


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _from_json(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value
