"""Greedy and sampled text, for prompts of any lengths side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from numpy.random import Generator
from torch import Tensor

from ascendspeed.inference.engine import beam_search
from ascendspeed.inference.engine.language_model import LanguageModel
from ascendspeed.inference.engine.logits_processors import (
    apply_repetition_penalty,
    random_stream,
    sample_from_logits,
    warp_logits,
)
from ascendspeed.inference.engine.sampling_params import Completion, SamplingParams

StopCallback = Callable[[int, int], bool]
"""(row, new token) -> whether the row ends with it; row = prompt * num_return_sequences + i. Asked on every rank, in one order."""


def sample(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    watch: StopCallback | None = None,
    numbers: Sequence[int] | None = None,
    end: Callable[[], bool] | None = None,
) -> list[list[Completion]]:
    """`num_return_sequences` completions of every prompt (ids, not empty), as if it were alone; one batch.

    Collective: the same arguments and results on every rank. `numbers`: of the prompts in a larger set, which decide what is drawn
    for each, whatever batches it is cut into; None: 0, 1, ... `end` is asked before every token, on the rank that chooses, whether
    all are to end where they are. Under beam search neither it nor `watch` is asked. Drawn beams may be fewer than asked for, where
    there is less to draw from. As if alone is exact in fp32; in bf16 a batch rounds otherwise than a row.
    Raises `UserError`, also when the model gives NaN or memory does not suffice.
    """
    params.check()
    assert all(prompts), "a prompt has at least one token"
    # Longest first: so the rows that have more to read are always the first ones.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    numbers = numbers or range(len(prompts))
    with torch.inference_mode():
        try:
            if params.num_beams > 1:
                return beam_search.beam_search(model, prompts, order, params, numbers)
            return _sample(
                model,
                prompts,
                order,
                params,
                watch or (lambda row, token: False),
                numbers,
                end or (lambda: False),
            )
        finally:
            model.free_cache()


@dataclass
class SequenceState:
    """A sequence under way."""

    number: int
    """prompt * num_return_sequences + i."""
    length: int
    """Tokens in the cache."""
    draws: Generator
    """This row's own stream."""
    tokens: list[int] = field(default_factory=list)
    score: float = 0.0


def _sample(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    order: list[int],
    params: SamplingParams,
    watch: StopCallback,
    numbers: Sequence[int],
    end: Callable[[], bool],
) -> list[list[Completion]]:
    each, lengths = params.num_return_sequences, [len(prompts[i]) for i in order]
    rows = [
        SequenceState(i * each + j, len(prompts[i]), random_stream(params.seed, numbers[i] * each + j))
        for i in order
        for j in range(each)
    ]
    cache = model.allocate_cache(len(rows), lengths[0] + params.max_new_tokens, lengths)
    last = model.prefill([prompts[i] for i in order])
    hidden = torch.cat(last).repeat_interleave(each, 0) if model.is_last_stage else None
    cache.reorder([i // each for i in range(len(rows))], lengths[0])
    seen = SeenTokens(model, params, [prompts[row.number // each] for row in rows])
    done: dict[int, Completion] = {}
    while True:
        chosen = _choose(model, hidden, params, rows, seen, end)
        if chosen is None:
            done |= {row.number: Completion(row.tokens, "end", row.score) for row in rows}
            return [[done[i * each + j] for j in range(each)] for i in range(len(prompts))]
        tokens, scores = chosen
        kept = []
        for i, (row, token, score) in enumerate(zip(rows, tokens.tolist(), scores.tolist(), strict=True)):
            row.score += score
            reason = _ended(row, token, params, watch)
            if reason:
                done[row.number] = Completion(row.tokens, reason, row.score)
            else:
                kept.append(i)
        if not kept:
            return [[done[i * each + j] for j in range(each)] for i in range(len(prompts))]
        if len(kept) < len(rows):  # a finished row gives its place to the last one, and costs nothing more
            kept = compact_rows(kept, len(rows))
            cache.reorder(kept, max(row.length for row in rows))
            rows, tokens = [rows[i] for i in kept], tokens[kept]
            seen.select(kept)
        seen.add(tokens)
        hidden = model.decode_step(tokens, [row.length for row in rows])
        for row in rows:
            row.length += 1


def _ended(row: SequenceState, token: int, params: SamplingParams, watch: StopCallback) -> str | None:
    if token in params.stop_ids:
        return "stop"
    row.tokens.append(token)
    if watch(row.number, token):
        return "stop"
    return "length" if len(row.tokens) == params.max_new_tokens else None


def compact_rows(kept: list[int], size: int) -> list[int]:
    """The rows to keep, those from the end moved to where others went: as few as possible move."""
    holes = sorted(set(range(len(kept))) - set(kept))
    movers = [row for row in kept if row >= len(kept)]
    moved = dict(zip(holes, movers, strict=True))
    return [moved.get(i, i) for i in range(len(kept))]


class SeenTokens:
    """Which tokens each row has had, for the repetition penalty; kept on the choosing rank, and only where there is one."""

    def __init__(
        self, model: LanguageModel, params: SamplingParams, prompts: Sequence[Sequence[int]]
    ) -> None:
        self.mask: Tensor | None = None
        if model.is_sampling_rank and params.repetition_penalty != 1:
            self.mask = torch.zeros(
                len(prompts), model.config.vocab_size, dtype=torch.bool, device=model.device.torch
            )
            for row, prompt in zip(self.mask, prompts, strict=True):
                row[torch.tensor(prompt, device=row.device)] = True

    def select(self, rows: list[int]) -> None:
        """Row i becomes what `rows[i]` was."""
        if self.mask is not None:
            self.mask = self.mask[rows]

    def add(self, tokens: Tensor) -> None:
        """One more token of each row."""
        if self.mask is not None:
            self.mask[torch.arange(len(tokens), device=tokens.device), tokens] = True


def _choose(
    model: LanguageModel,
    hidden: Tensor | None,
    params: SamplingParams,
    rows: list[SequenceState],
    seen: SeenTokens,
    end: Callable[[], bool],
) -> tuple[Tensor, Tensor] | None:
    """Every row's next token [n] and its log-probability [n], fp64 on the CPU; tokens are on the device. None: it is to end."""
    packed = None
    if model.is_last_stage:
        logits = model.logits(hidden)
        if model.is_sampling_rank:
            choices = apply_repetition_penalty(logits, seen.mask, params.repetition_penalty)
            if params.vocab_size is not None:
                choices[:, params.vocab_size :] = float("-inf")
            if params.do_sample:
                draws = torch.tensor(
                    [row.draws.random() for row in rows], dtype=torch.float64, device=logits.device
                )
                tokens = sample_from_logits(warp_logits(choices, params), draws)
            else:
                tokens = choices.argmax(-1)
            scores = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
            packed = torch.stack((tokens.double(), scores.double()))
            if end():
                packed[0] = -1
    packed = model.broadcast(packed, (2, len(rows)))
    return None if packed[0, 0] < 0 else (packed[0].long(), packed[1])
