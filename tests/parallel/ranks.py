"""One rank of several, started by the tests beside it with the variables of torchrun: CASE FOLDER [RUN.json ...].

`gradients` compares losses and gradients of a model in shards with those of the same model whole; `runs` carries out
run files one after another. What was found is written to FOLDER/rank-N.json.
"""

import ctypes
import json
import os
import signal
import sys
import time
from dataclasses import replace
from functools import cache, partialmethod
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ronna.base.errors import RonnaError
from ronna.model.boxes import local, whole
from ronna.model.config import Model, without_dropout
from ronna.model.families import preset
from ronna.model.init import build
from ronna.model.loss import vocabulary_loss
from ronna.model.sequences import Sequences
from ronna.model.transformer import Transformer
from ronna.objectives.base import Batch, Loss, predicted_states
from ronna.parallel.pipeline import absent, learning, stages_of, whole_state
from ronna.parallel.sharded import gathered, shard
from ronna.parallel.world import ParallelConfig, RankLost, World, joined
from ronna.peft.houlsby import HoulsbyConfig
from ronna.peft.lora import LoraConfig
from ronna.peft.methods import adapt
from ronna.peft.prefix import PrefixConfig
from ronna.peft.prompt import PromptConfig
from ronna.run import Interrupted, execute
from ronna.runfile import FinetuneRun, PretrainRun
from ronna.train.loop import Run, Totals, gradients
from ronna.train.optim import clip_gradients

Gradients = dict[str, torch.Tensor]
FAMILIES = ("bert-tiny", "gpt2-tiny", "llama-tiny", "qwen3-0.6b", "modernbert-tiny", "t5-tiny")

ADAPTERS = {
    "lora": LoraConfig(rank=2),
    "houlsby": HoulsbyConfig(size=4),
    "prefix": PrefixConfig(tokens=3),
    "prompt": PromptConfig(tokens=3),
}


class Words:
    """Predict given words at given places, and where there is a classifier a class of each text."""

    def counts(self, batch):
        return {"words": len(batch.labels), "classes": len(batch.sequences)}

    def loss(self, model, batch):
        sums = {}
        if model.head is not None:
            sums["words"] = vocabulary_loss(model.head, predicted_states(model, batch), batch.labels)[0]
        if model.classifier is not None:
            scores = model.scores(batch.tokens, batch.sequences, batch.segments)
            sums["classes"] = F.cross_entropy(scores, batch.targets, reduction="sum")
        return Loss(sums)


def batch(number: int, cfg) -> Batch:
    """Texts of unequal lengths, others for every number."""
    rng = torch.Generator().manual_seed(number)
    lengths = torch.randint(3, 14, (2 + number % 3,), generator=rng).tolist()

    def words(n: int) -> torch.Tensor:
        return torch.randint(1, 99, (n,), generator=rng)

    source = words(sum(lengths)) if cfg.encoder and cfg.decoder else None
    places = torch.arange(0, sum(lengths), 2)
    made = Batch(
        tokens=words(sum(lengths)), sequences=Sequences.of(lengths), predict=places, labels=words(len(places)),
        source=source, source_sequences=None if source is None else Sequences.of(lengths),
        targets=torch.randint(0, 3, (len(lengths),), generator=rng),
    )  # fmt: skip
    return replace(made, counts=Words().counts(made))


def model_of(name: str, kind: str, layers: int = 2) -> Transformer:
    extra = {"num_key_value_heads": 2} if name.startswith(("llama", "qwen")) else {}
    extra |= {"head_dim": 8} if name.startswith("qwen") else {}
    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4}
    sizes |= {"d_kv": 8, "d_ff": 64} if name.startswith("t5") else {"intermediate_size": 64}
    if name.startswith("gpt2"):
        del sizes["intermediate_size"]
    family, cfg = preset(name, vocab_size=101, **sizes, **extra)
    cfg = without_dropout(cfg)
    if kind != "words":
        cfg = replace(cfg, head=None, classifier=family.classifier(cfg, 3, "sequence"))
    model = build(cfg, seed=1)
    noise = torch.Generator().manual_seed(2)
    for parameter in model.parameters():  # zeros and ones hide much
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=noise)
    if kind in ADAPTERS:
        adapt(model, ADAPTERS[kind], seed=3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=noise)
    return model


