"""Does the suite notice? Break an important line, run the test that guards it, and see it fail.

    python tests/mutants.py [NAME ...]

Each mutant is one replacement in a temporary copy of src. Before that its test must pass on the copy as it
is. Prints caught or missed for each and exits with 1 if any was missed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
PASSED, FAILED = 0, 1  # pytest's exit codes


class Mutant(NamedTuple):
    """`old`, which stands exactly once in src/ronna/`file`, becomes `new`; then `test` must fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


LOGITS = "tests/parity/test_logits.py::test_logits_are_those_of_transformers"
LEAK = "tests/parity/test_isolation.py::test_a_document_never_touches_another"
CACHE = "tests/parity/test_isolation.py::test_decoding_with_a_cache_is_the_whole_forward"
FOLDER = "tests/model/test_folder.py"

MUTANTS = [
    Mutant(
        "leaked mask",
        "model/sequences.py",
        "see = sequence[:, None, :, None] == sequence[:, None, None, :]",
        "see = (sequence[:, None, :, None] >= 0) & (sequence[:, None, None, :] >= 0)",
        f"{LEAK}[bert-1-rows shared]",
    ),
    Mutant(
        "window off by one",
        "model/sequences.py",
        "see = see & (distance.abs() <= window)",
        "see = see & (distance.abs() < window)",
        f"{LOGITS}[modernbert]",
    ),
    Mutant(
        "padded source seen",
        "model/attention.py",
        "mask = None if columns.slots is None else (columns.sequence >= 0)[:, None, None, :]",
        "mask = None",
        f"{LOGITS}[marian]",
    ),
    Mutant(
        "rotary sign",
        "model/attention.py",
        "torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)",
        "torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)",
        f"{LOGITS}[llama]",
    ),
    Mutant(
        "cache behind by one",
        "model/attention.py",
        "mask = (distance >= 0)[:, None]",
        "mask = (distance > 0)[:, None]",
        f"{CACHE}[gpt2]",
    ),
    Mutant(
        "lost tie",
        "model/transformer.py",
        "self.head.logits.weight = self.embedding.tokens.weight",
        "pass",
        f"{FOLDER}::test_ties_hold_after_loading[gpt2-tiny]",
    ),
    Mutant(
        "lost tie on loading",
        "model/folder.py",
        "        model.tie()\n",
        "",
        f"{FOLDER}::test_ties_hold_after_loading[gpt2-tiny]",
    ),
    Mutant(
        "T5 head not scaled",
        "model/families/t5.py",
        "scale=1 / math.sqrt(h.d_model) if scaled else 1.0",
        "scale=1.0",
        f"{LOGITS}[t5 v1.0]",
    ),
    Mutant(
        "T5 attention scaled",
        "model/families/t5.py",
        "c.Attention(h.num_heads, h.d_kv, scale=1.0, ",
        "c.Attention(h.num_heads, h.d_kv, ",
        f"{LOGITS}[t5 v1.1]",
    ),
    Mutant(
        "fused parts out of order",
        "model/folder.py",
        "weight.part * rows, (weight.part + 1) * rows",
        "(weight.parts - 1 - weight.part) * rows, (weight.parts - weight.part) * rows",
        f"{LOGITS}[gpt2]",
    ),
    Mutant(
        "divided per micro-batch",
        "train/loop.py",
        "backward(objective.loss(model, batch), totals)",
        "backward(objective.loss(model, batch), Totals(totals.sums, batch.counts))",
        "tests/train/test_loop.py::test_accumulation_is_the_whole_batch[3]",
    ),
    Mutant(
        "dropout not seeded by the step",
        "train/loop.py",
        "        torch.manual_seed(seed_for(seed, i))  # dropout follows from (seed, step, micro-batch)\n",
        "",
        "tests/test_resume.py::test_resuming_at_every_step_gives_the_same_weights[clm]",
    ),
    Mutant(
        "other dropout in the second pass",
        "train/loop.py",
        "        torch.manual_seed(seed_for(seed, i))  # the same dropout both times\n",
        "",
        "tests/tasks/test_embed.py::test_both_passes_drop_the_same",
    ),
    Mutant(
        "contrast within a micro-batch",
        "train/loop.py",
        "if len(batches) > 1 and of_whole_batch(objective):",
        "if False:",
        "tests/tasks/test_embed.py::test_the_gradient_in_micro_batches_is_that_of_the_whole_batch[triples]",
    ),
    Mutant(
        "held-out rows dropped",
        "tasks/truncation.py",
        'drops = policy == "drop" and training',
        'drops = policy == "drop"',
        "tests/tasks/test_truncation.py::test_what_is_done_to_long_rows_is_counted_by_split[classify-drop]",
    ),
    Mutant(
        "masks not seeded by the position",
        "train/feed.py",
        "self.objective.samples(self.data[index], sample_rng(self.seed, position))",
        "self.objective.samples(self.data[index], np.random.default_rng())",
        "tests/test_resume.py::test_resuming_at_every_step_gives_the_same_weights[mlm]",
    ),
    Mutant(
        "shifted labels",
        "objectives/clm.py",
        "np.append(tokens[1:], last)",
        "np.append(tokens[:-1], last)",
        "tests/objectives/test_clm.py::test_every_token_is_predicted_from_the_one_before",
    ),
    Mutant(
        "optimizer state forgotten at resume",
        "run.py",
        "            load_optimizer_tensors(optimizers, named(), tensors)\n",
        "",
        "tests/test_resume.py::test_resuming_at_every_step_gives_the_same_weights[clm]",
    ),
    Mutant(
        "stale embedding rows",
        "train/rows.py",
        "self.buffer[rows] = 0.0",
        "self.buffer[rows] *= 1.0",
        "tests/train/test_rows.py::test_training_is_the_same[adamw]",
    ),
    Mutant(
        "rows not in use are decayed",
        "train/rows.py",
        "self.trained = Parameter(self.table.detach()[used])",
        "self.used, self.trained = None, self.table",
        "tests/train/test_rows.py::test_rows_in_use_are_trained_as_in_the_whole_table_and_the_others_stay[adamw]",
    ),
    Mutant(
        "state read from the wrong place",
        "model/sequences.py",
        "return empty.index_copy(0, self.index, x[: len(self.index)])",
        "return empty.index_copy(0, self.index.sort().values, x[: len(self.index)])",
        "tests/parity/test_reads.py::test_states_read_are_those_of_the_whole[bert-firsts, out of order]",
    ),
    Mutant(
        "non-finite step taken",
        "train/loop.py",
        "not math.isfinite(float(norm))",
        "False",
        "tests/train/test_loop.py::test_a_non_finite_step_changes_nothing_and_is_counted",
    ),
    Mutant(
        "tags of the next token",
        "tasks/tag.py",
        "places = first[own] - start + len(before)",
        "places = first[own] - start + len(before) + 1",
        "tests/tasks/test_tag.py::test_a_long_sentence_is_windowed_and_counted_or_refused",
    ),
    Mutant(
        "illegal tags allowed",
        "tasks/tags.py",
        "follow = np.where(rules.follow, transitions[:-2], IMPOSSIBLE)",
        "follow = transitions[:-2]",
        "tests/tasks/test_tags.py::test_the_best_legal_sequence_by_trying_all[bio]",
    ),
    Mutant(
        "relations the wrong way round",
        "tasks/metrics.py",
        "parts = member[true] & (true == guess)[:, None]",
        "parts = member[true] & member[guess]",
        "tests/tasks/test_relation.py::test_macro_f1_is_the_task_s_by_hand",
    ),
    Mutant(
        "answers end before they start",
        "tasks/span_qa.py",
        "sums = starts[: len(starts) - d] + ends[d:]",
        "sums = starts[d:] + ends[: len(ends) - d]",
        "tests/tasks/test_span_qa.py::test_the_best_span_over_windows_or_none",
    ),
    Mutant(
        "a LoRA scaled twice",
        "peft/lora.py",
        "return torch.addmm(y, h, (self.b * self.scale).to(x.dtype).T)",
        "return torch.addmm(y, h * self.scale, (self.b * self.scale).to(x.dtype).T)",
        "tests/peft/test_changes.py::test_lora_is_its_formula",
    ),
    Mutant(
        "parts of a joint LoRA mixed up",
        "peft/lora_folder.py",
        "whole[part * rows : (part + 1) * rows, at : at + len(a)] = b",
        "whole[:rows, at : at + len(a)] += b",
        "tests/peft/test_folder.py::test_peft_loads_ours_for_the_same_logits[gpt2-lora]",
    ),
    Mutant(
        "importance not smoothed",
        "peft/adalora.py",
        "self.sensitivity.lerp_(now, 1 - self.config.beta1)",
        "self.sensitivity.copy_(now)",
        "tests/peft/test_adalora.py::test_importance_and_what_is_kept_are_those_of_the_peft_library",
    ),
    Mutant(
        "loss over what the user says",
        "tasks/dialogue.py",
        "made.append(Tokens(e.ids, said[owner]))",
        "made.append(Tokens(e.ids, said[owner] | True))",
        "tests/tasks/test_dialogue.py::test_only_what_the_assistant_says_and_its_end_is_learnt[tiny_chat]",
    ),
    Mutant(
        "another prompt at use than in training",
        "tasks/dialogue.py",
        "text, parts, done = self.template.render(messages, reply=True), [], 0",
        "text, parts, done = self.template.render(messages, reply=False), [], 0",
        "tests/tasks/test_dialogue.py::test_tokens_at_training_are_tokens_at_use_and_those_of_transformers[tiny_chat]",
    ),
    Mutant(
        "a target without its end",
        "tasks/seq2seq.py",
        "labels = np.append(target, self.ends.eos[0])",
        "labels = np.append(target, target[-1])",
        "tests/tasks/test_seq2seq.py::test_an_encoder_decoder_reads_the_source_and_learns_the_target_and_its_end",
    ),
    Mutant(
        "a reference that learns too",
        "tasks/preference.py",
        "gained = (self.sequence_log_probs(model, batch) - batch.targets.float()).view(-1, 2)",
        "gained = self.sequence_log_probs(model, batch).view(-1, 2)",
        "tests/tasks/test_preference.py::test_the_loss_is_dpo_s",
    ),
    Mutant(
        "smoothing left out of the gradient",
        "model/loss.py",
        "tile.copy_(p.sub_(even) if smoothing else p)",
        "tile.copy_(p)",
        "tests/model/test_loss.py::test_smoothed_loss_is_that_of_torch[one tile]",
    ),
    Mutant(
        "probabilities not kept",
        "plan/blocks.py",
        "t.op(scores, keep_out=True)",
        "t.op(scores)",
        "tests/plan/test_memory.py::test_kept_for_the_backward_pass",
    ),
    Mutant(
        "gradient not freed in the plan",
        "plan/tape.py",
        "live -= 0 if users[buffer] else sizes[buffer]",
        "live -= 0",
        "tests/plan/test_memory.py::test_peak_is_that_of_torch",
    ),
]


