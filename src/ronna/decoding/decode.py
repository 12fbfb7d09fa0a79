"""Continuing prompts with a decoder or an encoder-decoder, and how well a model predicts given text.

Legend: B sequences, V vocabulary.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ronna.base.errors import RonnaError
from ronna.decoding.among import SINGLE, Among, turns
from ronna.decoding.batch import Batch, inference
from ronna.decoding.beam import beam_search
from ronna.decoding.sampling import GenerateConfig, choose, draw_keys, penalise
from ronna.decoding.stream import Decode, TextStream
from ronna.model.loss import vocabulary_loss
from ronna.model.sequences import Sequences
from ronna.model.transformer import Transformer

Finish = Literal["eos", "stop", "length"]
OnToken = Callable[[int, int, str, Finish | None], None]

USUAL_TOKENS = 256  # where GenerateConfig.max_tokens says nothing


@dataclass(frozen=True)
class Generation:
    """A continuation.

    tokens: what was generated, without the end token, with those of a stop string. text: cut before the stop
    string; None where no tokenizer was given. score: the tokens' summed log-probability (nats) under the
    model, the end token included, divided by their number ** length_penalty; of beams as their search saw it.
    """

    tokens: list[int]
    text: str | None
    finish: Finish
    score: float


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig,
    *,
    eos: Collection[int] = (),
    start: int | None = None,
    decode: Decode | None = None,
    on_token: OnToken | None = None,
    batch_size: int = 64,
    among: Among = SINGLE,
) -> list[Generation]:
    """One continuation for each prompt (an encoder-decoder's source), in order.

    eos: tokens that end a sequence. start: the first token of an encoder-decoder's decoder; for a decoder the
    one an empty prompt stands for (BOS). decode: tokens to text, without special tokens.
    on_token(index, token, text, finish) is called as tokens come, with the text that has become certain, so
    that the texts of an index add up to its `Generation.text`; the call with a finish is its last.
    among: those that share the prompts, all of whom get all continuations.

    What comes out for a prompt depends on its index, never on the other prompts. A sequence ends with
    "length" after max_tokens or where prompt and continuation fill the model's positions.

    Raises RonnaError for a model without a decoder or vocabulary head, a prompt that is too long, empty
    without `start` or not of this vocabulary, more max_tokens than positions, stop strings without `decode`,
    and streamed beams.
    """
    _check(model, config, decode, on_token)
    starts = [_start(model, index, prompt, start) for index, prompt in enumerate(prompts)]
    room = [_room(model, config, tokens) for tokens in starts]
    results = dict[int, Generation]()
    # Neighbours of like length waste least of the cache.
    order = sorted((i for i in range(len(prompts)) if room[i] > 0), key=lambda i: -len(prompts[i]))
    with inference(model):
        batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
        for indices, own in turns(batches, among):
            sources = [prompts[i] for i in indices] if model.encoder is not None else None
            batch = Batch(model, [starts[i] for i in indices], sources, among)
            limits = torch.tensor([room[i] for i in indices], device=model.device)
            if config.beams > 1:
                found = _search(batch, config, eos, limits, decode)
            else:
                found = _sample(batch, config, eos, limits, decode, on_token, indices)
            batch.wait()
            results |= zip(indices, found, strict=True) if own else ()
    nothing = Generation([], None if decode is None else "", "length", 0.0)
    every = brought(results, among)
    return [every.get(index, nothing) for index in range(len(prompts))]


def brought(results: dict[int, Generation], among: Among) -> dict[int, Generation]:
    """Those of all who share the prompts."""
    if among.parts == 1:
        return results
    said = json.dumps([(index, *astuple(generation)) for index, generation in results.items()])
    parts = among.from_parts(torch.frombuffer(bytearray(said.encode()), dtype=torch.uint8))
    lists = [json.loads(part.numpy().tobytes()) for part in parts]
    return {index: Generation(*generation) for some in lists for index, *generation in some}


def _check(model: Transformer, config: GenerateConfig, decode: Decode | None, on_token: OnToken | None) -> None:
    if model.decoder is None or model.head is None:
        lacks = "decoder" if model.decoder is None else "vocabulary head"
        raise RonnaError(f"the model has no {lacks}, so it cannot generate", fix="use a GPT or T5 kind of model")
    longest = model.max_length
    if longest is not None and (config.max_tokens or 0) > longest:
        raise RonnaError(
            f"found {config.max_tokens}, but the model has {longest} positions", where="max_tokens",
            fix=f"ask for {longest} tokens at most",
        )  # fmt: skip
    if config.stop and decode is None:
        raise RonnaError("stop strings are found in text", where="stop", fix="give a tokenizer as well")
    if config.beams > 1 and on_token is not None:
        raise RonnaError("a beam search has no text before its end", where="beams", fix="stream with beams = 1")


def _start(model: Transformer, index: int, prompt: Sequence[int], start: int | None) -> Sequence[int]:
    """What the decoder begins with."""
    where, longest, vocab = f"prompt {index}", model.max_length, model.cfg.embedding.vocab
    if longest is not None and len(prompt) > longest:
        raise RonnaError(
            f"{len(prompt)} tokens, but the model reads {longest} at most",
            where=where,
            fix="shorten the prompt",
        )
    if len(prompt) and not 0 <= min(prompt) <= max(prompt) < vocab:
        raise RonnaError(
            f"tokens from {min(prompt)} to {max(prompt)}, but the vocabulary has {vocab}", where=where,
            fix="use the tokenizer that the model was trained with",
        )  # fmt: skip
    if model.encoder is not None:
        if not len(prompt):
            raise RonnaError("the source is empty", where=where, fix="give it some text")
        if start is None:
            raise RonnaError("the first token of the decoder is not known", where="start", fix="name its id")
        return [start]
    if not len(prompt) and start is None:
        raise RonnaError(
            "it is empty, and the tokenizer has no beginning-of-sequence token",
            where=where,
            fix="give it some text",
        )
    return prompt if len(prompt) or start is None else [start]


def _room(model: Transformer, config: GenerateConfig, tokens: Sequence[int]) -> int:
    wanted = config.max_tokens or USUAL_TOKENS
    longest = model.max_length
    return wanted if longest is None else min(wanted, longest - len(tokens))


def _search(
    batch: Batch, config: GenerateConfig, eos: Collection[int], limits: Tensor, decode: Decode | None
) -> list[Generation]:
    ends = torch.tensor(sorted(eos), dtype=torch.long, device=limits.device)
    generations = []
    for tokens, score in beam_search(batch, config, ends, limits):
        finish: Finish = "eos" if tokens[-1] in eos else "length"
        tokens = tokens[:-1] if finish == "eos" else tokens
        generations.append(Generation(tokens, decode(tokens) if decode else None, finish, score))
    return generations


@dataclass(frozen=True)
class _Texts:
    """The texts of a batch while they grow."""

    streams: list[TextStream]
    indices: list[int]
    on_token: OnToken | None

    def advance(self, row: int, token: int, finish: Finish | None) -> Finish | None:
        """Whether sequence `row` is finished by `token`, now that its text is known."""
        stream = self.streams[row]
        text = "" if finish == "eos" else stream.push(token)
        text += stream.close() if finish else ""
        finish = "stop" if stream.stopped else finish
        if self.on_token:
            self.on_token(self.indices[row], token, text, finish)
        return finish


def _sample(
    batch: Batch,
    config: GenerateConfig,
    eos: Collection[int],
    limits: Tensor,
    decode: Decode | None,
    on_token: OnToken | None,
    indices: list[int],
) -> list[Generation]:
    """Token by token; a finished sequence leaves the batch at once."""
    results: dict[int, Generation] = {}
    texts = None
    if on_token or config.stop:
        texts = _Texts([TextStream(decode or (lambda _: ""), config.stop) for _ in indices], indices, on_token)
    ends = torch.tensor(sorted(eos), dtype=torch.long, device=limits.device)
    rows, keys, begun = list(range(len(batch))), draw_keys(config.seed, indices), batch.lengths.tolist()
    log_p, step = torch.zeros(len(batch), device=limits.device), 0
    while rows:
        logits = batch.logits()
        tokens = choose(penalise(logits, batch.tokens, batch.lengths, config), config, keys, step)
        log_p += logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        batch.append(tokens)
        step += 1
        ended, full = torch.isin(tokens, ends), limits <= step
        if texts is None and not (ended | full).any():
            continue
        finishes: list[Finish | None] = [
            "eos" if end else "length" if last else None
            for end, last in zip(ended.tolist(), full.tolist(), strict=True)
        ]
        if texts is not None:
            finishes = list(map(texts.advance, rows, tokens.tolist(), finishes))
        for i, finish in enumerate(finishes):
            if finish is not None:
                made = batch.tokens[i, begun[i] : begun[i] + step - (finish == "eos")].tolist()
                text = texts.streams[rows[i]].text if texts and decode else decode(made) if decode else None
                score = log_p[i].item() / step**config.length_penalty
                results[rows[i]] = Generation(made, text, finish, score)
        left = [i for i, finish in enumerate(finishes) if finish is None]
        if len(left) < len(rows):
            keep = torch.tensor(left, dtype=torch.long, device=limits.device)
            batch.select(keep)
            limits, log_p, keys = limits[keep], log_p[keep], keys[left]
            rows, begun = [rows[i] for i in left], [begun[i] for i in left]
    return [results[row] for row in range(len(indices))]


def perplexity(
    model: Transformer,
    documents: Iterable[Sequence[int]],
    *,
    length: int,
    stride: int,
    bos: int | None = None,
    batch_tokens: int = 8192,
) -> tuple[float, int]:
    """Summed negative log-likelihood (nats) of the documents under a decoder, and how many tokens it is of.

    A document longer than `length` tokens is read in windows that begin every `stride` tokens; each token is
    predicted once, by the first window that reaches it, so all but the first window's see at least
    length - stride tokens before them. Without `bos` in front, a document's first token is not predicted.
    perplexity = exp(nats / tokens); for bits per byte divide nats / ln 2 by the bytes of the text. Raises
    RonnaError for a model that is not a decoder and for lengths that do not fit.
    """
    if model.decoder is None or model.encoder is not None or model.head is None:
        raise RonnaError("perplexity is that of a decoder with a vocabulary head", fix="use a GPT kind of model")
    longest = model.max_length
    if length < 1 or (longest is not None and length > longest):
        fix = "use at least 1" if longest is None else f"use 1 to {longest}, the model's positions"
        raise RonnaError(f"found {length}", where="length", fix=fix)
    if not 1 <= stride <= length:
        raise RonnaError(f"found {stride}", where="stride", fix=f"use 1 to {length}, the length of a window")
    nats, count, size = 0.0, 0, 0
    batch: list[_Window] = []
    with inference(model):
        for window in _windows(documents, length, stride, bos):
            if batch and size + len(window.inputs) > batch_tokens:
                nats += _window_nats(model, batch)
                batch, size = [], 0
            batch.append(window)
            size += len(window.inputs)
            count += len(window.labels)
        if batch:
            nats += _window_nats(model, batch)
    return nats, count


class _Window(NamedTuple):
    inputs: list[int]
    labels: list[int]  # of the last inputs; those before have been predicted by an earlier window


def _windows(documents: Iterable[Sequence[int]], length: int, stride: int, bos: int | None) -> Iterator[_Window]:
    for document in documents:
        tokens = [*([] if bos is None else [bos]), *map(int, document)]
        last, done = len(tokens) - 1, 0
        for begin in range(0, last, stride):
            end = min(begin + length, last)
            yield _Window(tokens[begin:end], tokens[done + 1 : end + 1])
            done = end
            if end == last:
                break


def _window_nats(model: Transformer, windows: list[_Window]) -> float:
    assert model.head is not None
    device = model.device
    sequences = Sequences.of([len(window.inputs) for window in windows], device)
    tokens = torch.tensor([token for w in windows for token in w.inputs], device=device)
    labels = torch.tensor([token for w in windows for token in w.labels], device=device)
    predicted = torch.tensor([len(w.inputs) - i <= len(w.labels) for w in windows for i in range(len(w.inputs))])
    hidden = model.hidden(tokens, sequences, at=predicted.nonzero()[:, 0].to(device))
    nats, _ = vocabulary_loss(model.head, hidden, labels)
    return float(nats)