@torch.no_grad()
def logits(model: Transformer, batch: Batch) -> torch.Tensor:
    """As generating asks for them, or the scores of classes."""
    if model.head is None:
        return model.scores(batch.tokens, batch.sequences)
    memory = None if batch.source is None else model.encode(batch.source, batch.source_sequences)
    return model(batch.tokens, batch.sequences, None, memory)


def far(found: Gradients, wanted: Gradients) -> float:
    """How far gradients are off at the most, by the largest number of each tensor."""
    largest, worst = max(float(g.abs().max()) for g in wanted.values()), 0.0
    for n, g in wanted.items():
        if n not in found:  # another rank has it
            continue
        # A key's bias moves all scores of a query alike, so its gradient is zero but for rounding.
        scale = largest if n.endswith(".k.bias") else max(float(g.abs().max()), 1e-4 * largest)
        worst = max(worst, float((found[n] - g).abs().max()) / scale)
    return worst


def gradients_of(model: Transformer) -> Gradients:
    """Whole, copied."""
    return {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}


class Alone(NamedTuple):
    """What one process finds: in double precision, gradients in single too."""

    cfg: Model
    state: Gradients
    size: int
    logits: torch.Tensor
    totals: Totals
    gradients: Gradients
    single: Gradients
    norm: float
    clipped: Gradients  # to the largest of all numbers


@cache  # for every way to divide as many texts, in either precision
def alone(name: str, kind: str, layers: int, batches: int) -> Alone:
    one, single = model_of(name, kind, layers).double(), model_of(name, kind, layers)
    one.compute, cfg = torch.float64, one.cfg
    everything = [batch(number, cfg) for number in range(batches)]
    state = {n: t.float() for n, t in one.state_dict().items()}
    asked, totals = logits(one, batch(0, cfg)), gradients(one, Words(), everything, seed=0)
    gradients(single, Words(), everything, seed=0)
    found, size = gradients_of(one), sum(p.numel() for p in one.parameters())
    norm = float(clip_gradients(list(one.parameters()), max(float(g.abs().max()) for g in found.values())))
    return Alone(cfg, state, size, asked, totals, found, gradients_of(single), norm, gradients_of(one))


def compared(name: str, kind: str, world: World, precision: torch.dtype) -> dict[str, float]:
    """Two micro-batches a rank, the second of the last rank only there to stand in. The model of one process computes
    in double precision; `alone` is how far it is off in single, `single` how far the ranks are from that."""
    layers, parts = 2 * world.pipeline, world.size // world.together
    one, many = alone(name, kind, layers, 2 * parts - 1), model_of(name, kind, layers).to(precision)
    many.compute, cfg = precision, one.cfg
    mine = [batch(number, cfg) for number in range(2 * parts - 1)[world.part :: parts]]
    if len(mine) < 2:
        mine.append(batch(0, cfg).standing_in())
    shard(many, world, many.compute)
    apart = float((logits(many, batch(0, cfg)) - one.logits).abs().max() / one.logits.abs().max())
    totals = gradients(many, Words(), mine, seed=0, world=world)
    sums = world.total_sums(totals.sums)
    loss = max(abs(float(sums[t] / one.totals.sums[t]) - 1) for t in sums)
    found, wanted = gradients_of(many), one.gradients
    assert found.keys() == {n for n in wanted if not n.startswith(absent(many))} and totals.counts == one.totals.counts
    assert all(p.requires_grad == (n in found) for n, p in many.named_parameters())
    assert set(learning(many)) == wanted.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    norm = float(clip_gradients(list(many.parameters()), largest, stages_of(many)))
    clipped = max(float((g - one.clipped[n]).abs().max()) for n, g in gradients_of(many).items()) / largest
    held = sum(local(p).numel() for p in many.parameters()) / one.size
    with gathered(whole_state(many), world) as state:
        same = state is None or all(torch.equal(state[n].float(), t) for n, t in one.state.items())
    return {"loss": loss, "logits": apart, "gradient": far(found, wanted), "alone": far(one.single, wanted),
            "single": far(found, one.single), "norm": abs(norm / one.norm - 1),
            "clipped": clipped, "held": held, "same": same}  # fmt: skip


