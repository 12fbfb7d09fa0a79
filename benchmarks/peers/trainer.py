"""What Hugging Face's Trainer makes of a task, at its best: the peer of `finetune.py`.

bf16 where the machine is fast at it, rows grouped by length, padded to the longest of a batch, fused AdamW; adapters
by the `peft` library. A relation is classified from its text with new tokens around the entities.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from ronna.base.device import choose_precision
from ronna.tasks.answers import best_of, counting_of
from ronna.tasks.metrics import relation_scores, span_scores
from ronna.tasks.tags import spans_of

Rows = list[dict[str, Any]]


@dataclass
class Peer:
    """A task on their side: two data sets, a model, and what its predictions are worth."""

    train: Rows
    test: Rows
    model: Any
    collate: Any
    metric: str
    score: Callable[[Any], float]
    kind: str  # as peft calls the task


def samples(columns: dict[str, Any]) -> Rows:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def classify(a: argparse.Namespace, train: Rows, test: Rows) -> Peer:
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    names = sorted({str(r["label"]) for r in train})

    def encode(some: Rows) -> Rows:
        inputs = tokenizer([r["text"] for r in some], truncation=True, max_length=a.length)
        return samples({**inputs, "labels": [names.index(str(r["label"])) for r in some]})

    def accuracy(p: Any) -> float:
        return float((p.predictions.argmax(-1) == p.label_ids).mean())

    model = AutoModelForSequenceClassification.from_pretrained(a.model, num_labels=len(names))
    return Peer(encode(train), encode(test), model, DataCollatorWithPadding(tokenizer), "accuracy", accuracy, "SEQ_CLS")


def relation(a: argparse.Namespace, train: Rows, test: Rows) -> Peer:
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<e1>", "</e1>", "<e2>", "</e2>"]})
    peer = classify(a, train, test)
    names = sorted({str(r["label"]) for r in train})

    def encode(some: Rows) -> Rows:
        inputs = tokenizer([r["text"] for r in some], truncation=True, max_length=a.length)
        return samples({**inputs, "labels": [names.index(str(r["label"])) for r in some]})

    def macro_f1(p: Any) -> float:
        return float(relation_scores(p.label_ids, p.predictions.argmax(-1), names).metrics["macro_f1"].value or 0.0)

    peer.model.resize_token_embeddings(len(tokenizer))
    collate = DataCollatorWithPadding(tokenizer)
    return Peer(encode(train), encode(test), peer.model, collate, "macro_f1", macro_f1, "SEQ_CLS")


def tag(a: argparse.Namespace, train: Rows, test: Rows) -> Peer:
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    labels = sorted({t for r in train for t in r["tags"]})
    index = {label: i for i, label in enumerate(labels)}

    def encode(some: Rows) -> Rows:
        tokens = [r["tokens"] for r in some]
        inputs = tokenizer(tokens, is_split_into_words=True, truncation=True, max_length=a.length)
        targets = []
        for i, row in enumerate(some):
            words = inputs.word_ids(i)
            first = [w is not None and (j == 0 or words[j - 1] != w) for j, w in enumerate(words)]
            targets.append([index[row["tags"][w]] if f else -100 for w, f in zip(words, first, strict=True)])
        return samples({**inputs, "labels": targets})

    def f1(p: Any) -> float:
        gold, found = [], []
        for guesses, truths in zip(p.predictions.argmax(-1), p.label_ids, strict=True):
            read = truths != -100
            gold.append(spans_of([labels[i] for i in truths[read]])[0])
            found.append(spans_of([labels[i] for i in guesses[read]])[0])
        types = sorted({label[2:] for label in labels if label != "O"})
        return float(span_scores(gold, found, types).metrics["f1"].value or 0.0)

    model = AutoModelForTokenClassification.from_pretrained(a.model, num_labels=len(labels))
    collate = DataCollatorForTokenClassification(tokenizer)
    return Peer(encode(train), encode(test), model, collate, "f1", f1, "TOKEN_CLS")


def span_qa(a: argparse.Namespace, train: Rows, test: Rows) -> Peer:
    tokenizer = AutoTokenizer.from_pretrained(a.model)

    def encode(some: Rows) -> tuple[Rows, Any]:
        inputs = tokenizer(
            [r["question"] for r in some], [r["context"] for r in some], truncation="only_second",
            max_length=a.length, stride=128, return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        owners, offsets = inputs.pop("overflow_to_sample_mapping"), inputs.pop("offset_mapping")
        starts, ends = [], []
        for i, owner in enumerate(owners):
            context = [k for k, s in enumerate(inputs.sequence_ids(i)) if s == 1]
            answer = (some[owner]["answers"] or [None])[0]
            start = end = 0
            if answer:
                low, high = answer["answer_start"], answer["answer_start"] + len(answer["text"])
                inside = [k for k in context if offsets[i][k][1] > low and offsets[i][k][0] < high]
                if inside and offsets[i][inside[0]][0] <= low and offsets[i][inside[-1]][1] >= high:
                    start, end = inside[0], inside[-1]
            starts.append(start)
            ends.append(end)
        kept = [inputs.sequence_ids(i) for i in range(len(owners))]
        return samples({**inputs, "start_positions": starts, "end_positions": ends}), (owners, offsets, kept)

    encoded_test, (owners, offsets, sides) = encode(test)

    def f1(p: Any) -> float:
        best: dict[int, tuple[float, str]] = {}
        for i, (start, end) in enumerate(zip(*p.predictions, strict=True)):
            context = np.array([k for k, s in enumerate(sides[i]) if s == 1])
            sums = start[context][:, None] + end[context][None, :]
            distance = context[None, :] - context[:, None]
            sums = np.where((distance >= 0) & (distance < 30), sums, -np.inf)
            first, last = np.unravel_index(int(sums.argmax()), sums.shape)
            top = float(sums[first, last])
            if owners[i] not in best or top > best[owners[i]][0]:
                a_char, b_char = offsets[i][context[first]][0], offsets[i][context[last]][1]
                best[owners[i]] = top, test[owners[i]]["context"][a_char:b_char]
        counting = counting_of([r["context"] for r in test])
        found = [best_of(best[i][1], [x["text"] for x in r["answers"]], counting)[1] for i, r in enumerate(test)]
        return float(np.mean(found))

    model = AutoModelForQuestionAnswering.from_pretrained(a.model)
    return Peer(encode(train)[0], encoded_test, model, DataCollatorWithPadding(tokenizer), "f1", f1, "QUESTION_ANS")


TASKS = {"classify": classify, "relation": relation, "tag": tag, "span_qa": span_qa}


def adapted(a: argparse.Namespace, peer: Peer, steps: int) -> Any:
    """Their model with the adapter that `a` asks for, on the maps that ours has it on, or as many virtual tokens."""
    import peft

    if a.peft == "prompt":
        config = peft.PromptTuningConfig(task_type=peer.kind, num_virtual_tokens=20, prompt_tuning_init="SAMPLE_VOCAB")
        return peft.get_peft_model(peer.model, config)
    if a.peft == "prefix":
        config = peft.PrefixTuningConfig(task_type=peer.kind, num_virtual_tokens=20)
        return peft.get_peft_model(peer.model, config)
    layers = [n for n, m in peer.model.named_modules() if isinstance(m, torch.nn.Linear) and ".layer." in n]
    shared = {"task_type": peer.kind, "target_modules": layers, "lora_alpha": 16}
    if a.peft == "lora":
        return peft.get_peft_model(peer.model, peft.LoraConfig(r=8, **shared))
    ada = peft.AdaLoraConfig(
        init_r=12, target_r=8, tinit=steps // 10, tfinal=steps // 3, deltaT=10, total_step=steps, **shared
    )
    return peft.get_peft_model(peer.model, ada)


class Allocating(Trainer):  # type: ignore[misc]
    """peft leaves it to the caller to let AdaLoRA allocate its ranks after each step."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if self.state.global_step:
            self.model.base_model.update_and_allocate(self.state.global_step)
        return loss