def source(mutant: Mutant, root: Path = REPOSITORY / "src") -> Path:
    """The file to break. ValueError unless what is to be replaced stands there once."""
    path = root / "ronna" / mutant.file
    count = path.read_text(encoding="utf-8").count(mutant.old)
    if count != 1:
        raise ValueError(f"{mutant.name}: {mutant.old!r} stands {count} times in {mutant.file}")
    return path


def run_test(node: str, src: Path) -> int:
    """Exit code of one test with the package taken from `src`."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-o",
        f"pythonpath={src}",
        node,
    ]
    environment = os.environ | {"PYTHONPATH": str(src), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True).returncode


def verdict(mutant: Mutant, src: Path, passing: set[str]) -> str:
    """caught, or missed and why. `src` is a copy, left as it was; `passing` are the tests seen to pass."""
    path = source(mutant, src)
    whole = path.read_text(encoding="utf-8")
    if mutant.test not in passing:
        if (code := run_test(mutant.test, src)) != PASSED:
            return f"missed: its test does not pass without it (exit code {code})"
        passing.add(mutant.test)
    path.write_text(whole.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        code = run_test(mutant.test, src)
    finally:
        path.write_text(whole, encoding="utf-8")
    return "caught" if code == FAILED else f"missed: exit code {code}"


def main(names: list[str]) -> int:
    unknown = set(names) - {m.name for m in MUTANTS}
    if unknown:
        print(f"no mutant {', '.join(sorted(unknown))}; there are: {', '.join(m.name for m in MUTANTS)}")
        return 2
    missed, passing = 0, set[str]()
    with tempfile.TemporaryDirectory() as folder:
        src = Path(folder) / "src"
        shutil.copytree(REPOSITORY / "src", src, ignore=shutil.ignore_patterns("__pycache__"))
        for mutant in MUTANTS:
            if names and mutant.name not in names:
                continue
            result = verdict(mutant, src, passing)
            missed += result != "caught"
            print(f"{result:8} {mutant.name} ({mutant.test})", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