def narrowed(world: World) -> dict[str, float | list[str]]:
    """In bf16: how far all gradients together are off, and what blocks are gathered and gradients are added up in;
    and how many heaps there are by now."""
    one, many, seen = model_of("llama-tiny", "words"), model_of("llama-tiny", "words"), set()
    one.compute = many.compute = torch.bfloat16
    batches = [batch(number, one.cfg) for number in range(world.size)]
    gradients(one, Words(), batches, seed=0)
    shard(many, world, many.compute)
    up = many.decoder.blocks[0].ffn.up
    up.register_forward_hook(lambda module, given, made: seen.add(str(module.weight.dtype)))
    gradients(many, Words(), batches[world.rank : world.rank + 1], seed=0, world=world)
    found = dict(many.named_parameters())
    apart = sum(float((whole(found[n].grad) - p.grad).norm()) ** 2 for n, p in one.named_parameters()) ** 0.5
    size = sum(float(p.grad.norm()) ** 2 for p in one.parameters()) ** 0.5
    added = [str(up.weight.grad.dtype)]
    return {"far": apart / size, "gathered": sorted(seen), "added up": added, "heaps": heaps()}


def heaps() -> int:
    """Of this process, where glibc says it."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_info"):
        return 1
    libc.open_memstream.restype = ctypes.c_void_p
    libc.malloc_info.argtypes, libc.fclose.argtypes = [ctypes.c_int, ctypes.c_void_p], [ctypes.c_void_p]
    text, size = ctypes.c_char_p(), ctypes.c_size_t()
    stream = libc.open_memstream(ctypes.byref(text), ctypes.byref(size))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    return (text.value or b"").count(b"<heap nr=")


def case_gradients() -> list[dict]:
    """For each way to divide the ranks in DEGREES, in single and in double precision."""
    found = []
    for degrees in json.loads(os.environ["DEGREES"]):
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        with joined(ParallelConfig(**degrees), "cpu") as world:
            cases = [(name, "words") for name in FAMILIES] + [("bert-tiny", "classes")]
            cases += [("llama-tiny", "lora"), ("bert-tiny", "lora")]
            if "pipeline" in degrees:  # which T5 and adapters have none of
                cases = [case for case in cases if case[0] != "t5-tiny" and case[1] != "lora"]
                cases = cases if world.size == 2 else [case for case in cases if case[0] in ("gpt2-tiny", "llama-tiny")]
            if "context" in degrees and world.size == 2:
                cases += [("bert-tiny", "houlsby"), ("llama-tiny", "prefix"), ("llama-tiny", "prompt")]
            for precision in (torch.float32, torch.float64):
                found.append({f"{name} {kind}": compared(name, kind, world, precision) for name, kind in cases})
            if degrees == {} and world.size == 2:
                found[-2]["narrow"] = narrowed(world)
    return found


STEP = Run.step


def stopping(run: Run, at: int, window) -> None:
    """A step in which this rank is asked to stop."""
    if run.progress.step == at:
        os.kill(os.getpid(), signal.SIGTERM)
    STEP(run, window)


def hanging(run: Run, at: int, window) -> None:
    """A step that this rank does not come to before the others have given up."""
    if run.progress.step == at:
        time.sleep(12)
    STEP(run, window)


def case_runs(files: list[str]) -> list:
    """Each file: {"run": ..., "resume": ..., "stop" or "hang": [rank, step]}."""
    found = []
    for file in files:
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        asked = json.loads(Path(file).read_text())
        if asked.get("stop") and asked["stop"][0] == int(os.environ["RANK"]):
            Run.step = partialmethod(stopping, asked["stop"][1])
        if asked.get("hang") and asked["hang"][0] == int(os.environ["RANK"]):
            Run.step = partialmethod(hanging, asked["hang"][1])
        try:
            kind = FinetuneRun if asked["run"].get("verb") == "finetune" else PretrainRun
            report = execute(kind.model_validate(asked["run"]), resume=asked.get("resume", False))
            found.append("report" if report else "nothing")
        except Interrupted:
            found.append("interrupted")
        except (RonnaError, RankLost) as error:
            found.append(("again: " if getattr(error, "said", False) else "") + str(error))
        finally:
            Run.step = STEP
    return found


if __name__ == "__main__":
    case, folder, *files = sys.argv[1:]
    if "APART" in os.environ:  # or what two ranks say at the same time lies letter by letter in each other
        os.dup2(os.open(f"{folder}/rank-{os.environ['RANK']}.err", os.O_WRONLY | os.O_CREAT), 2)
    torch.set_num_threads(1)
    found = case_gradients() if case == "gradients" else case_runs(files)
    assert not dist.is_initialized()
    (Path(folder) / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
