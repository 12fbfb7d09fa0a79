"""Faults of a run of two ranks, each survived or not: python tests/faults/ranks.py [F1 F2 ...] [--repeats N]

Prints a line a fault and how many were survived of all. A fault is survived where the run, started again by its
launcher or by the next job, ends in the bits of one that nothing happened to, with nothing left behind, and says which
rank was lost and how. Numbers are those of the list of faults that the project was built against.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

STEPS, TIMEOUT = 10, 6.0
Where = SimpleNamespace  # fault, rank, step, marker: where a fault strikes, once


# In a rank


def strikes(where: Where, step: int) -> bool:
    """Whether it is time; never twice."""
    if int(os.environ["RANK"]) != where.rank or step < where.step or Path(where.marker).exists():
        return False
    Path(where.marker).write_text("")
    return True


def end(number: int) -> None:
    os.kill(os.getpid(), number)


def fails(error: Exception) -> Callable[[], object]:
    def act() -> None:
        raise error

    return act


def spoiled(run: Any) -> None:
    """One number of a run's gradient that is none."""
    next(p for p in run.parameters if p.grad is not None).grad.to_local().fill_(float("nan"))


def install(where: Where) -> None:
    """Put the fault into this rank's functions."""
    import torch

    from ronna.parallel.world import World
    from ronna.train import checkpoint, pieces
    from ronna.train.loop import Run

    now = SimpleNamespace(step=0)
    step, gradients, judge, keep = Run.step, Run.gradients, Run.judge, Run.keep

    def watched(self: Run, window: Any) -> None:
        now.step = self.progress.step
        step(self, window)

    def before(function: Callable, act: Callable[[], object]) -> Callable:
        def struck(*args: Any, **more: Any) -> Any:
            if strikes(where, now.step):
                act()
            return function(*args, **more)

        return struck

    def after(function: Callable, act: Callable[[Run], object]) -> Callable:
        def struck(self: Run, *args: Any) -> Any:
            found = function(self, *args)
            if strikes(where, now.step):
                act(self)
            return found

        return struck

    Run.step = watched
    match where.fault:
        case "F1" | "F2":
            Run.gradients = after(gradients, lambda run: end(signal.SIGKILL))
        case "F3":
            pieces.save_tensors = before(pieces.save_tensors, lambda: end(signal.SIGKILL))
        case "F4":
            checkpoint._write_manifest = before(checkpoint._write_manifest, lambda: end(signal.SIGKILL))
        case "F5":
            checkpoint.shutil = SimpleNamespace(rmtree=before(shutil.rmtree, lambda: end(signal.SIGKILL)))
        case "F7":
            Run.gradients = after(gradients, lambda run: end(signal.SIGTERM))
        case "F8":
            Run.judge = before(judge, lambda: end(signal.SIGTERM))
        case "F9":
            Run.keep = before(keep, lambda: end(signal.SIGTERM))
        case "F10":
            Run.gradients = after(gradients, lambda run: end(signal.SIGSTOP))
        case "F11":
            total = World.total_counts
            World.total_counts = lambda self, counts: counts if strikes(where, now.step) else total(self, counts)
        case "F13":
            pieces.save_tensors = before(pieces.save_tensors, fails(OSError(28, "No space left on device")))
        case "F18":
            Run.gradients = after(gradients, spoiled)
        case "F24":
            Run.gradients = before(gradients, fails(torch.OutOfMemoryError("no memory left")))


# The driver


