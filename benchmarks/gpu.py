"""Training steps on a GPU, ours beside Hugging Face's: forward, backward, clipping, AdamW, on the same random tokens.

    python benchmarks/gpu.py [CASE ...] [--rounds 1] [--sides ours hf hf-compiled] [--profile]

Each side of each case has its own process, in turn. Printed as JSON are tokens a second, the share of the card's bf16
matrix rate (8,192 square, random, measured in the same process) that the step's products make up, and the most that
torch had reserved. Products that have to be computed count once: no credit for computing again or for what causality
hides; `with_hidden` counts the latter too, as most published figures do. Needs transformers and, for `lora` and
`adalora`, peft.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from steps import matrix_rate

STEPS, WARMUP = 6, 3


@dataclass(frozen=True)
class Case:
    """rows, length: of a micro-batch; `micro` of them are a step."""

    task: str  # mlm, clm
    preset: str
    rows: int
    length: int
    settings: dict[str, Any] = field(default_factory=dict)
    masked: float = 1.0
    adapter: str | None = None
    micro: int = 1


def llama(layers: int, dim: int, hidden: int, heads: int) -> dict[str, int]:
    sizes = {"num_hidden_layers": layers, "hidden_size": dim, "intermediate_size": hidden, "vocab_size": 32000}
    return sizes | {"num_attention_heads": heads, "num_key_value_heads": heads}


LLAMA_1B = llama(24, 2048, 5504, 16) | {"max_position_embeddings": 4096}
CASES = {
    "decoder": Case("clm", "llama-1b", 16, 2048, LLAMA_1B, micro=4),
    "decoder-4k": Case("clm", "llama-1b", 8, 4096, LLAMA_1B),
    "decoder-3b": Case("clm", "llama-1b", 8, 2048, llama(28, 3072, 8192, 24) | {"max_position_embeddings": 4096}),
    "encoder": Case(
        "mlm", "bert-base", 64, 1024,
        {"max_position_embeddings": 1024, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, 0.3,
    ),
    "modernbert": Case("mlm", "modernbert-base", 64, 1024, {}, 0.3),
    "lora": Case("clm", "llama-3-8b", 4, 2048, adapter="lora"),
    "adalora": Case("clm", "llama-3-8b", 4, 2048, adapter="adalora"),
}  # fmt: skip


def tokens(case: Case, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, L) and which of them are to be predicted, the same on all sides."""
    rng = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(0, vocab, (case.rows, case.length), generator=rng, device="cpu")
    return ids, torch.rand(ids.shape, generator=rng, device="cpu") < case.masked


def ours(case: Case) -> tuple[Callable[[int], None], int, int]:
    """A step, and the floating-point operations of its products: without and with those that causality hides."""
    from ronna.model.compiled import compile_blocks
    from ronna.model.families import preset
    from ronna.model.init import hold
    from ronna.model.sequences import Sequences
    from ronna.model.transformer import Transformer
    from ronna.objectives.base import Batch
    from ronna.objectives.clm import CausalLM
    from ronna.objectives.mlm import MaskedLM, MLMConfig
    from ronna.train.loop import TrainConfig, gradients
    from ronna.train.optim import AdamW
    from ronna.train.stepping import stepping

    _, cfg = preset(case.preset, **case.settings)
    with torch.device("meta"):
        model = Transformer(cfg)
    if case.adapter:
        hold(model, torch.bfloat16)
    model.to_empty(device="cuda")
    model.tie()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0) if p.ndim == 1 else p.normal_(0, 0.02)
    model.train()
    model.compute = torch.bfloat16
    hooks, penalty = adapted(model, case)
    compile_blocks(model)
    ids, chosen = tokens(case, cfg.embedding.vocab)
    flat, predict = ids.flatten().cuda(), chosen.flatten().nonzero()[:, 0].cuda()
    objective: Any = CausalLM(0, 0) if case.task == "clm" else MaskedLM(MLMConfig(nsp=False), None)  # type: ignore[arg-type]
    objective = penalty(objective)
    update = stepping(model, AdamW(lr=1e-4), TrainConfig(), None, None).update

    def batch() -> Batch:
        made = Batch(flat, Sequences.of([case.length] * case.rows, "cuda"), predict=predict, labels=flat[predict])
        return Batch(**{**vars(made), "counts": objective.counts(made)})

    def step(number: int) -> None:
        batches = [batch() for _ in range(case.micro)]
        update(lambda walk: gradients(model, objective, batches, number, walk), number)
        for hook in hooks:
            hook(number)
        for p in model.parameters():
            p.grad = None

    passes = 2 if case.adapter else 3  # frozen matrices have no gradient
    with_hidden = passes * case.micro * cfg.flops(case.rows, case.length, predicted=len(predict))
    hidden = 0
    if case.task == "clm":
        block = cfg.last.blocks[0].attention
        pairs = case.rows * case.length * (case.length - 1) // 2
        hidden = 3 * case.micro * 4 * pairs * block.heads * block.head_dim * len(cfg.last.blocks)
        with_hidden += (3 - passes) * 2 * hidden  # but every score has
    return step, with_hidden - hidden, with_hidden


