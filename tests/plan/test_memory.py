"""The planner's bytes beside those that torch holds: kept for the backward pass, by optimizers, and at the peak."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from ronna.asked import adapter_for
from ronna.base.errors import RonnaError
from ronna.model import loss
from ronna.model.config import Model
from ronna.model.families import PRESETS, classifier_for, preset, with_dropout
from ronna.model.init import build
from ronna.model.sequences import Sequences, View
from ronna.model.transformer import Transformer
from ronna.objectives.base import Batch, Sample, collate
from ronna.objectives.clm import CausalLM
from ronna.objectives.denoise import Denoise, DenoiseConfig
from ronna.objectives.mlm import MaskedLM, MLMConfig
from ronna.peft.methods import adapt, freeze_to
from ronna.plan.memory import Step, estimate
from ronna.plan.shapes import Adapter, Lengths
from ronna.plan.weights import Optimizer, adapted, states, weights
from ronna.planned import peft_of
from ronna.tasks.classify import Classify, ClassifyConfig
from ronna.train.optim import SGD, Adafactor, Adam, AdamW, Muon, build_optimizer
from ronna.train.rows import EmbeddingRows

VOCAB = 211
PATHS = [preset(name)[0].name for name in PRESETS]


def first_of_each_family() -> list[str]:
    return [name for i, name in enumerate(PRESETS) if PATHS.index(PATHS[i]) == i]


def small(name: str, task: str = "lm", dropout: float = 0.0, **settings: Any) -> Model:
    """A preset with few blocks and words."""
    family, model = preset(name, **({"vocab_size": VOCAB, "num_hidden_layers": 3} | settings))
    model = with_dropout(family, model, dropout)
    return replace(model, head=None, classifier=classifier_for(family, model, 3)) if task == "classify" else model


def samples(model: Model, lengths: list[int], task: str) -> list[Sample]:
    rng = np.random.default_rng(0)
    made = []
    for n in lengths:
        tokens = rng.integers(0, VOCAB, n)
        if task == "classify":
            made.append(Sample(tokens, segments=np.zeros_like(tokens), target=1))
        elif model.encoder and model.decoder:
            target = rng.integers(0, VOCAB, n // 2)
            made.append(Sample(target, np.arange(n // 2), target, source=tokens))
        elif model.decoder:
            made.append(Sample(tokens, np.arange(n), tokens))
        else:
            at = np.arange(n // 4)
            made.append(Sample(tokens, at, tokens[at], np.zeros_like(tokens)))
    return made


def objective(model: Model, task: str) -> Any:
    unread: Any = None
    if task == "classify":
        return Classify(ClassifyConfig(), unread, "single", ["a", "b", "c"], 512)
    if model.encoder and model.decoder:
        return Denoise(DenoiseConfig(), (), 0, 1)
    return CausalLM(0, 1) if model.decoder else MaskedLM(MLMConfig(nsp=False), unread)


def step_of(model: Model, lengths: list[int], task: str, **others: Any) -> Step:
    both = bool(model.encoder and model.decoder)
    own = [n // 2 for n in lengths] if both else lengths
    masked = task == "lm" and not model.decoder
    return Step(
        Lengths.of(own),
        source=Lengths.of(lengths) if both else None,
        predicted=sum(n // 4 for n in lengths) if masked else None,
        **others,
    )


def tensors(thing: Any) -> Iterator[torch.Tensor]:
    """All that a batch holds, with what it has made for all layers."""
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict | list | tuple):
        for part in thing.values() if isinstance(thing, dict) else thing:
            yield from tensors(part)
    elif isinstance(thing, Batch | Sequences | View):
        yield from tensors(vars(thing))


def kept_bytes(model: Transformer, task: str, lengths: list[int]) -> int:
    """Of all storages that autograd keeps for the backward pass, but for weights and what a batch holds or is looked
    up by."""
    work = objective(model.cfg, task)
    batch = collate(work, samples(model.cfg, lengths, task))
    EmbeddingRows(model)
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype != torch.int64:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, patch.object(loss, "saved_tensors_hooks", lambda *_: nullcontext()):  # it hides its own from others
        total = work.loss(model.train(), batch)
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *tensors(batch))}
    assert total.sums
    return sum(storage.nbytes() for place, storage in found.items() if place not in known)


def planned_bytes(model: Model, step: Step) -> int:
    plan = estimate(model, step)
    table = 0 if model.head is None or step.adapter else model.embedding.vocab * model.dim * 4
    return sum(plan.activations) + plan.ends + plan.casts + plan.loss + table


def built(model: Model, step: Step) -> Transformer:
    made = build(model, 0)
    made.compute = {"fp32": torch.float32, "bf16": torch.bfloat16}[step.compute]
    if step.adapter is not None:
        adapt(made, peft_of(step.adapter))
        freeze_to(made, made.compute)
    return made


FULL, RAGGED = [40] * 4, [40, 37, 22, 9, 8]


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", first_of_each_family())
def test_kept_for_the_backward_pass(name: str, dropout: float, compute: Any) -> None:
    model = small(name, dropout=dropout)
    for lengths in (FULL, RAGGED):
        step = step_of(model, lengths, "lm", compute=compute)
        assert planned_bytes(model, step) == kept_bytes(built(model, step), "lm", lengths)


@pytest.mark.parametrize(
    ("name", "lengths", "settings"),
    [
        ("llama-tiny", [600, 530], {"max_position_embeddings": 700}),  # the flash kernel
        ("llama-tiny", [40] * 3, {"num_key_value_heads": 2}),
        ("qwen3-0.6b", [40] * 2, {"hidden_size": 64, "num_hidden_layers": 1}),
        (
            "llama-tiny",
            [40] * 2,
            {"hidden_size": 1536, "num_attention_heads": 4, "num_hidden_layers": 1},
        ),  # large weights
        ("modernbert-tiny", [300, 290, 40], {}),  # a window
        ("bert-tiny", [40], {}),  # one row
        ("bert-tiny", [9, 8], {}),  # too few to join the weights
    ],
)
def test_kept_by_other_kernels(name: str, lengths: list[int], settings: dict[str, Any]) -> None:
    model = small(name, **settings)
    step = step_of(model, lengths, "lm", compute="bf16")
    assert planned_bytes(model, step) == kept_bytes(built(model, step), "lm", lengths)


ADAPTERS = {
    "all": None,
    "lora": Adapter(4),
    "lora of two maps": Adapter(8, ("q", "v")),
    "houlsby": adapter_for("houlsby", 16),
    "bitfit": adapter_for("bitfit", None),
    "prompt": adapter_for("prompt", 5),
    "prefix": adapter_for("prefix", 8),
}


REFUSED = {("modernbert-tiny", "bitfit"), ("llama-tiny", "bitfit"), ("modernbert-tiny", "prefix")}


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("name", ["bert-tiny", "modernbert-tiny", "gpt2-tiny", "llama-tiny"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_kept_by_a_classifier(name: str, adapter: Adapter | None, compute: Any) -> None:
    model = small(name, "classify", dropout=0.1)
    led = adapter.rank if adapter and adapter.kind == "prompt" else 0
    step = step_of(model, [n + led for n in RAGGED], "classify", compute=compute, adapter=adapter)
    if adapter and (name, adapter.kind) in REFUSED:
        with pytest.raises(RonnaError, match=r"peft\.kind"):
            built(model, step)
        return
    made = built(model, step)
    near = {"houlsby": 1e-3, "bitfit": 2e-3, "prompt": 0.03, "prefix": 0.005}.get(adapter.kind if adapter else "", 0.0)
    assert planned_bytes(model, step) == pytest.approx(kept_bytes(made, "classify", RAGGED), rel=near, abs=0)
    learning = sum(p.nbytes for p in made.parameters() if p.requires_grad)
    assert learning == 4 * sum(w.size for w in (adapted(model, adapter) if adapter else weights(model)))


def test_large_weights_are_not_held_twice_under_an_adapter() -> None:
    model = small("bert-tiny", "classify", hidden_size=1536, num_attention_heads=4)  # the second block's have a use
    step = step_of(model, [40] * 2, "classify", compute="bf16", adapter=Adapter(4))
    kept = kept_bytes(built(model, step), "classify", [40] * 2)
    assert planned_bytes(model, step) == kept
    assert kept < 2 * 3 * 1536**2  # which joined queries, keys and values would take


@pytest.mark.parametrize("name", PRESETS)
def test_weights_by_shape(name: str) -> None:
    model = preset(name)[1]
    assert sum(w.size for w in weights(model)) == model.params()


@pytest.mark.parametrize("name", first_of_each_family())
def test_weights_are_those_of_a_built_model(name: str) -> None:
    model = small(name)
    shapes_of = sorted((w.rows, w.columns) for w in weights(model) for _ in range(w.times))
    found = sorted((p.shape[0], p.shape[1] if p.ndim == 2 else 0) for p in build(model, 0).parameters())
    assert [s for s in shapes_of if s[1]] == [s for s in found if s[1]]
    assert sum(rows for rows, columns in shapes_of if not columns) == sum(n for n, columns in found if not columns)


@pytest.mark.parametrize(
    ("config", "planned"),
    [
        (AdamW(), Optimizer()),
        (Adam(), Optimizer("adam")),
        (SGD(), Optimizer("sgd")),
        (SGD(momentum=0.0), Optimizer("sgd", momentum=False)),
        (Adafactor(), Optimizer("adafactor")),
        (Muon(), Optimizer("muon")),
    ],
)
def test_states_of_optimizers(config: Any, planned: Optimizer) -> None:
    model = small("llama-tiny", num_hidden_layers=2)
    made = build(model, 0)
    for p in made.parameters():
        p.grad = torch.ones_like(p)
    optimizers = build_optimizer(config, made.named_parameters())
    for optimizer in optimizers:
        optimizer.step()
    found = [v for o in optimizers for state in o.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert sum(v.nbytes for v in found if v.ndim) == states(planned, list(weights(model)), 4)


def test_states_to_come() -> None:
    matrices = [w for w in weights(small("llama-tiny")) if w.columns]
    size = sum(w.size for w in matrices)
    assert states(Optimizer("adamw8bit"), matrices, 4) == pytest.approx(size * (2 + 1 / 32), abs=len(matrices))
    whole, low = (states(Optimizer("apollo", rank=r), matrices, 4) for r in (10**6, 8))
    assert whole == 8 * size
    assert low == sum(8 * (8 * max(w.rows, w.columns) * w.times if w.inside else w.size) for w in matrices)


def allocated(model: Model, step: Step, lengths: list[int], task: str) -> int:
    """The most bytes that torch holds at once in a step from batch to gradients, beyond weights and ids."""
    made, work = built(model, step).train(), objective(model, task)
    EmbeddingRows(made)
    batch = collate(work, samples(model, lengths, task))
    kind = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind], profile_memory=True) as profiler:
        total = work.loss(made, batch).sums
        sum(total.values()).backward()  # type: ignore[union-attr]
    events = sorted((e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events()
                    if e.name() == "[memory]")  # fmt: skip
    return int(np.cumsum([size for _, size in events]).max())


@pytest.mark.parametrize("kind", ["lora", "houlsby", "bitfit", "prompt", "prefix"])
@pytest.mark.parametrize("name", ["bert-tiny", "gpt2-tiny"])
def test_peak_under_an_adapter_is_that_of_torch(name: str, kind: Any) -> None:
    model, lengths = small(name, "classify", vocab_size=2000), [96] * 8
    step = step_of(model, lengths, "classify", adapter=adapter_for(kind, None))
    found = estimate(model, step.led(20) if kind == "prompt" else step).held
    before = ("weights", "optimizer", "workspace", "holes")
    assert sum(size for part, size in found.items() if part not in before) == pytest.approx(
        allocated(model, step, lengths, "classify"), rel={"prompt": 0.04, "prefix": 0.06}.get(kind, 0.03)
    )


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("task", ["lm", "classify"])
@pytest.mark.parametrize("name", ["bert-tiny", "modernbert-tiny", "gpt2-tiny", "llama-tiny", "t5-tiny"])
def test_peak_is_that_of_torch(name: str, task: str, compute: Any) -> None:
    """Without dropout, whose masks numpy allocates."""
    if name == "t5-tiny" and task == "classify":
        pytest.skip("has no classifier")
    model, lengths = small(name, task, vocab_size=2000), [96] * 8
    step = step_of(model, lengths, task, compute=compute)
    plan = estimate(model, step)
    assert plan.where.startswith(("backward", "loss"))
    before = ("weights", "optimizer", "workspace", "holes")
    assert sum(size for part, size in plan.held.items() if part not in before) == pytest.approx(
        allocated(model, step, lengths, task), rel=0.03
    )
