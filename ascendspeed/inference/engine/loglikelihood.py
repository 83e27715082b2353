"""How likely a text is: of every token, or of a continuation after a context, with what many contexts share computed once."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ascendspeed.config.schema import ModelConfig
from ascendspeed.inference.engine.language_model import LanguageModel

Tokens = Sequence[int]


@dataclass(frozen=True)
class ContinuationScore:
    """Of a continuation."""

    logprob: float
    """Sum of its tokens' log-probabilities."""
    greedy: bool
    """Whether each of its tokens was the most likely one."""
    tokens: int


@dataclass(frozen=True)
class ScoringRow:
    """A row for the model, and who asked for it."""

    tokens: tuple[int, ...]
    start: int
    """First position whose prediction is wanted."""
    requests: list[int]


@dataclass(frozen=True)
class PrefixGroup:
    """Inputs that begin with the same `shared` tokens."""

    shared: int
    unique_rows: list[ScoringRow]


MAX_LOGITS = 1 << 26
"""At a time, on the way to log-probabilities."""


def token_logprobs(model: LanguageModel, tokens: Sequence[Tokens], batch_size: int = 16) -> list[Tensor]:
    """Of each sequence every token's log-probability after those before it: [n - 1], fp32, on the CPU. Collective."""
    found = [torch.empty(0)] * len(tokens)
    order = sorted((i for i in range(len(tokens)) if len(tokens[i]) > 1), key=lambda i: -len(tokens[i]))
    with torch.inference_mode(), _freeing(model):
        for batch in batches(order, batch_size):
            rows = [tokens[i][:-1] for i in batch]
            lengths = [len(row) for row in rows]
            model.allocate_cache(len(rows), lengths[0], lengths)
            hidden = model.prefill(rows, wanted=[range(length) for length in lengths])
            told = _ask(
                model, hidden, range(sum(lengths)), [token for i in batch for token in tokens[i][1:]]
            )[0]
            for i, part in zip(batch, told.split(lengths), strict=True):
                found[i] = part.float()
    return found


@contextmanager
def _freeing(model: LanguageModel) -> Iterator[None]:
    """The cache goes at the end, whatever happened."""
    try:
        yield
    finally:
        model.free_cache()


def score_continuations(
    model: LanguageModel,
    requests: Sequence[tuple[Tokens, Tokens]],
    batch_size: int = 16,
    got: Callable[[int, ContinuationScore], None] | None = None,
) -> list[ContinuationScore]:
    """The scores of (context, continuation) pairs, neither of them empty. Collective.

    Requests with the same input (a question and its one-token answers) are one row; rows that begin with the same tokens (the
    examples before the questions) are computed once up to there. `got(index, score)` is called as scores come, in that order.
    """
    assert all(context and continuation for context, continuation in requests), (
        "neither context nor continuation may be empty"
    )
    found: dict[int, ContinuationScore] = {}
    with torch.inference_mode(), _freeing(model):
        for group in group_by_prefix(unique_rows(requests), model.config):
            for batch in _batches(model, group, batch_size):
                for i, one in _scores(model, requests, group, batch):
                    found[i] = one
                    if got:
                        got(i, one)
    return [found[i] for i in range(len(requests))]


def unique_rows(requests: Sequence[tuple[Tokens, Tokens]]) -> list[ScoringRow]:
    """The different rows that the requests need, sorted by their tokens."""
    asked: dict[tuple[int, ...], list[int]] = {}
    for i, (context, continuation) in enumerate(requests):
        asked.setdefault((*context, *continuation[:-1]), []).append(i)
    return [
        ScoringRow(tokens, min(len(requests[i][0]) for i in who) - 1, who)
        for tokens, who in sorted(asked.items())
    ]


