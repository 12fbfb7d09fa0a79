"""What must hold before a run is worth its electricity, checked in seconds on the user's model and data."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import Parameter

from ronna.base.errors import RonnaError
from ronna.model.boxes import is_sharded, local
from ronna.model.recompute import recomputed_blocks
from ronna.model.sequences import Sequences
from ronna.model.transformer import Transformer
from ronna.objectives.base import Batch, Objective, Sample, collate, last_states, of_whole_batch
from ronna.parallel.sharded import rest
from ronna.train.loop import gradients

SAMPLES = 8  # of the first batch, enough for every check
SKETCH = 4096  # numbers of a tensor that are looked at one by one
PIECE = 2**22  # numbers of a tensor that are widened at a time


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    detail: str
    fix: str = ""


def check_start(model: Transformer, objective: Objective, micros: list[list[Sample]]) -> list[Check]:
    """All checks that need no optimizer step, on the micro-batches of the first step; later ones need earlier ones."""
    samples = [sample for micro in micros for sample in micro]
    if not samples:
        return [Check("supervision", False, "the first batch has no sample", "look at the data with `data inspect`")]
    few = shortest(samples, getattr(objective, "together", 1), max(map(tokens_of, micros)))
    checks = [supervision(objective, samples), ids_in_vocabulary(model, samples), lengths_fit(model, samples)]
    checks += [weights_tied(model), labels_in_set(model, samples)]
    if all(c.ok for c in checks):
        with still(model, model.compute):  # the leak in the precision, and so with the kernel, of the run
            checks.append(no_leak(model, objective, few))
        # Weights held or gathered in bf16 have gradients in bf16: products in fp32 would need copies that no step has.
        narrow = any(p.dtype == torch.bfloat16 for p in model.parameters() if p.requires_grad)
        with still(model, model.compute if narrow or is_sharded(model) else torch.float32):
            whole = of_whole_batch(objective)  # samples of an item are in need of each other then
            checks.append(accumulation(model, objective, next(filter(None, micros)) if whole else few))
    return checks


def tokens_of(samples: list[Sample]) -> int:
    return sum(len(s.tokens) + (0 if s.source is None else len(s.source)) for s in samples)


def shortest(samples: list[Sample], together: int, room: int) -> list[Sample]:
    """The shortest items, a few at least and otherwise no more tokens than there is `room` for in a step."""
    items = [samples[i : i + together] for i in range(0, len(samples), together)]
    items.sort(key=tokens_of)
    few, total = list[Sample](), 0
    for i, item in enumerate(items[: max(2, SAMPLES // together)]):
        total += tokens_of(item)
        if i < 2 or total <= room:
            few += item
    return few


def refuse_failed(checks: list[Check]) -> None:
    failed = [c for c in checks if not c.ok]
    if failed:
        raise RonnaError(
            "; ".join(f"{c.name}: {c.detail}" for c in failed),
            where="checks before training",
            fix=next((c.fix for c in failed if c.fix), "this is a fault of ours: please report it"),
        )


@contextmanager
def still(model: Transformer, compute: torch.dtype) -> Iterator[None]:
    """No dropout, and this precision, for the time of a check; leaves no gradient behind."""
    before, training = model.compute, model.training
    model.compute = compute
    model.eval()
    try:
        yield
    finally:
        model.compute = before
        model.train(training)
        rest(model)
        model.zero_grad()


def supervision(objective: Objective, samples: list[Sample]) -> Check:
    counts = collate(objective, samples).counts
    ok = sum(counts.values()) > 0
    said = ", ".join(f"{n} {term}" for term, n in counts.items())
    return Check("supervision", ok, f"the first batch has {said} targets", "no token or label to learn from")


def ids_in_vocabulary(model: Transformer, samples: list[Sample]) -> Check:
    vocab = model.cfg.embedding.vocab
    arrays = [a for s in samples for a in (s.tokens, s.labels, s.source) if a is not None and len(a)]
    low, high = min(int(a.min()) for a in arrays), max(int(a.max()) for a in arrays)
    fix = "the tokenizer is not this model's: use the one in the model's folder"
    return Check("vocabulary", low >= 0 and high < vocab, f"ids {low} to {high}, the model has {vocab}", fix)


def lengths_fit(model: Transformer, samples: list[Sample]) -> Check:
    limit = model.max_length
    longest = max(max(len(s.tokens), 0 if s.source is None else len(s.source)) for s in samples)
    ok = limit is None or longest <= limit
    return Check(
        "length",
        ok,
        f"{longest} tokens, the model has {limit or 'no limit of'} positions",
        "lower train.length",
    )


def weights_tied(model: Transformer) -> Check:
    if model.head is None or not model.head.cfg.tied:
        return Check("tied weights", True, "none to tie")
    ok = model.head.logits.weight is model.embedding.tokens.weight
    return Check("tied weights", ok, "head and embedding are one tensor" if ok else "head and embedding came apart")


def labels_in_set(model: Transformer, samples: list[Sample]) -> Check:
    classes = [s.target for s in samples if isinstance(s.target, int)]
    if model.classifier is None or not classes:
        return Check("labels", True, "no class labels")
    n = model.classifier.cfg.labels
    ok = min(classes) >= 0 and max(classes) < n
    return Check("labels", ok, f"classes {min(classes)} to {max(classes)}, the model has {n}", "correct the labels")


@torch.no_grad()
def no_leak(model: Transformer, objective: Objective, samples: list[Sample]) -> Check:
    """Changing every token of every other sequence must not change the rest by even one bit.

    Samples come shortest first, so that neighbours share a row where rows are shared at all.
    """
    if len(samples) < 2:
        return Check("document leak", True, "a single sequence")
    batch = collate(objective, samples, model.device)
    before = last_states(model, batch)
    after = last_states(model, disturbed(batch, model.cfg.embedding.vocab))
    rest = batch.sequences.owner % 2 == 0
    difference = float((before - after)[rest].abs().max())
    moved = float((before - after)[~rest].abs().max())
    ok = difference == 0.0 and moved > 0.0
    return Check("document leak", ok, f"largest difference in other documents {difference:g}")


def disturbed(batch: Batch, vocab: int) -> Batch:
    def change(tokens: Tensor | None, sequences: Sequences | None) -> Tensor | None:
        if tokens is None or sequences is None:
            return None
        return torch.where(sequences.owner % 2 == 1, (tokens + 1) % vocab, tokens)

    tokens = change(batch.tokens, batch.sequences)
    assert tokens is not None
    return replace(batch, tokens=tokens, source=change(batch.source, batch.source_sequences))


def accumulation(model: Transformer, objective: Objective, samples: list[Sample]) -> Check:
    """The gradient of a batch must not depend on how it is cut into micro-batches.

    One gradient at a time is held, and the activations and widened weights of one block: a check that needed more
    memory than the steps would decide how large a model can be trained.
    """
    first = getattr(objective, "together", 1)
    if len(samples) <= first:
        return Check("accumulation", True, "a single item")

    def gradient(parts: list[list[Sample]]) -> Sketches:
        model.zero_grad()
        batches = [collate(objective, p, model.device) for p in parts]
        with recomputed_blocks(model), Sketches(model) as found:
            gradients(model, objective, batches, seed=0)
        return found

    whole, cut = gradient([samples]), gradient([samples[:first], samples[first:]])
    if not whole.of:
        return Check("accumulation", True, "nothing to learn in the shortest items")
    none = torch.zeros(1, device=model.device)
    differences = [whole.of.get(p, none) - cut.of.get(p, none) for p in whole.of.keys() | cut.of.keys()]
    # Gradients are as narrow as their weights, which shards are gathered in.
    coarsest = max(torch.finfo(dtype).eps for dtype in [*(p.dtype for p in whole.of), model.compute])
    if coarsest < 1e-6:
        far, bound = max(float(d.abs().max()) for d in differences) / max(whole.largest, cut.largest, 1e-30), 1e-4
    else:  # in bf16 a table adds up the rows of its gradient one by one, so that single numbers are far off
        far, bound = size(differences) / max(whole.size, cut.size, 1e-30), 12 * coarsest
    return Check("accumulation", far < bound, f"gradients in one piece and in two differ by {far:.1e} of their size")


def size(tensors: Iterable[Tensor]) -> float:
    """Of all of them together: the Euclidean norm."""
    return math.hypot(*(float(torch.linalg.vector_norm(t)) for t in tensors))


class Sketches:
    """Inside, the gradient of each parameter is reduced to a sketch and freed as soon as it is there.

    of: sketches by parameter. As they are linear, those of micro-batches add up to that of the gradient's sum.
    largest, size: number in, and norm of, the sketches of single micro-batches, which may cancel in their sum.
    """

    def __init__(self, model: Transformer):
        self.model, self.of = model, dict[Parameter, Tensor]()
        self.largest = self.size = 0.0

    def __enter__(self) -> "Sketches":
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.hooks = [p.register_post_accumulate_grad_hook(self.take) for p in learning]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()
        for p in self.model.parameters():  # those of a model in shards come at the end of the backward pass, past hooks
            if p.grad is not None:
                self.take(p)

    def take(self, p: Parameter) -> None:
        """Called by autograd with the gradient of one backward pass."""
        assert p.grad is not None
        found, p.grad = sketch(local(p.grad)), None
        if not found.numel():  # of a tensor with fewer rows than there are ranks
            return
        self.largest, self.size = max(self.largest, float(found.abs().max())), math.hypot(self.size, size([found]))
        self.of[p] = self.of[p] + found if p in self.of else found


def sketch(x: Tensor) -> Tensor:
    """Some numbers of a tensor as they are, and the sums of its rows, which every number is in, in fp32.

    A sum of C numbers is divided by sqrt(C), so that it is as large as one of them where signs are mixed.
    """
    if not x.numel():
        return x.new_empty(0, dtype=torch.float32)
    rows = x.reshape(len(x), -1) if x.ndim else x.reshape(1, 1)
    columns = rows.shape[1]
    stride = max(1, x.numel() // SKETCH)
    while math.gcd(stride, columns) > 1:  # else it would meet the same columns in every row
        stride += 1
    sums = [part.sum(1, dtype=torch.float32) for part in rows.split(max(1, PIECE // columns))]
    return torch.cat([x.reshape(-1)[::stride].float(), *(part / columns**0.5 for part in sums)])


class FirstStep:
    """A hook for the first optimizer step: every trainable tensor must have got a gradient and have moved."""

    def __init__(
        self, model: Transformer, lr: Callable[[str], float], gradient_norm: Callable[[Parameter], float | None]
    ):
        """lr: of the first step, by a parameter's name."""
        self.model, self.lr, self.gradient_norm = model, lr, gradient_norm
        self.before = self.fingerprints()
        self.done = False

    def fingerprints(self) -> dict[str, int]:
        return {n: bits(local(p)) for n, p in self.model.named_parameters() if p.requires_grad}

    def __call__(self, step: int) -> None:
        if self.done:
            return
        self.done = True
        parameters = dict(self.model.named_parameters())
        after = self.fingerprints()
        norms = {n: self.gradient_norm(parameters[n]) for n in self.before}
        no_gradient = [n for n, norm in norms.items() if norm is None]
        finite = (n for n, norm in norms.items() if norm and math.isfinite(norm))
        visible = {n for n in finite if self.shows(self.lr(n), local(parameters[n]))}
        still = [n for n in visible if after[n] == self.before[n]]
        refuse_failed(
            [
                Check("gradients", not no_gradient, "none for " + ", ".join(sorted(no_gradient)[:5])),
                Check("first step", not still, "did not move: " + ", ".join(sorted(still)[:5])),
            ]
        )

    @staticmethod
    def shows(lr: float, p: Tensor) -> bool:
        """A step far below the spacing of floating-point numbers around a weight cannot move it, and moves one in many
        of a tensor whose weights are rounded by chance."""
        spacing = torch.finfo(p.dtype).eps * rms(p)
        return lr > 8 * spacing or (p.dtype == torch.bfloat16 and lr * p.numel() > 100 * spacing)


def bits(p: Tensor) -> int:
    """Sum of a tensor's bits, eight bytes at a time: as fast as memory, and another one for nearly any change."""
    flat = p.detach().reshape(-1).view(torch.uint8)
    whole = len(flat) // 8 * 8
    return int(flat[:whole].view(torch.int64).sum()) + int(flat[whole:].sum())


def rms(p: Tensor) -> float:
    pieces = p.detach().reshape(-1).split(PIECE)  # torch would widen all of it
    norms = [float(torch.linalg.vector_norm(piece, dtype=torch.float32)) for piece in pieces]
    return math.hypot(*norms) / max(1, p.numel()) ** 0.5
