"""What this machine really reaches: matrix products, passes over memory, optimizers; measured once and kept in a file.

A cost is the seconds of one unit of a kind of work; which kinds there are, `ronna.plan.work` says. Kinds that depend on
the precision begin with it: "bf16 linear" is a floating-point operation of a linear map computed in bf16.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ronna.base.errors import RonnaError

if TYPE_CHECKING:
    import torch

VERSION = 1  # of what is measured and how; another one's file is not read
SAMPLE = 0.012  # seconds for which each operation is called over and over
SLOW = 0.1  # seconds of a call that is not repeated
ROUNDS = 2  # over the shapes of linear maps, as a machine is not always equally fast
STREAM = 2**23  # numbers of a pass that no cache holds
# T rows of x, I inputs and O outputs of linear maps, as models of all sizes have them.
LINEAR = ((64, 256, 1024), (128, 1024, 256), (256, 128, 512), (256, 768, 768), (1024, 256, 256), (1024, 512, 2048),
          (1024, 128, 512), (2048, 768, 768), (2048, 384, 1536), (1024, 128, 16384))  # fmt: skip
# Matrices, queries and keys of each, size of a head.
BATCHED = ((256, 32, 32), (128, 128, 32), (128, 128, 64), (32, 256, 64), (8, 512, 64))
FLASH = (8, 1024, 64)  # heads, tokens, size of a head
ROWS, CHANNELS, KEYS = 8192, 512, 128  # of what is activated, normed and dropped; of a row of softmax
WORDS, TILE = (1024, 16384), 128  # rows and words of a softmax over a vocabulary, and rows at a time
WEIGHTS, TENSORS = 2**19, 16  # numbers of a tensor, tensors that an optimizer steps


@dataclass(frozen=True)
class Rates:
    """kind: cpu or cuda. costs: seconds of a unit of each kind of work. products: FLOP/s of large matrix products, by
    precision. bandwidth: bytes/s of a pass over memory."""

    kind: str
    name: str
    threads: int
    torch: str
    costs: dict[str, float]
    products: dict[str, float]
    bandwidth: float
    version: int = VERSION


def rates(device: str = "auto", threads: int | None = None, folder: Path | None = None) -> Rates:
    """Of the device, with so many threads (None: as many as torch takes). Some seconds the first time; after that out
    of a file in `folder` (None: the user's cache), as long as machine, threads and torch are the same.

    Raises RonnaError where the device is absent or the measurement ends without a result.
    """
    import torch

    from ronna.base.device import choose_device, describe

    chosen, count = choose_device(device), threads or torch.get_num_threads()
    name = describe(str(chosen)).name
    path = (folder or cache_folder()) / f"rates-{plain(f'{chosen.type}-{name}-{count}-{torch.__version__}')}.json"
    found = read(path)
    if found is None or (found.name, found.threads, found.torch) != (name, count, torch.__version__):
        found = measured_apart(str(chosen), name, count)
        write(path, found)
    return found


def known(kind: str, name: str, folder: Path | None = None) -> Rates | None:
    """The newest of what `rates` has left of a device, without a look at the device or at torch."""
    paths = (folder or cache_folder()).glob(f"rates-{plain(f'{kind}-{name}')}-*.json")
    for path in sorted(paths, key=lambda p: p.stat().st_mtime, reverse=True):
        if (found := read(path)) is not None and (found.kind, found.name) == (kind, name):
            return found
    return None


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/ronna`, or `~/.cache/ronna`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ronna"


def plain(text: str) -> str:
    return "".join(c if c.isalnum() or c in ".+" else "-" for c in text)


def read(path: Path) -> Rates | None:
    """What `write` wrote; None where there is no such file, or it is another version's or nobody's."""
    try:
        found = Rates(**json.loads(path.read_text("utf-8")))
        numbers = [found.bandwidth, *found.costs.values(), *found.products.values()]
        return found if found.version == VERSION and all(float(x) >= 0 for x in numbers) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def write(path: Path, found: Rates) -> None:
    """Whole or not at all; where the folder cannot be written to, the next one measures again."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(asdict(found), indent=1) + "\n", "utf-8")
        draft.replace(path)
    except OSError:
        return


def measured_apart(device: str, name: str, threads: int) -> Rates:
    """In a process of its own, which leaves neither memory nor threads behind."""
    code = f"from ronna.base.rates import main; main({device!r}, {threads})"
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    try:
        return Rates(name=name, **json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, TypeError, IndexError):
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(" ")]
        reason = (lines or ["no output"])[-1]
        fix = "give the device's rates in the plan, or try again"
        raise RonnaError(f"the machine could not be measured: {reason}", where=f"device {device}", fix=fix) from None


def main(device: str, threads: int) -> None:
    """Prints what it measures as one line of JSON."""
    import torch

    from ronna.base.device import choose_device
    from ronna.base.heap import Heap

    torch.set_num_threads(threads)
    chosen = choose_device(device)
    heap = Heap() if chosen.type == "cpu" else None  # as a run has it
    probe = Probe(chosen, heap)
    costs, products = dict[str, float](), dict[str, float]()
    stream, costs["bytes"] = probe.stream(), probe.bytes()
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        found, products[name] = probe.precision(dtype)
        costs |= {f"{name} {kind}": value for kind, value in found.items()}
    costs |= probe.optimizers()
    costs["calls"] = probe.call()
    print(json.dumps({"kind": chosen.type, "threads": threads, "torch": torch.__version__, "costs": costs,
                      "products": products, "bandwidth": 1 / stream}))  # fmt: skip