def group_by_prefix(rows: Sequence[ScoringRow], config: ModelConfig) -> list[PrefixGroup]:
    """Cuts sorted rows into groups with a common beginning, where sharing it saves more tokens than the shorter beginning costs.

    What is asked about is not shared; nor are rows that dynamic rope scaling turns each by a base of its own.
    """
    found: list[PrefixGroup] = []
    longest = config.max_position_embeddings if config.rope_scaling_type == "dynamic" else math.inf
    alone = [row for row in rows if len(row.tokens) > longest]
    for row in (row for row in rows if len(row.tokens) <= longest):
        if found:
            group = found[-1]
            common = min(_common(group.inputs[0].tokens[: group.shared], row.tokens), row.start)
            if (group.shared - common) * len(group.inputs) < common:
                found[-1] = PrefixGroup(common, [*group.inputs, row])
                continue
        found.append(PrefixGroup(row.start, [row]))
    single = [group.inputs[0] for group in found if len(group.inputs) == 1]
    found = [group for group in found if len(group.inputs) > 1]
    return found + [PrefixGroup(0, rest) for rest in (single, alone) if rest]


def _common(a: Tokens, b: Tokens) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def batches(items: Sequence, size: int) -> Iterator[Sequence]:
    """`size` at a time."""
    return (items[i : i + size] for i in range(0, len(items), size))


def _batches(model: LanguageModel, group: PrefixGroup, batch_size: int) -> Iterator[Sequence[ScoringRow]]:
    """The group's rows, longest first, with what they share in the cache of every one of them."""
    rows = sorted(group.inputs, key=lambda row: -len(row.tokens))
    count = min(batch_size, len(rows))
    if group.shared:
        cache = model.allocate_cache(count, len(rows[0].tokens), [0])
        model.prefill([rows[0].tokens[: group.shared]], wanted=[[]])
        cache.reorder([0] * count, group.shared)
    for batch in batches(rows, batch_size):
        if not group.shared:
            lengths = [len(row.tokens) for row in batch]
            model.allocate_cache(len(batch), lengths[0], lengths)
        yield batch


def _scores(
    model: LanguageModel,
    requests: Sequence[tuple[Tokens, Tokens]],
    group: PrefixGroup,
    batch: Sequence[ScoringRow],
) -> Iterator[tuple[int, ContinuationScore]]:
    wanted = [range(row.start - group.shared, len(row.tokens) - group.shared) for row in batch]
    hidden = model.prefill([row.tokens[group.shared :] for row in batch], group.shared, wanted)
    places, tokens, sizes = [], [], []
    begin = 0  # of a row among the wanted positions of all
    for row, positions in zip(batch, wanted, strict=True):
        for i in row.requests:
            context, continuation = requests[i]
            first = begin + len(context) - 1 - row.start
            places += range(first, first + len(continuation))
            tokens += continuation
            sizes.append((i, len(continuation)))
        begin += len(positions)
    told = _ask(model, hidden, places, tokens)
    for (i, size), (values, best) in zip(
        sizes, zip(*(x.split([n for _, n in sizes]) for x in told), strict=True), strict=True
    ):
        yield i, ContinuationScore(float(values.sum()), bool(best.all()), size)


def _ask(model: LanguageModel, hidden: list[Tensor], places: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Of tokens[i] after hidden state places[i]: log-probability, and whether it is the most likely one; [2, n], on every rank."""
    told = None
    if model.is_last_stage:
        states, size = torch.cat(hidden), max(1, MAX_LOGITS // model.config.vocab_size)
        at, wanted = (torch.tensor(x, device=states.device) for x in (list(places), list(tokens)))
        told = torch.empty(2, len(tokens), dtype=torch.float64, device=states.device)
        for start in range(0, len(states), size):
            mine = (at >= start) & (at < start + size)
            logits = model.logits(states[start : start + size])
            rows = at[mine] - start
            values = logits[rows, wanted[mine]]
            told[0, mine] = (values - logits.logsumexp(-1)[rows]).double()
            told[1, mine] = (values == logits.amax(-1)[rows]).double()
    return model.broadcast(told, (2, len(tokens))).cpu()
