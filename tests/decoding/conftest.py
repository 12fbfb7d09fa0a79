"""Tiny models with enough noise to have opinions, and transformers' generation on the very same models."""

from collections.abc import Callable, Sequence

import pytest
import torch
import transformers
from transformers.modeling_outputs import CausalLMOutput

from ronna.model import config as c
from ronna.model.sequences import Sequences
from ronna.model.transformer import Memory, Transformer

VOCAB, DIM, POSITIONS = 60, 32, 48
LAYER, RMS = c.Norm(), c.Norm("rms")


def gpt2() -> c.Model:
    attention = c.Attention(4, 8, bias=True, out_bias=True)
    block = c.Block(attention, c.FeedForward(64, "gelu_tanh", bias=True), LAYER, dropout=0.1)
    embedding = c.Embedding(VOCAB, c.LearnedPositions(POSITIONS), dropout=0.1)
    return c.Model(DIM, embedding, c.Head(False), decoder=c.Stack((block,) * 2, True, final_norm=LAYER))


def llama() -> c.Model:
    attention = c.Attention(4, 8, kv_heads=2, rotary=c.Rotary(), window=9)
    block = c.Block(attention, c.FeedForward(48, "silu", gated=True), RMS)
    return c.Model(DIM, c.Embedding(VOCAB), c.Head(False), decoder=c.Stack((block,) * 2, True, final_norm=RMS))


def t5() -> c.Model:
    attention = c.Attention(4, 8, scale=1.0)
    block = c.Block(attention, c.FeedForward(64, "relu"), RMS)
    bias = c.RelativeBias(8, 20)
    encoder = c.Stack((block,) * 2, False, RMS, bias)
    decoder = c.Stack((c.Block(attention, block.ffn, RMS, cross=attention),) * 2, True, RMS, bias)
    return c.Model(DIM, c.Embedding(VOCAB), c.Head(scale=DIM**-0.5), encoder, decoder)


def transformer2017() -> c.Model:
    attention = c.Attention(4, 8, bias=True, out_bias=True)
    block = c.Block(attention, c.FeedForward(64, "relu", bias=True), LAYER, "post")
    decoder = c.Block(attention, block.ffn, LAYER, "post", cross=attention)
    embedding = c.Embedding(VOCAB, c.SinusoidalPositions(POSITIONS), scale=DIM**0.5)
    stacks = c.Stack((block,) * 2, False), c.Stack((decoder,) * 2, True)
    return c.Model(DIM, embedding, c.Head(False, bias=True), *stacks)


MODELS: dict[str, Callable[[], c.Model]] = {f.__name__: f for f in (gpt2, llama, t5, transformer2017)}


def is_norm_weight(name: str, parameter: torch.Tensor) -> bool:
    return parameter.ndim == 1 and name.endswith("weight")


def make(family: str) -> Transformer:
    torch.manual_seed(7)
    model = Transformer(MODELS[family]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Spread so that the next tokens differ from place to place and some sequences end: what a decoder
            # reads in its source is the same everywhere, so it must not drown the rest.
            narrow = name.endswith("bias") or ".cross.out" in name
            parameter.normal_(float(is_norm_weight(name, parameter)), 0.05 if narrow else 0.35)
    return model


@pytest.fixture(scope="session")
def models() -> dict[str, Transformer]:
    return {name: make(name) for name in MODELS}


@pytest.fixture
def prompts() -> list[list[int]]:
    """Prompts of unequal lengths, of the tokens that mean nothing special."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 14, (4,), generator=g).tolist()
    return [torch.randint(2, VOCAB, (n,), generator=g).tolist() for n in lengths]


class Peer(transformers.PreTrainedModel, transformers.GenerationMixin):
    """transformers' generation over one of our models, every step computed from scratch without a cache.

    An encoder-decoder is a decoder whose source is fixed.
    """

    config_class = transformers.PretrainedConfig

    def __init__(self, model: Transformer, source: Sequence[int] | None):
        super().__init__(transformers.PretrainedConfig(vocab_size=VOCAB))
        self.ours, self.source = model, source
        self.generation_config = transformers.GenerationConfig()
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """The weights are ours."""

    def forward(self, input_ids: torch.Tensor, **unused: object) -> CausalLMOutput:
        rows, columns = input_ids.shape
        memory = None
        if self.source is not None:
            flat = torch.tensor([*self.source] * rows)
            memory = self.ours.encode(flat, Sequences.of([len(self.source)] * rows))
            assert isinstance(memory, Memory)
        logits = self.ours(input_ids.flatten(), Sequences.of([columns] * rows), memory=memory)
        return CausalLMOutput(logits=logits.unflatten(0, (rows, columns)))


Theirs = Callable[..., tuple[list[int], float | None]]


@pytest.fixture
def theirs() -> Theirs:
    """(model, prompt, start, eos, options) -> what transformers generates after the prompt, and its score."""

    def run(
        model: Transformer, prompt: Sequence[int], start: int | None, eos: list[int], **options: object
    ) -> tuple[list[int], float | None]:
        model.eval()
        two_stacks = model.encoder is not None
        peer = Peer(model, prompt if two_stacks else None)
        begin = torch.tensor([[start] if two_stacks else [*prompt]])
        options = {"num_beams": 1, **options}
        out = peer.generate(
            begin, attention_mask=torch.ones_like(begin), eos_token_id=eos or None, pad_token_id=0,
            use_cache=False, return_dict_in_generate=True, output_scores=True, **options,
        )  # fmt: skip
        tokens = out.sequences[0, begin.shape[1] :].tolist()
        ends = [i for i, token in enumerate(tokens) if token in eos]
        scores = getattr(out, "sequences_scores", None)
        return tokens[: ends[0] + 1] if ends else tokens, None if scores is None else scores.item()

    return run
