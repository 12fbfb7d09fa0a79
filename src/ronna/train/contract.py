"""What must hold before a run is worth its electricity, checked in seconds on the user's model and data."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import Parameter

from ronna.base.errors import RonnaError
from ronna.model.sequences import Sequences
from ronna.model.transformer import Transformer
from ronna.objectives.base import Batch, Objective, Sample, collate, last_states, of_whole_batch
from ronna.train.loop import gradients

SAMPLES = 8  # of the first batch, enough for every check


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
    together = getattr(objective, "together", 1)
    items = [samples[i : i + together] for i in range(0, len(samples), together)]
    items.sort(key=lambda item: sum(len(s.tokens) for s in item))
    few = [s for item in items[: max(2, SAMPLES // together)] for s in item]
    checks = [supervision(objective, samples), ids_in_vocabulary(model, samples), lengths_fit(model, samples)]
    checks += [weights_tied(model), labels_in_set(model, samples)]
    if all(c.ok for c in checks):
        with still(model, model.compute):  # the leak in the precision, and so with the kernel, of the run
            checks.append(no_leak(model, objective, few))
        with still(model, torch.float32):
            whole = of_whole_batch(objective)  # samples of an item are in need of each other then
            checks.append(accumulation(model, objective, next(filter(None, micros)) if whole else few))
    return checks


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
    """The gradient of a batch must not depend on how it is cut into micro-batches."""
    first = getattr(objective, "together", 1)
    if len(samples) <= first:
        return Check("accumulation", True, "a single item")

    def gradient(parts: list[list[Sample]]) -> dict[str, Tensor]:
        model.zero_grad()
        gradients(model, objective, [collate(objective, p, model.device) for p in parts], seed=0)
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    whole, cut = gradient([samples]), gradient([samples[:first], samples[first:]])
    scale = max(float(g.abs().max()) for g in whole.values())
    worst = max(float((whole[n] - cut[n]).abs().max()) for n in whole) / max(scale, 1e-30)
    coarsest = max(torch.finfo(g.dtype).eps for g in whole.values())  # gradients are as narrow as their weights
    ok = worst < max(1e-4, 4 * coarsest)
    return Check("accumulation", ok, f"gradients in one piece and in two differ by {worst:.1e} of the largest")


class FirstStep:
    """A hook for the first optimizer step: every trainable tensor must have got a gradient and have moved."""

    def __init__(self, model: Transformer, lr: Callable[[], float], gradient_norm: Callable[[Parameter], float | None]):
        self.model, self.lr, self.gradient_norm = model, lr, gradient_norm
        self.before = self.fingerprints()
        self.done = False

    def fingerprints(self) -> dict[str, int]:
        return {n: bits(p) for n, p in self.model.named_parameters() if p.requires_grad}

    def __call__(self, step: int) -> None:
        if self.done:
            return
        self.done = True
        parameters = dict(self.model.named_parameters())
        after = self.fingerprints()
        norms = {n: self.gradient_norm(parameters[n]) for n in self.before}
        no_gradient = [n for n, norm in norms.items() if norm is None]
        visible = {n for n, norm in norms.items() if norm and math.isfinite(norm) and self.shows(parameters[n])}
        still = [n for n in visible if after[n] == self.before[n]]
        refuse_failed(
            [
                Check("gradients", not no_gradient, "none for " + ", ".join(sorted(no_gradient)[:5])),
                Check("first step", not still, "did not move: " + ", ".join(sorted(still)[:5])),
            ]
        )

    def shows(self, p: Tensor) -> bool:
        """A step far below the spacing of floating-point numbers around a weight cannot move it, and moves one in many
        of a tensor whose weights are rounded by chance."""
        spacing = torch.finfo(p.dtype).eps * rms(p)
        return self.lr() > 8 * spacing or (p.dtype == torch.bfloat16 and self.lr() * p.numel() > 100 * spacing)


def bits(p: Tensor) -> int:
    """Sum of a tensor's bits, eight bytes at a time: as fast as memory, and another one for nearly any change."""
    flat = p.detach().reshape(-1).view(torch.uint8)
    whole = len(flat) // 8 * 8
    return int(flat[:whole].view(torch.int64).sum()) + int(flat[whole:].sum())


def rms(p: Tensor) -> float:
    return float(torch.linalg.vector_norm(p.detach(), dtype=torch.float32)) / max(1, p.numel()) ** 0.5
