"""What each field of a step does to the planner's answer, in which direction and by how much."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from ronna.model import attention, loss
from ronna.model import sequences as real
from ronna.model.config import without_dropout
from ronna.model.families import preset
from ronna.model.layers import merged
from ronna.plan import blocks, ends, layers, shapes, stretches
from ronna.plan.heap import LEAST, SLACK, Heap
from ronna.plan.memory import Memory, Step, estimate
from ronna.plan.shapes import Adapter, Lengths
from ronna.plan.tape import Tape
from ronna.plan.weights import ROWS, Optimizer, weights
from ronna.train import rows

BERT = without_dropout(preset("bert-mini")[1])
LLAMA = preset("llama-60m")[1]
LENGTHS = Lengths(8, 128)
STEP = Step(LENGTHS, predicted=150)


def plan(model=BERT, **changes) -> Memory:
    return estimate(model, replace(STEP, **changes))


def test_what_is_held_adds_up() -> None:
    for model in (BERT, LLAMA):
        found = plan(model)
        assert sum(found.held.values()) == found.peak
        assert found.weights == 4 * model.params()
        assert len(found.activations) == len(model.last.blocks)
    assert plan().gradients == plan().weights


def test_activations_grow_with_the_batch() -> None:
    one, two = plan(), plan(lengths=Lengths(16, 128), predicted=300)
    assert sum(two.activations) == pytest.approx(2 * sum(one.activations), rel=0.02)
    assert two.weights == one.weights
    assert two.casts == one.casts
    long = plan(lengths=Lengths(4, 256))
    pairs = 4 * BERT.encoder.blocks[0].attention.heads * (4 * 256**2 - 8 * 128**2)  # of the same tokens
    assert long.activations[1] - one.activations[1] == pairs
    ragged = plan(lengths=Lengths(8, 128, 640))
    assert sum(ragged.activations) < sum(one.activations)


def test_documents_that_share_rows_need_a_mask() -> None:
    apart, shared = plan(lengths=Lengths(8, 128)), plan(lengths=Lengths(16, 128, 1024, rows=8))
    assert shared.inputs > apart.inputs
    assert sum(shared.activations) - sum(apart.activations) >= 4 * 8 * 128 * 128  # a byte a pair and block


def test_predicted_positions() -> None:
    few, all_of_them = plan(), plan(predicted=None)
    assert few.loss < all_of_them.loss
    assert few.activations[-1] < few.activations[-2] == all_of_them.activations[-2]
    assert all_of_them.loss - few.loss == 4 * BERT.dim * (1024 - 150)


def test_precision() -> None:
    wide, narrow = plan(), plan(compute="bf16")
    assert narrow.weights == wide.weights
    assert narrow.activations[1] == pytest.approx(0.5 * wide.activations[1], rel=0.02)
    held = plan(compute="bf16", weights="bf16")
    assert (held.weights, held.gradients) == (wide.weights / 2, wide.gradients / 2)
    assert held.optimizer == wide.optimizer + 8 * ROWS  # and what narrow weights are copied to
    assert held.casts < narrow.casts


def test_optimizers() -> None:
    base = plan(optimizer=Optimizer("sgd", momentum=False))
    assert base.optimizer == 0
    for kind, states in (("sgd", 1), ("adam", 2), ("adamw", 2)):
        found = plan(optimizer=Optimizer(kind))
        assert found.optimizer == states * found.weights
        assert found.peak - base.peak == found.optimizer
    assert plan(optimizer=Optimizer("adafactor")).optimizer < 0.01 * base.weights
    assert plan(optimizer=Optimizer("muon")).optimizer < 2 * base.weights
    outside = 8 * sum(w.size for w in weights(BERT) if not w.inside)  # AdamW's, as is what is in norms and biases
    assert outside < plan(optimizer=Optimizer("apollo", rank=1)).optimizer < 1.01 * outside


def test_the_optimizer_can_be_the_fullest_moment() -> None:
    small = plan(lengths=Lengths(1, 16), predicted=2, optimizer=Optimizer("adafactor"))
    assert small.where == "optimizer"
    assert small.held["passing"] >= 4 * BERT.dim * BERT.embedding.vocab


def test_an_adapter_has_few_gradients_and_states() -> None:
    full, adapted = plan(LLAMA, compute="bf16"), plan(LLAMA, compute="bf16", adapter=Adapter(8))
    assert adapted.weights < 0.52 * full.weights
    assert adapted.gradients < 0.05 * full.gradients
    assert adapted.optimizer == 2 * adapted.gradients
    assert plan(LLAMA, adapter=Adapter(16)).gradients == 2 * plan(LLAMA, adapter=Adapter(8)).gradients
    assert plan(LLAMA, adapter=Adapter(8, ("q",))).gradients < adapted.gradients


def test_micro_batches_add_to_gradients_that_are_there() -> None:
    one, more = plan(), plan(micro_batches=4)
    assert plan(micro_batches=2).peak == more.peak
    assert one.peak < more.peak <= one.peak + 1.25 * more.gradients
    assert more.held["gradients"] >= more.gradients


def test_blocks_computed_again_keep_what_they_read() -> None:
    found = plan(blocks=2)
    assert found.activations[0] == found.activations[1] == 4 * 1024 * BERT.dim
    assert found.activations[2:] == plan().activations[2:]
    assert plan(blocks=4, tight=True).peak < plan(blocks=2, tight=True).peak < plan(tight=True).peak
    assert plan(blocks=4).peak < plan().peak
    halves = plan(blocks=1, feeds=2)
    assert halves.activations[0] < halves.activations[1] == halves.activations[2] < halves.activations[0] * 20
    assert plan().activations[1] - halves.activations[1] == 4 * 1024 * 4 * BERT.dim * 2 + 4 * 1024 * (BERT.dim + 2)


def test_blocks_are_counted_from_the_encoder_on() -> None:
    t5 = preset("t5-tiny")[1]
    both = replace(STEP, source=Lengths(8, 128), lengths=Lengths(8, 32), predicted=None)
    n = len(t5.encoder.blocks)
    before, after = estimate(t5, both).activations, estimate(t5, replace(both, blocks=n + 1)).activations
    assert all(a < b for a, b in zip(after[: n + 1], before[: n + 1], strict=True))
    assert after[n + 1 :] == before[n + 1 :]


def test_fused_backward_holds_no_gradients() -> None:
    tiny = {"lengths": Lengths(2, 16), "predicted": 4}
    usual, fused = plan(**tiny, tight=True), plan(**tiny, fused_backward=True)
    assert fused.peak < usual.peak
    assert fused.held["gradients"] <= 4 * BERT.dim * BERT.embedding.vocab


def test_rows_of_the_token_table() -> None:
    model = replace(BERT, head=None)
    whole, part = plan(model), plan(model, token_rows=3000)
    row = 4 * model.dim
    assert whole.optimizer == 3 * row * model.embedding.vocab + 2 * (whole.weights - row * model.embedding.vocab)
    assert part.optimizer == whole.optimizer - 3 * row * (model.embedding.vocab - 3000)
    assert part.weights == whole.weights + row * 3000 + 8 * model.embedding.vocab
    assert plan(model, token_rows=30000).weights == whole.weights  # not worth a copy


def test_a_compiled_block_does_not_keep_what_it_can_work_out() -> None:
    compiled, plain = (plan(preset("llama-130m")[1], compute="bf16", device="cuda", compiled=c) for c in (True, False))
    less = [b - a for a, b in zip(compiled.activations, plain.activations, strict=True)]
    assert less == [2 * 2048 * tokens for tokens in [8 * 128] * 11 + [150]]
    cpu = [plan(preset("llama-130m")[1], compute="bf16", compiled=c).peak for c in (True, False)]
    assert cpu[0] == cpu[1]


def test_a_gpu_has_other_kernels() -> None:
    cpu, cuda = plan(compute="bf16"), plan(compute="bf16", device="cuda")
    assert sum(cuda.activations) < sum(cpu.activations)  # nobody keeps probabilities
    assert cuda.held["holes"] == 0 < cpu.held["holes"]


def test_an_answer_takes_no_torch_and_little_work() -> None:
    """Calls are counted, as seconds are other ones on every machine: 13,000 took 5 ms on one of 2 GHz."""
    code = (
        "import cProfile, pstats, sys\n"
        "from ronna.model.families import preset\n"
        "from ronna.plan.memory import Step, estimate\n"
        "from ronna.plan.shapes import Lengths\n"
        "model = preset('llama-1b', num_hidden_layers=100)[1]\n"
        "step = Step(Lengths(8, 1024), compute='bf16')\n"
        "estimate(model, step)\n"
        "profile = cProfile.Profile()\n"
        "profile.runcall(estimate, model, step)\n"
        "print('torch' in sys.modules, pstats.Stats(profile).total_calls)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    imported, calls = done.stdout.split()
    assert imported == "False"
    assert int(calls) < 13_000


@pytest.mark.parametrize("n", [*range(1, 300), 511, 512, 1000, 4096, 5001])
def test_sizes_are_rounded_as_the_model_rounds_them(n: int) -> None:
    assert shapes.few_sizes(n, 8) == real.few_sizes(n, 8)
    assert shapes.few_sizes(n, 1) == real.few_sizes(n, 1)
    import torch

    assert shapes.computed_rows(n, False) == real.computed_rows(n, torch.device("cpu"))
    assert shapes.computed_rows(n, True) == real.computed_rows(n, torch.device("cuda"))


def test_limits_are_those_of_the_model() -> None:
    assert blocks.WRITTEN_OUT == attention.WRITTEN_OUT
    assert (ends.CHUNK_ELEMENTS, ends.TILE_ELEMENTS) == (loss.CHUNK_ELEMENTS, loss.TILE_ELEMENTS)
    assert (ends.CARD_ELEMENTS, ends.CARD_ROWS) == (loss.CARD_ELEMENTS, loss.CARD_ROWS)
    for vocab in (1000, 32000, 50257, 128256, 2**30):
        assert all(ends.chunk_rows(vocab, cuda) == loss.chunk_rows(vocab, cuda) for cuda in (True, False))
    assert stretches.WORTHWHILE == rows.WORTHWHILE
    assert {layers.MERGED, layers.TOGETHER} <= set(merged.__code__.co_consts)


def test_a_hole_is_not_filled_by_its_like() -> None:
    heap = Heap()
    a, b, c = (heap.take(4 * LEAST) for _ in range(3))
    heap.free(*b)
    assert heap.take(4 * LEAST)[0] == 12 * LEAST
    assert heap.take(4 * LEAST - SLACK)[0] == b[0]
    heap.free(*a)
    heap.free(*c)
    assert heap.high == 16 * LEAST


def test_a_tape_by_hand() -> None:
    """y = f(x), z = g(y) + x, where f keeps its input and g its output."""
    t = Tape(10, True)
    y = t.op(t.start, size=20, keeps=[t.start])
    g = t.op(y, size=30, keep_out=True, leaf=7)
    z = t.op(g, t.start, size=10, grads=[30, 0])
    found = t.profile(z)
    assert found.forward == max(10 + 20, 10 + 20 + 30, 10 + 30 + 10)
    assert (found.kept, found.leaf, found.out) == (40, 7, 10)
    # z's gradient; g's beside it, which is x's too; y's; x's, added to what is there.
    assert found.backward == max(40 + 10, 40 + 10 + 30, 40 + 10 + 30 + 20 + 7, 10 + 10 + 7 + 20 + 10)
