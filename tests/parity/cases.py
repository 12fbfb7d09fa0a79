"""Tiny random models of transformers, one per wiring, and what both sides compute on the same text."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from ronna.model.sequences import Sequences
from ronna.model.transformer import Transformer

VOCAB = 99
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
TINY = SIZES | {"intermediate_size": 96}
T5 = {"vocab_size": VOCAB, "d_model": 64, "d_kv": 24, "d_ff": 96, "num_layers": 3, "num_heads": 4}
MARIAN = {
    **{f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in
       (("layers", 2), ("attention_heads", 4), ("ffn_dim", 96))},
    **{"vocab_size": VOCAB, "d_model": 64, "max_position_embeddings": 32, "scale_embedding": True},
    **{"activation_function": "swish", "pad_token_id": 0, "decoder_start_token_id": 0},
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@dataclass(frozen=True)
class Case:
    """`lm` and those in `classify` (of sequences, of tokens) are classes of transformers.

    `untied` gives the head a matrix of its own.
    """

    config: Callable[..., hf.PreTrainedConfig]
    lm: type[hf.PreTrainedModel]
    settings: dict[str, Any]
    classify: tuple[type[hf.PreTrainedModel], ...] = ()
    segments: bool = False
    untied: bool = False

    @property
    def seq2seq(self) -> bool:
        return bool(self.config().is_encoder_decoder)

    def build(self, cls: type[hf.PreTrainedModel] | None = None, **more: Any) -> Any:
        """Their model with noise on every parameter: zeros and ones would hide a forgotten bias."""
        rng = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        model = (cls or self.lm)(self.config(**self.settings, **more, attn_implementation="eager")).eval()
        if self.untied:
            model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, 64, generator=rng))
        tensors = [p for n, p in model.named_parameters() if "embed_positions" not in n]
        tensors += [b for n, b in model.named_buffers() if n == "final_logits_bias"]
        with torch.no_grad():
            for t in tensors:
                t.add_(torch.randn(t.shape, generator=rng) * (0.05 if t.ndim > 1 else 0.2))
        return model


def classes(stem: str) -> tuple[type[hf.PreTrainedModel], ...]:
    kinds = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
    return tuple(getattr(hf, f"{stem}For{kind}") for kind in kinds)


CASES = {
    "bert": Case(
        hf.BertConfig, hf.BertForMaskedLM, TINY | {"max_position_embeddings": 32},
        classes("Bert"), segments=True,
    ),
    "roberta": Case(
        hf.RobertaConfig, hf.RobertaForMaskedLM, TINY | {"max_position_embeddings": 34, "pad_token_id": 0},
        classes("Roberta"),
    ),
    "gpt2": Case(
        hf.GPT2Config, hf.GPT2LMHeadModel,
        {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 32, "pad_token_id": 0},
        classes("GPT2"),
    ),
    "llama": Case(
        hf.LlamaConfig, hf.LlamaForCausalLM, TINY | {"num_key_value_heads": 2, "pad_token_id": 0},
        classes("Llama"),
    ),
    "llama scaled": Case(
        hf.LlamaConfig, hf.LlamaForCausalLM,
        TINY | {"num_key_value_heads": 2, "rope_parameters": LLAMA3, "attention_bias": True}
        | {"mlp_bias": True},
    ),
    "qwen2": Case(
        hf.Qwen2Config, hf.Qwen2ForCausalLM, TINY | {"num_key_value_heads": 2},
        classes("Qwen2")[1:],
    ),
    "qwen3": Case(
        hf.Qwen3Config, hf.Qwen3ForCausalLM,
        TINY | {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    ),
    "t5 v1.0": Case(hf.T5Config, hf.T5ForConditionalGeneration, T5),
    "t5 v1.1": Case(
        hf.T5Config, hf.T5ForConditionalGeneration,
        T5 | {"d_kv": 16, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, untied=True,
    ),
    "modernbert": Case(
        hf.ModernBertConfig, hf.ModernBertForMaskedLM, TINY | {"local_attention": 8, "pad_token_id": 0},
        classes("ModernBert"),
    ),
    "marian": Case(hf.MarianConfig, hf.MarianMTModel, MARIAN),
}  # fmt: skip
CLASSIFIERS = [(case, cls) for case in CASES.values() for cls in case.classify]
NAMES = [cls.__name__ for _, cls in CLASSIFIERS]


@dataclass(frozen=True)
class Texts:
    """A batch of unequal texts: rows of token ids, of segments, and (for encoder-decoders) of source ids."""

    rows: list[Tensor]
    sources: list[Tensor]
    segments: list[Tensor] = field(default_factory=list)


def texts(lengths: tuple[int, ...] = (24, 17, 28), sources: tuple[int, ...] = (13, 20, 32), seed: int = 1) -> Texts:
    """By default so many tokens (69, 65) that linear maps compute a few rows more."""
    rng = torch.Generator().manual_seed(seed)

    def draw(sizes: tuple[int, ...], low: int, high: int) -> list[Tensor]:
        return [torch.randint(low, high, (n,), generator=rng) for n in sizes]

    return Texts(draw(lengths, 1, VOCAB), draw(sources, 1, VOCAB), draw(lengths, 0, 2))


def flat(rows: list[Tensor], device: torch.device) -> tuple[Tensor, Sequences]:
    return torch.cat(rows).to(device), Sequences.of([len(r) for r in rows], device)


def ours(case: Case, model: Transformer, batch: Texts, run: Callable[..., Tensor] | None = None) -> Tensor:
    """Logits (T, V) of the flat batch, or what `run` (say, `model.hidden`) gives for the same arguments."""
    segments = torch.cat(batch.segments).to(model.device) if case.segments else None
    with torch.no_grad():
        memory = model.encode(*flat(batch.sources, model.device)) if case.seq2seq else None
        return (run or model)(*flat(batch.rows, model.device), segments, memory)


def scores(case: Case, model: Transformer, batch: Texts) -> Tensor:
    """The classifier's scores: (B, labels), or (T, labels) where it scores tokens."""
    return ours(case, model, batch, model.scores)


def theirs(case: Case, model: Any, batch: Texts) -> Tensor:
    """The same logits by transformers, from right-padded rows and an attention mask."""

    def pad(rows: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)

    ids, mask = pad(batch.rows), pad([torch.ones_like(r) for r in batch.rows])
    with torch.no_grad():
        if case.seq2seq:
            read = {
                "input_ids": pad(batch.sources),
                "attention_mask": pad([s * 0 + 1 for s in batch.sources]),
            }
            logits = model(**read, decoder_input_ids=ids, decoder_attention_mask=mask).logits
        else:
            more = {"token_type_ids": pad(batch.segments)} if case.segments else {}
            out = model(ids, attention_mask=mask, **more)
            spans = "start_logits" in out
            logits = torch.stack([out.start_logits, out.end_logits], -1) if spans else out.logits
    return logits[mask.bool()] if logits.ndim == 3 else logits


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, in standard deviations of b."""
    return float((a.float() - b.float()).abs().max() / b.float().std())
