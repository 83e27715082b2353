"""Greedy decoding and sampling for a batch of prompts of any lengths."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from numpy.random import Generator
from torch import Tensor

from ascendspeed.inference.engine.beam_search import beam_search
from ascendspeed.inference.engine.language_model import LanguageModel
from ascendspeed.inference.engine.logits_processors import (
    apply_repetition_penalty,
    random_stream,
    sample_from_logits,
    warp_logits,
)
from ascendspeed.inference.engine.sampling_params import Completion, SamplingParams

StopCallback = Callable[[int, int], bool]
"""(row, new token) -> whether the row ends with this token; row = prompt * num_return_sequences + i.

Called on every rank, in the same order.
"""


def sample(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    stop_callback: StopCallback | None = None,
    prompt_numbers: Sequence[int] | None = None,
    should_end: Callable[[], bool] | None = None,
) -> list[list[Completion]]:
    """Generates `num_return_sequences` completions of every prompt (ids, not empty) in one batch.

    Collective: the same arguments and results on every rank. A completion does not depend on the rest of the
    batch: exactly in fp32; in bf16 a batch rounds differently from a single row.

    `prompt_numbers`: numbers of the prompts in a larger set; they select the random streams, so that the
    result does not depend on how the set is split into batches; None: 0, 1, ... `should_end` is called before
    every token on the sampling rank; True ends all sequences. Beam search calls neither it nor
    `stop_callback`. Beam search with sampling may return fewer completions if fewer exist. Raises
    `UserError`, also if the model's output is NaN or memory does not suffice.
    """
    params.check()
    assert all(prompts), "a prompt has at least one token"
    # Longest first: rows that still have prompt tokens are then always the first ones.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    numbers = prompt_numbers or range(len(prompts))
    with torch.inference_mode():
        try:
            if params.num_beams > 1:
                return beam_search(model, prompts, order, params, numbers)
            stop = stop_callback or (lambda row, token: False)
            end = should_end or (lambda: False)
            return _sample(model, prompts, order, params, stop, numbers, end)
        finally:
            model.free_cache()


@dataclass
class SequenceState:
    """A sequence that is being generated."""

    number: int
    """prompt * num_return_sequences + i."""
    length: int
    """Tokens in the cache."""
    random: Generator
    """Random stream of this sequence."""
    tokens: list[int] = field(default_factory=list)
    score: float = 0.0


def _sample(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    order: list[int],
    params: SamplingParams,
    stop_callback: StopCallback,
    numbers: Sequence[int],
    should_end: Callable[[], bool],
) -> list[list[Completion]]:
    count = params.num_return_sequences
    rows = _initial_rows(prompts, order, params, numbers)
    hidden = _prefill(model, prompts, order, params)
    seen = SeenTokens(model, params, [prompts[row.number // count] for row in rows])
    completions: dict[int, Completion] = {}
    while rows:
        chosen = _choose_tokens(model, hidden, params, rows, seen, should_end)
        if chosen is None:
            completions |= {row.number: Completion(row.tokens, "end", row.score) for row in rows}
            break
        tokens, scores = chosen
        active = []
        for i, (row, token, score) in enumerate(zip(rows, tokens.tolist(), scores.tolist(), strict=True)):
            row.score += score
            reason = _append_token(row, token, params, stop_callback)
            if reason:
                completions[row.number] = Completion(row.tokens, reason, row.score)
            else:
                active.append(i)
        if not active:
            break
        if len(active) < len(rows):
            active = compact_rows(active, len(rows))
            model.cache.reorder(active, max(row.length for row in rows))
            rows, tokens = [rows[i] for i in active], tokens[active]
            seen.select(active)
        seen.add(tokens)
        hidden = model.decode_step(tokens, [row.length for row in rows])
        for row in rows:
            row.length += 1
    return [[completions[i * count + j] for j in range(count)] for i in range(len(prompts))]


def _initial_rows(
    prompts: Sequence[Sequence[int]], order: list[int], params: SamplingParams, numbers: Sequence[int]
) -> list[SequenceState]:
    """Returns a state per sequence, in the order of the cache's rows."""
    count = params.num_return_sequences
    rows = []
    for i in order:
        for j in range(count):
            random = random_stream(params.seed, numbers[i] * count + j)
            rows.append(SequenceState(i * count + j, len(prompts[i]), random))
    return rows