def adapted(model: Any, case: Case) -> tuple[list[Callable[[int], None]], Callable[[Any], Any]]:
    from ronna.objectives.penalty import Penalised
    from ronna.peft.adalora import AdaLoraConfig, Allocator, orthogonality, triplets_of
    from ronna.peft.lora import LoraConfig
    from ronna.peft.methods import NAME, adapt, freeze_to

    if case.adapter is None:
        return [], lambda objective: objective
    adapt(model, LoraConfig(rank=8) if case.adapter == "lora" else AdaLoraConfig())
    freeze_to(model, model.compute)
    if case.adapter == "lora":
        return [], lambda objective: objective
    changes = triplets_of(model, NAME)
    allocator = Allocator(changes, AdaLoraConfig(), STEPS + WARMUP + 20)
    return [allocator], lambda o: Penalised(o, "orthogonality", lambda: 0.5 * orthogonality(changes))


def theirs(case: Case, compiled: bool) -> Callable[[int], None]:
    import transformers as hf

    sizes = dict(case.settings)
    torch.manual_seed(0)
    kinds: dict[str, Any] = {
        "llama": (hf.LlamaConfig, hf.LlamaForCausalLM), "bert": (hf.BertConfig, hf.BertForMaskedLM),
        "modernbert": (hf.ModernBertConfig, hf.ModernBertForMaskedLM),
    }  # fmt: skip
    if case.preset == "llama-3-8b":
        sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                 "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
    config, kind = kinds[case.preset.split("-")[0]]
    torch.set_default_dtype(torch.bfloat16 if case.adapter else torch.float32)
    with torch.device("cuda"):
        model = kind(config(**sizes))
    torch.set_default_dtype(torch.float32)
    if case.adapter:
        import peft

        maps = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        shared = {"target_modules": maps, "lora_alpha": 16, "task_type": "CAUSAL_LM"}
        if case.adapter == "lora":
            model = peft.get_peft_model(model, peft.LoraConfig(r=8, **shared))
        else:
            ada = {"init_r": 12, "target_r": 8, "tinit": 2, "tfinal": 4, "deltaT": 1, "total_step": 32}
            model = peft.get_peft_model(model, peft.AdaLoraConfig(**ada, **shared))
    model = model.to("cuda").train()
    learning = [p for p in model.parameters() if p.requires_grad]
    for p in learning:
        p.data = p.data.float()
    optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=True)
    ids, chosen = tokens(case, model.config.vocab_size)
    labels = torch.where(chosen, ids, -100).cuda()
    ids = ids.cuda()
    run = torch.compile(model) if compiled else model

    def step(number: int) -> None:
        for _ in range(case.micro):
            with torch.autocast("cuda", torch.bfloat16):
                loss = run(input_ids=ids, labels=labels).loss / case.micro
            loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        if case.adapter == "adalora":
            model.base_model.update_and_allocate(number)
        optimizer.zero_grad()

    return step


def one_side(name: str, side: str, profile: bool) -> None:
    case, line = CASES[name], {"case": name, "side": side}
    began = time.perf_counter()
    work: tuple[int, ...] = ()
    if side == "ours":
        step, *counted = ours(case)
        work = tuple(counted)
    else:
        step = theirs(case, side == "hf-compiled")
    times = []
    for number in range(WARMUP + STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(number)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[WARMUP:])
    reserved = torch.cuda.max_memory_reserved() / 2**30
    if profile:
        profiled(step)
    rate = matrix_rate(8192)
    count = case.rows * case.length * case.micro
    line |= {"tokens_per_second": round(count / seconds), "reserved_gib": round(reserved, 2)}
    line |= {"matrix_tflops": round(rate / 1e12), "first_step_s": round(times[0], 1)}
    if work:
        line |= {"share": round(work[0] / seconds / rate, 3), "with_hidden": round(work[1] / seconds / rate, 3)}
    line |= {"whole_s": round(time.perf_counter() - began, 1)}
    print(json.dumps(line), flush=True)


def profiled(step: Callable[[int], None]) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        for number in (100, 101):
            step(number)
        torch.cuda.synchronize()
    table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=24, max_name_column_width=70)
    keep = [line for line in table.splitlines() if line.strip()]
    print("\n".join(f"{line[:72]} {' '.join(line[72:].split()[-8:])}" for line in keep), file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sides", nargs="+", default=["ours", "hf"], choices=["ours", "hf", "hf-compiled"])
    parser.add_argument("--profile", action="store_true", help="what takes the time, on stderr")
    parser.add_argument("--limit", type=float, default=300, help="seconds a side may take")
    parser.add_argument("--one")
    a = parser.parse_args()
    if not torch.cuda.is_available():
        return print("no GPU here", file=sys.stderr)
    if a.one:
        return one_side(a.cases[0], a.one, a.profile)
    for name in a.cases:
        speed: dict[str, list[float]] = {}
        for side in a.sides * a.rounds:
            command = [sys.executable, __file__, name, "--one", side, *["--profile"] * (a.profile and side == "ours")]
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=a.limit)
            except subprocess.TimeoutExpired:
                print(json.dumps({"case": name, "side": side, "failed": f"not done in {a.limit} s"}), flush=True)
                continue
            if done.returncode:
                print(json.dumps({"case": name, "side": side, "failed": done.stderr[-1500:]}), flush=True)
                continue
            if a.profile and done.stderr:
                print(done.stderr[-6000:], file=sys.stderr, flush=True)
            line = json.loads(done.stdout.splitlines()[-1])
            print(json.dumps(line), flush=True)
            speed.setdefault(side, []).append(line["tokens_per_second"])
        middle = {side: statistics.median(found) for side, found in speed.items()}
        if "ours" in middle and len(middle) > 1:
            ratios = {f"ours / {s}": round(middle["ours"] / v, 2) for s, v in middle.items() if s != "ours"}
            print(json.dumps({"case": name, **ratios}), flush=True)


if __name__ == "__main__":
    main()