class Probe:
    """Times operations on a device."""

    def __init__(self, device: "torch.device", heap: Callable[[], None] | None):
        self.device, self.heap = device, heap

    def seconds(self, function: Callable[[], Any]) -> float:
        """Of a call: of many, one that a quarter beats, so that what else runs on the machine counts little."""
        function()
        self.wait()
        second = time.perf_counter()
        function()
        self.wait()
        if (took := time.perf_counter() - second) > SLOW:
            return took
        if self.heap is not None:
            self.heap()
        once, began, least = list[float](), time.perf_counter(), 5
        while time.perf_counter() - began < SAMPLE or len(once) < least:
            self.wait()
            start = time.perf_counter()
            function()
            self.wait()
            once.append(time.perf_counter() - start)
        return sorted(once)[len(once) // 4]

    def wait(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)

    def random(self, *shape: int, dtype: "torch.dtype") -> "torch.Tensor":
        import torch

        return torch.randn(*shape, device=self.device).to(dtype)

    def stream(self) -> float:
        """Seconds of a byte: of a sum of two tensors that is written to a third."""
        import torch

        x, y = (self.random(STREAM, dtype=torch.float32) for _ in range(2))
        out = torch.empty_like(x)
        return self.seconds(lambda: torch.add(x, y, out=out)) / (3 * STREAM * x.element_size())

    def bytes(self) -> float:
        """Seconds of a byte in passes as models have them: a sum, a cast, heads and tokens that change places."""
        import torch

        x, y = (self.random(STREAM, dtype=torch.float32) for _ in range(2))
        heads, size = x.view(16, -1, 8, 64), x.numel()
        passes: list[tuple[Callable[[], Any], int]] = [
            (lambda: x + y, 12 * size),
            (lambda: x.to(torch.bfloat16), 6 * size),
            (lambda: heads.transpose(1, 2).contiguous(), 8 * size),
        ]
        return sum(self.seconds(function) / moved for function, moved in passes) / len(passes)

    def precision(self, dtype: "torch.dtype") -> "tuple[dict[str, float], float]":
        """Costs in a precision, and the FLOP/s of the largest product."""
        found = dict[str, float]()
        samples = list(self.linear(dtype))
        found |= dict(zip(("linear", "linear operands", "linear calls"), fitted(samples), strict=True))
        best = max(flops / seconds for flops, _, seconds in samples)
        small = fitted(list(self.batched(dtype)))
        found |= dict(zip(("batched", "batched operands", "batched calls"), small, strict=True))
        found["flash"], found["flash backward"] = self.flash(dtype)
        for kind, numbers, function in self.passes(dtype):
            x = self.random(ROWS, CHANNELS, dtype=dtype).requires_grad_()
            y = function(x)
            gradient = self.random(*y.shape, dtype=dtype)
            found[kind] = self.seconds(partial(function, x)) / numbers
            found[f"{kind} backward"] = self.seconds(partial(backward, y, x, gradient)) / numbers
        x = self.random(ROWS, CHANNELS, dtype=dtype)
        if self.device.type == "cpu":
            _, mask = drop(x)
            found["dropout"] = self.seconds(lambda: drop(x)) / x.numel()
            found["dropout backward"] = self.seconds(lambda: keep(x, mask)) / x.numel()
        found["words"] = self.words(dtype)
        return found, best

    def linear(self, dtype: "torch.dtype") -> Iterator[tuple[float, float, float]]:
        """(FLOPs, bytes of operands, seconds) of products forward, for the input's gradient and the weights'."""
        import torch
        import torch.nn.functional as F

        for t, i, o in LINEAR * ROUNDS:
            x, w, g = (self.random(*s, dtype=dtype) for s in ((t, i), (o, i), (t, o)))
            size = (x.numel() + w.numel() + g.numel()) * x.element_size()
            for function in (partial(F.linear, x, w), partial(torch.matmul, g, w), partial(torch.matmul, g.T, x)):
                yield 2.0 * t * i * o, float(size), self.seconds(function)

    def batched(self, dtype: "torch.dtype") -> Iterator[tuple[float, float, float]]:
        import torch

        for b, n, d in BATCHED:
            q, k, v = (self.random(b // 8, 8, n, d, dtype=dtype) for _ in range(3))
            p = self.random(b // 8, 8, n, n, dtype=dtype)
            size = (q.numel() + k.numel() + p.numel()) * q.element_size()
            for left, right in ((q, k.transpose(-1, -2)), (p, v), (p.transpose(-1, -2), v)):
                yield 2.0 * b * n * n * d, float(size), self.seconds(partial(torch.matmul, left, right))

    def flash(self, dtype: "torch.dtype") -> tuple[float, float]:
        """Seconds of a floating-point operation forward, and backward, where there are 2.5 times as many."""
        import torch.nn.functional as F

        h, n, d = FLASH
        q, k, v = (self.random(1, h, n, d, dtype=dtype).requires_grad_() for _ in range(3))
        y = F.scaled_dot_product_attention(q, k, v)
        gradient, flops = self.random(*y.shape, dtype=dtype), 4 * h * n * n * d
        forward = self.seconds(lambda: F.scaled_dot_product_attention(q, k, v))
        return forward / flops, self.seconds(lambda: backward(y, (q, k, v), gradient)) / (2.5 * flops)

    def passes(self, dtype: "torch.dtype") -> "Iterator[tuple[str, int, Callable[[torch.Tensor], torch.Tensor]]]":
        """Operations that look at each number of (ROWS, CHANNELS)."""
        import torch
        import torch.nn.functional as F

        size, ones = ROWS * CHANNELS, torch.ones(CHANNELS, device=self.device)
        narrow = ones.to(dtype)
        yield "gelu", size, F.gelu
        yield "gelu_tanh", size, lambda x: F.gelu(x, approximate="tanh")
        yield "silu", size, F.silu
        yield "relu", size, F.relu
        yield "tanh", size, torch.tanh
        yield "softmax", size, lambda x: x.view(-1, KEYS).softmax(-1)
        seen = torch.ones(KEYS, KEYS, dtype=torch.bool, device=self.device).tril()
        yield "mask", size, lambda x: x.view(-1, KEYS, KEYS).masked_fill(~seen, float("-inf"))
        both = ones if self.device.type == "cpu" else narrow
        yield "layer", size, lambda x: F.layer_norm(x, (CHANNELS,), both, both)
        yield "rms", size, lambda x: F.rms_norm(x, (CHANNELS,), narrow)

    def words(self, dtype: "torch.dtype") -> float:
        """Seconds of a logit from its product to its gradient."""
        import torch

        logits = self.random(*WORDS, dtype=dtype)

        def softmax() -> None:
            for tile in logits.split(TILE):
                tile.copy_(torch.log_softmax(tile, -1, dtype=torch.float32).exp_())

        return self.seconds(softmax) / logits.numel()

    def optimizers(self) -> dict[str, float]:
        """Seconds of a weight's step, in fp32."""
        import torch

        weights = [torch.nn.Parameter(self.random(512, WEIGHTS // 512, dtype=torch.float32)) for _ in range(TENSORS)]
        for w in weights:
            w.grad = torch.randn_like(w)
        made = {"adamw": torch.optim.AdamW(weights, fused=True), "sgd": torch.optim.SGD(weights, momentum=0.9),
                "adafactor": torch.optim.Adafactor(weights)}  # fmt: skip
        return {kind: self.seconds(one.step) / (WEIGHTS * TENSORS) for kind, one in made.items()}

    def call(self) -> float:
        """Seconds of an operation on next to nothing, forward or backward."""
        import torch
        import torch.nn.functional as F

        x = self.random(8, 8, dtype=torch.float32)
        w = self.random(8, 8, dtype=torch.float32).requires_grad_()

        def chain() -> None:
            y = x
            for _ in range(8):
                y = F.relu(F.linear(y, w)) + x
            y.sum().backward()

        return self.seconds(chain) / (8 * 6)  # of each round three forward, and theirs backward


def drop(x: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """Of the work of `ronna.model.layers.CheapDropout`, all that costs."""
    import numpy as np
    import torch

    words = np.random.SFC64(1).random_raw(x.numel() // 4).view(np.int16)
    kept = (words < 0).view(np.int8)
    mask = torch.from_numpy(np.subtract(kept, 1, out=kept)).view(x.shape)
    return keep(x, mask), mask


def keep(x: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
    import torch

    bits = x.view(torch.int16 if x.element_size() == 2 else torch.int32)
    return mask.to(bits.dtype).bitwise_and_(bits).view(x.dtype).mul_(2.0)


def backward(y: "torch.Tensor", x: Any, gradient: "torch.Tensor") -> None:
    import torch

    torch.autograd.grad(y, x, gradient, retain_graph=True)


def fitted(samples: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Of (FLOPs, bytes, seconds): seconds of a FLOP, of a byte and of a call, none below 0, that come nearest to all
    samples relative to their seconds."""
    import torch

    rows = torch.tensor([(flops / s, size / s, 1 / s) for flops, size, s in samples], dtype=torch.float64)
    best = (float("inf"), torch.zeros(3, dtype=torch.float64))
    for chosen in ((0, 1, 2), (0, 1), (0, 2), (0,)):
        a = rows[:, chosen]
        scale = a.norm(dim=0)
        x = torch.linalg.lstsq(a / scale, torch.ones(len(a), 1, dtype=torch.float64)).solution[:, 0] / scale
        error = float(((a @ x) - 1).square().sum())
        if bool((x >= 0).all()) and error < best[0]:
            full = torch.zeros(3, dtype=torch.float64)
            full[list(chosen)] = x
            best = (error, full)
    return float(best[1][0]), float(best[1][1]), float(best[1][2])