def _prefill(
    model: LanguageModel, prompts: Sequence[Sequence[int]], order: list[int], params: SamplingParams
) -> Tensor | None:
    """Fills the cache with every prompt, repeated for its sequences.

    Returns the last hidden state of every row [n, h] on the last stage.
    """
    count = params.num_return_sequences
    lengths = [len(prompts[i]) for i in order]
    cache = model.allocate_cache(len(prompts) * count, lengths[0] + params.max_new_tokens, lengths)
    last_hidden = model.prefill([prompts[i] for i in order])
    cache.reorder([i // count for i in range(len(prompts) * count)], lengths[0])
    return torch.cat(last_hidden).repeat_interleave(count, 0) if model.is_last_stage else None


def _append_token(
    row: SequenceState, token: int, params: SamplingParams, stop_callback: StopCallback
) -> str | None:
    """Appends a token unless it is a stop token; returns the reason if the sequence ends."""
    if token in params.stop_ids:
        return "stop"
    row.tokens.append(token)
    if stop_callback(row.number, token):
        return "stop"
    return "length" if len(row.tokens) == params.max_new_tokens else None


def compact_rows(active: list[int], size: int) -> list[int]:
    """Returns the active rows in an order that moves as few as possible: the last ones fill the gaps of
    finished rows."""
    gaps = sorted(set(range(len(active))) - set(active))
    movers = [row for row in active if row >= len(active)]
    source = dict(zip(gaps, movers, strict=True))
    return [source.get(i, i) for i in range(len(active))]


class SeenTokens:
    """Tokens of each row's prompt and answer, for the repetition penalty; a mask on the sampling rank if
    there is a penalty."""

    def __init__(
        self, model: LanguageModel, params: SamplingParams, prompts: Sequence[Sequence[int]]
    ) -> None:
        self.mask: Tensor | None = None
        if model.is_sampling_rank and params.repetition_penalty != 1:
            shape = (len(prompts), model.config.vocab_size)
            self.mask = torch.zeros(shape, dtype=torch.bool, device=model.device.torch)
            for row, prompt in zip(self.mask, prompts, strict=True):
                row[torch.tensor(prompt, device=row.device)] = True

    def select(self, rows: list[int]) -> None:
        """Replaces row i by row `rows[i]`."""
        if self.mask is not None:
            self.mask = self.mask[rows]

    def add(self, tokens: Tensor) -> None:
        """Adds one token [n] per row."""
        if self.mask is not None:
            self.mask[torch.arange(len(tokens), device=tokens.device), tokens] = True


def _choose_tokens(
    model: LanguageModel,
    hidden: Tensor | None,
    params: SamplingParams,
    rows: list[SequenceState],
    seen: SeenTokens,
    should_end: Callable[[], bool],
) -> tuple[Tensor, Tensor] | None:
    """Returns every row's next token [n] and its log-probability [n] (fp64), on every rank; None if all rows
    end."""
    packed = None
    if model.is_last_stage:
        logits = model.logits(hidden)
        if model.is_sampling_rank:
            tokens = _choose_from_logits(logits, params, rows, seen)
            logprobs = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
            packed = torch.stack((tokens.double(), logprobs.double()))
            if should_end():
                packed[0] = -1
    packed = model.broadcast(packed, (2, len(rows)))
    return None if packed[0, 0] < 0 else (packed[0].long(), packed[1])


def _choose_from_logits(
    logits: Tensor, params: SamplingParams, rows: list[SequenceState], seen: SeenTokens
) -> Tensor:
    """Returns the next token [n] of every row from logits [n, V]."""
    scores = apply_repetition_penalty(logits, seen.mask, params.repetition_penalty)
    if params.vocab_size is not None:
        scores[:, params.vocab_size :] = float("-inf")
    if not params.is_random:
        return scores.argmax(-1)
    uniforms = torch.tensor([row.random.random() for row in rows], dtype=torch.float64, device=logits.device)
    return sample_from_logits(warp_logits(scores, params), uniforms)