class Bench:
    """Shards, a folder for runs, and the bits in which a run of two ranks ends that nothing happens to."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.data = shards(folder)
        self.whole = folder / "whole"
        code, said = self.run(self.whole)
        assert code == 0, said
        self.wanted = digest(self.whole)

    def command(self, out: Path, ranks: int, *more: str, torchrun: bool = False) -> list[str]:
        tree = [f"train.steps={STEPS}", "train.save_every=1", "train.log_every=1", "train.evaluate_every=2"]
        tree += ["train.batch=4", "train.length=32", "train.keep=4", "model.dropout=0.0", "train.precision=fp32"]
        tree += [f"parallel.timeout={TIMEOUT}", f'data.train="{self.data}"', f'data.validation="{self.data}"']
        made = [sys.executable, str(Path(__file__).resolve()), "pretrain"]
        if torchrun:
            agent = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--max-restarts", "1"]
            made[1:1] = [*agent, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
            made.append("--resume")
        else:
            made += ["--nproc", str(ranks)]
        made += ["--model", "bert-tiny", "--objective", "mlm", "--out", str(out)]
        made += ["--seed", "3", "--device", "cpu", *more]
        return [*made, *(word for key in tree for word in ("--set", key))]

    def start(self, out: Path, *more: str, ranks: int = 2, where: Where | None = None, **by: bool) -> subprocess.Popen:
        told = {"RONNA_FAULT": json.dumps(vars(where))} if where is not None else {}
        if by.get("torchrun"):  # whose ranks find those that are gone in a store that they share, and cannot meet again
            told["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        env = os.environ | {"OMP_NUM_THREADS": "1", **told}
        err = (self.folder / "said").open("w+")
        return subprocess.Popen(
            self.command(out, ranks, *more, **by), env=env, stderr=err, stdout=err, text=True, start_new_session=True
        )

    def run(self, out: Path, *more: str, ranks: int = 2, where: Where | None = None, **by: bool) -> tuple[int, str]:
        process = self.start(out, *more, ranks=ranks, where=where, **by)
        code = process.wait(timeout=300)
        return code, (self.folder / "said").read_text()


def shards(folder: Path) -> Path:
    from ronna.runfile import PrepareRun, TokenizerRun
    from ronna.text.training import TokenizerConfig
    from ronna.verbs.prepare import prepare, train_tokenizer_run

    rng, words = random.Random(0), "the cat dog sat ran on under a mat tree and then slept . it was warm cold !".split()
    lines = [" ".join(rng.choices(words, k=rng.randint(20, 120))) for _ in range(60)]
    text, tokenizer = folder / "text.txt", f"{folder}/tokenizer"
    text.write_text("\n\n".join(lines), encoding="utf-8")
    config = TokenizerConfig(kind="wordpiece", vocab=400)
    train_tokenizer_run(TokenizerRun(out=tokenizer, input=(str(text),), tokenizer=config))
    prepare(PrepareRun(out=f"{folder}/shards", input=(str(text),), tokenizer=tokenizer))
    return folder / "shards" / "train"


def digest(out: Path) -> str:
    return hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()


def left_behind(out: Path) -> list[str]:
    """Processes of a run that are still there, and files that no checkpoint has."""
    found = [str(path) for path in out.glob("checkpoints/*.tmp-*")]
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                if str(out).encode() in (folder / "cmdline").read_bytes():
                    found.append(f"process {folder.name}")
            except OSError:
                continue
    return found


def newest(out: Path, count: int) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-????????"))[-count:]


def losses(out: Path) -> dict[int, float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def ended_well(bench: Bench, out: Path, code: int, said: str, *words: str) -> str:
    """What is wrong, or nothing."""
    missing = [word for word in words if word not in said]
    if code or missing:
        return f"exit code {code}, not said: {missing}\n{said[-1500:]}"
    if digest(out) != bench.wanted:
        return "it ended in other bits"
    return ", ".join(left_behind(out))


def in_a_rank(
    fault: str, rank: int | None, *words: str, again: bool = False, torchrun: bool = False
) -> Callable[[Bench, Path, int], str]:
    """A fault inside a rank (None: either). again: the run ends as asked, and is started by hand once more. torchrun:
    which starts it instead of `--nproc`."""

    def survived(bench: Bench, out: Path, seed: int) -> str:
        rng = random.Random(f"{fault}/{seed}")
        chosen = rng.randrange(2) if rank is None else rank
        where = Where(fault=fault, rank=chosen, step=rng.randrange(2, STEPS - 2), marker=f"{out}.struck")
        code, said = bench.run(out, where=where, torchrun=torchrun)
        if not Path(where.marker).exists():
            return "it never struck"
        told = [word.replace("RANK", str(chosen)).replace("OTHER", str(1 - chosen)) for word in words]
        if again:
            if code != 143:
                return f"exit code {code} where it was asked to stop\n{said[-1500:]}"
            code, more = bench.run(out, "--resume")
            said += more
        return ended_well(bench, out, code, said, *told)

    return survived


def launcher_killed(bench: Bench, out: Path, seed: int) -> str:
    wanted = out / "checkpoints" / f"step-{random.Random(seed).randrange(1, STEPS - 2):08d}"
    process = bench.start(out)
    while not wanted.is_dir():
        if process.poll() is not None:
            return "it ended too early"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(200):  # ranks save what they have, and end
        if not (processes := [name for name in left_behind(out) if name.startswith("process")]):
            break
        time.sleep(0.1)
    else:
        return f"left behind: {processes}"
    return ended_well(bench, out, *bench.run(out, "--resume"), "resuming from step-")


def damaged(spoil: Callable[[Path], object], count: int, word: str) -> Callable[[Bench, Path, int], str]:
    """The newest checkpoints of a whole run damaged."""

    def survived(bench: Bench, out: Path, seed: int) -> str:
        shutil.copytree(bench.whole, out)
        shutil.rmtree(out / "model")
        for folder in newest(out, count):
            spoil(folder)
        return ended_well(bench, out, *bench.run(out, "--resume"), "was passed over", word, "resuming from step-")

    return survived


def a_piece(folder: Path) -> Path:
    return folder / "optimizer-00002-of-00002.safetensors"


def flip(folder: Path) -> None:
    content = bytearray(a_piece(folder).read_bytes())
    content[len(content) // 2] ^= 16
    a_piece(folder).write_bytes(content)


def all_damaged(bench: Bench, out: Path, seed: int) -> str:
    shutil.copytree(bench.whole, out)
    for folder in newest(out, 100):
        flip(folder)
    code, said = bench.run(out, "--resume")
    return "" if code == 2 and "no whole checkpoint is left" in said else f"exit code {code}\n{said[-1500:]}"


def a_number_is_none(bench: Bench, out: Path, seed: int) -> str:
    """The step is skipped on both ranks, and the run goes on."""
    rng = random.Random(seed)
    where = Where(fault="F18", rank=rng.randrange(2), step=rng.randrange(2, STEPS - 2), marker=f"{out}.struck")
    code, said = bench.run(out, where=where)
    if code:
        return f"exit code {code}\n{said[-1500:]}"
    skipped = json.loads((out / "report.json").read_text())["train"]["skipped_steps"]
    before, after = losses(bench.whole), losses(out)
    same = all(before[step] == after[step] for step in range(1, where.step + 1))
    finite = all(loss == loss for loss in after.values())
    return "" if skipped == 1 and same and finite else f"{skipped} steps were skipped, losses {after}"


def other_ranks(bench: Bench, out: Path, seed: int) -> str:
    """Two ranks, one, two: by checkpoints of a run that was stopped twice."""
    for ranks in (2, 1, 2):
        more = ("--resume",) if out.exists() else ()
        process = bench.start(out, *more, ranks=ranks)
        begun = len(newest(out, 100))
        while ranks != 2 or not more:
            if len(newest(out, 100)) > begun + 2 or process.poll() is not None:
                break
            time.sleep(0.005)
        else:
            pass
        if process.poll() is None and not (ranks == 2 and more):
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=300)
    if not (out / "report.json").exists():
        return (bench.folder / "said").read_text()[-1500:]
    wanted, found = losses(bench.whole), losses(out)
    far = max(abs(found[step] / loss - 1) for step, loss in wanted.items())
    return "" if far < 1e-5 else f"losses differ by {far:g}"


GONE = "rank RANK was ended by SIGKILL; starting again"
FAULTS: dict[str, tuple[str, Callable[[Bench, Path, int], str]]] = {
    "F1": ("rank 1 killed in a step", in_a_rank("F1", 1, GONE)),
    "F1t": ("rank 1 killed under torchrun", in_a_rank("F1", 1, "resuming from step-", torchrun=True)),
    "F2": ("rank 0 killed in a step", in_a_rank("F2", 0, GONE)),
    "F3": ("killed while a shard is written", in_a_rank("F3", None, GONE)),
    "F4": ("killed between shards and manifest", in_a_rank("F4", 0, GONE)),
    "F5": ("killed while an old checkpoint is deleted", in_a_rank("F5", 0, GONE)),
    "F6": ("launcher and ranks killed", launcher_killed),
    "F7": ("asked to stop in a step", in_a_rank("F7", None, "go on with --resume", "resuming from step-", again=True)),
    "F8": ("asked to stop in an evaluation", in_a_rank("F8", None, "resuming from step-", again=True)),
    "F9": ("asked to stop in a save", in_a_rank("F9", None, "resuming from step-", again=True)),
    "F10": ("a rank stands still", in_a_rank("F10", 1, "rank 0 has lost another one", "rank 1 was last heard of")),
    "F11": ("a rank leaves an exchange out", in_a_rank("F11", None, "has lost another one", "starting again")),
    "F13": ("no room for one rank's shard", in_a_rank("F13", None, "training goes on")),
    "F15": ("a bit flipped in a shard", damaged(flip, 1, "checksum")),
    "F16": ("a shard cut", damaged(lambda f: os.truncate(a_piece(f), 1000), 1, "bytes instead of")),
    "F17": ("a shard missing", damaged(lambda f: a_piece(f).unlink(), 1, "is missing")),
    "F18": ("a gradient that is no number on one rank", a_number_is_none),
    "F20": ("the newest two damaged", damaged(flip, 2, "checksum")),
    "F20b": ("all damaged: refused", all_damaged),
    "F21": ("two ranks, one, two", other_ranks),
    "F24": ("no memory left on one rank", in_a_rank("F24", None, "rank RANK", "starting again")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--repeats", type=int, default=1)
    asked = parser.parse_args()
    survived = tried = 0
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name))
        for fault in asked.faults or FAULTS:
            what, attempt = FAULTS[fault]
            wrong = [attempt(bench, Path(name) / f"{fault}-{seed}", seed) for seed in range(asked.repeats)]
            good = sum(not problem for problem in wrong)
            survived, tried = survived + good, tried + len(wrong)
            print(f"{fault} {what}: {good} of {len(wrong)}", *filter(None, wrong), sep="\n    ", flush=True)
    print(f"{survived} of {tried}")
    sys.exit(survived < tried)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "pretrain":
        from ronna import launch
        from ronna.cli import main as ronna

        launch.PROGRAM = (str(Path(__file__).resolve()),)
        if "RANK" in os.environ and "RONNA_FAULT" in os.environ:
            install(Where(**json.loads(os.environ["RONNA_FAULT"])))
        sys.exit(ronna())
    main()