def run(a: argparse.Namespace, out: str, train: Rows, test: Rows) -> dict[str, float]:
    peer = TASKS[a.task](a, train, test)
    steps = int(len(peer.train) * a.epochs / a.batch)
    model = adapted(a, peer, steps) if a.peft else peer.model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = TrainingArguments(
        output_dir=out,
        num_train_epochs=a.epochs,
        per_device_train_batch_size=a.batch,
        per_device_eval_batch_size=64,
        learning_rate=a.lr,
        warmup_steps=50,
        bf16=choose_precision("auto", device)[0] is torch.bfloat16,
        optim="adamw_torch_fused",
        use_cpu=device.type == "cpu",
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=a.seed,
        label_names=["start_positions", "end_positions"] if a.task == "span_qa" else ["labels"],
    )
    trainer = (Allocating if a.peft == "adalora" else Trainer)(
        model=model,
        args=settings,
        train_dataset=peer.train,
        eval_dataset=peer.test,
        data_collator=peer.collate,
        compute_metrics=lambda p: {"score": peer.score(p)},
    )
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    trainer.args.train_sampling_strategy = "sequential"  # else it evaluates in another order than the data's
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "seconds": seconds,
        "rows_per_second": len(train) * a.epochs / seconds,
        peer.metric: trainer.evaluate()["eval_score"],
        "trained": trained,
    }
