"""A training step of ours beside Hugging Face's: forward, backward, clipping, AdamW, on the same random tokens.

    python benchmarks/steps.py [mlm clm] [--rounds 2] [--default]

Each side runs in its own process, in turn (A B A B), so that neither warms or starves the other. `--default` also
runs Hugging Face as it comes (fp32, unfused). Prints one JSON line a side and round, then the ratio of medians and
the fraction of the machine's matrix rate, measured in the same run. Needs transformers.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

VOCAB, DIM, LAYERS, HEAD_DIM = 30522, 512, 4, 64
SHAPES = {"mlm": (32, 128), "clm": (16, 256)}  # sequences, tokens of each
STEPS, WARMUP = 6, 2


def ours(objective: str) -> Callable[[], None]:
    from ronna.base.device import choose_precision
    from ronna.base.heap import Heap
    from ronna.model.families import preset
    from ronna.model.init import build
    from ronna.model.sequences import Sequences
    from ronna.train.loop import gradients
    from ronna.train.optim import AdamW, build_optimizer, clip_gradients

    heap = Heap() if device() == "cpu" else None  # as a run has it
    name = "bert-tiny" if objective == "mlm" else "llama-tiny"
    hidden = 4 * DIM if objective == "mlm" else (8 * DIM // 3 + 63) // 64 * 64
    sizes = {"vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": LAYERS, "intermediate_size": hidden}
    _, cfg = preset(name, **sizes, num_attention_heads=DIM // HEAD_DIM, **kv(objective))
    model = build(cfg, 0).to(device()).train()
    model.compute, _ = choose_precision("bf16", model.device)
    optimizers = build_optimizer(AdamW(lr=1e-4), model.named_parameters())
    task, batch = fixed(objective, Sequences)

    def step() -> None:
        gradients(model, task, [batch()], seed=0)
        clip_gradients(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if heap:
            heap()
        model.zero_grad()

    return step


def kv(objective: str) -> dict[str, int]:
    return {} if objective == "mlm" else {"num_key_value_heads": DIM // HEAD_DIM}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def tokens(objective: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, L) and which of them are to be predicted, the same on both sides."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, SHAPES[objective], generator=rng)
    chosen = torch.rand(ids.shape, generator=rng) < (0.15 if objective == "mlm" else 2.0)
    return ids, chosen


def fixed(objective: str, sequences: type):
    """The objective and a maker of its batch; new `Sequences` each step, as in training."""
    from ronna.objectives.base import Batch
    from ronna.objectives.clm import CausalLM
    from ronna.objectives.mlm import MaskedLM, MLMConfig

    ids, chosen = tokens(objective)
    flat, predict = ids.flatten().to(device()), chosen.flatten().nonzero()[:, 0].to(device())
    lengths = [ids.shape[1]] * ids.shape[0]

    def batch() -> Batch:
        made = Batch(flat, sequences.of(lengths, device()), predict=predict, labels=flat[predict])
        return Batch(**{**vars(made), "counts": {objective: len(predict)}})

    task = CausalLM(0, 0) if objective == "clm" else MaskedLM(MLMConfig(nsp=False), None)  # type: ignore[arg-type]
    return task, batch


def theirs(objective: str, best: bool) -> Callable[[], None]:
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = DIM // HEAD_DIM
    sizes = {"vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": LAYERS, "num_attention_heads": heads}
    if objective == "mlm":
        model = BertForMaskedLM(BertConfig(**sizes, intermediate_size=4 * DIM))
    else:
        hidden = (8 * DIM // 3 + 63) // 64 * 64
        model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=hidden, tie_word_embeddings=True))
    model = model.to(device()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=best)
    ids, chosen = tokens(objective)
    labels = torch.where(chosen, ids, -100).to(device())
    ids = ids.to(device())
    mask = torch.ones_like(ids)

    def step() -> None:
        with torch.autocast(device(), torch.bfloat16, enabled=best):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def matrix_rate(size: int = 2048, repeats: int = 10) -> float:
    """Floating-point operations a second of a bf16 product of random matrices."""
    a = torch.randn(size, size, device=device()).bfloat16()
    seconds = timed(lambda: [a @ a for _ in range(repeats)], steps=3)
    return 2 * size**3 * repeats / seconds


def timed(work: Callable[[], object], steps: int, warmup: int = 1) -> float:
    times = []
    for _ in range(warmup + steps):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[warmup:])


def flops(objective: str) -> int:
    """Of one training step: three times the forward products that cannot be avoided."""
    from ronna.model.families import preset

    name = "bert-tiny" if objective == "mlm" else "llama-tiny"
    hidden = 4 * DIM if objective == "mlm" else (8 * DIM // 3 + 63) // 64 * 64
    sizes = {"vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": LAYERS, "intermediate_size": hidden}
    _, cfg = preset(name, **sizes, num_attention_heads=DIM // HEAD_DIM, **kv(objective))
    return 3 * cfg.flops(*SHAPES[objective], predicted=int(tokens(objective)[1].sum()))


def one_side(objective: str, side: str) -> None:
    step = ours(objective) if side == "ours" else theirs(objective, best=side == "hf best")
    seconds = timed(step, STEPS, WARMUP)
    count = SHAPES[objective][0] * SHAPES[objective][1]
    rate = matrix_rate()
    fraction = flops(objective) / seconds / rate
    line = {"objective": objective, "side": side, "tokens_per_second": round(count / seconds)}
    print(json.dumps({**line, "matrix_gflops": round(rate / 1e9), "fraction": round(fraction, 3)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objectives", nargs="*", default=["mlm", "clm"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--default", action="store_true")
    parser.add_argument("--side")
    a = parser.parse_args()
    if a.side:
        return one_side(a.objectives[0], a.side)
    for objective in a.objectives:
        found: dict[str, list[dict]] = {}
        for _ in range(a.rounds):
            for side in ["ours", "hf best"] + ["hf default"] * a.default:
                command = [sys.executable, __file__, objective, "--side", side]
                line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
                print(line, flush=True)
                found.setdefault(side, []).append(json.loads(line))
        speed = {s: statistics.median(x["tokens_per_second"] for x in lines) for s, lines in found.items()}
        ratios = {f"ours / {s}": round(speed["ours"] / v, 2) for s, v in speed.items() if s != "ours"}
        fraction = statistics.median(x["fraction"] for x in found["ours"])
        print(json.dumps({"objective": objective, **ratios, "fraction of the matrix rate": fraction}), flush=True)


if __name__ == "__main__":
    main()
