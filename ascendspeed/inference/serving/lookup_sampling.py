"""Greedy decoding of a batch of prompts with prompt lookup, by the paged engine."""

from collections.abc import Callable, Sequence

import torch

from ascendspeed.inference.engine import Completion, LanguageModel, SamplingParams
from ascendspeed.inference.serving.paged_engine import EngineSettings, GeneratedToken, PagedEngine
from ascendspeed.inference.serving.request import Events, RequestParams, Submission
from ascendspeed.utils.errors import UserError

TOKEN_BUDGET = 2048


def sample_with_lookup(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    lookup: int,
    stop_callback: Callable[[int, int], bool] | None = None,
    should_end: Callable[[], bool] | None = None,
) -> list[list[Completion]]:
    """Returns the completions of `engine.sample` for greedy `params`, in fewer forward passes if they repeat
    parts of their prompts or of themselves.

    `lookup`: most tokens that are proposed at a time. `stop_callback`, `should_end`: see `engine.sample`.
    Collective. Raises `UserError`.
    """
    assert not params.is_random
    assert params.num_beams == params.num_return_sequences == 1
    longest = [len(prompt) + params.max_new_tokens for prompt in prompts]
    size = model.paged_block_size
    blocks = sum(-(-length // size) for length in longest)
    settings = EngineSettings(blocks, size, TOKEN_BUDGET, len(prompts), share_prefixes=False, lookup=lookup)
    try:
        engine = PagedEngine(model, settings)
        requests = [
            Submission(row, list(prompt), RequestParams(params)) for row, prompt in enumerate(prompts)
        ]
        engine.apply(Events(tuple(requests)))
        return _run(engine, len(prompts), stop_callback, should_end)
    finally:
        model.free_cache()


def _run(
    engine: PagedEngine,
    rows: int,
    stop_callback: Callable[[int, int], bool] | None,
    should_end: Callable[[], bool] | None,
) -> list[list[Completion]]:
    tokens: list[list[int]] = [[] for _ in range(rows)]
    scores, reasons = [0.0] * rows, [""] * rows
    while not engine.scheduler.is_idle:
        if should_end and _agree(engine.model, should_end):
            break
        for result in engine.step():
            row = result.request.id
            if reasons[row]:
                continue  # a token after a stop string, of the same pass
            scores[row] += result.choice.logprob
            reasons[row] = _advance(result, tokens[row], stop_callback)
            if reasons[row] and not result.reason:
                engine.apply(Events(cancellations=(row,)))
    return [
        [Completion(*row)]
        for row in zip(tokens, [reason or "end" for reason in reasons], scores, strict=True)
    ]


def _advance(
    result: GeneratedToken, tokens: list[int], stop_callback: Callable[[int, int], bool] | None
) -> str:
    """Adds a token; returns the reason if the row ends."""
    if result.reason == "error":
        raise UserError("the model's output is NaN: its weights are damaged, or the precision is too low")
    if result.reason == "stop":
        return "stop"
    tokens.append(result.choice.token)
    if stop_callback and stop_callback(result.request.id, result.choice.token):
        return "stop"
    return result.reason or ""


def _agree(model: LanguageModel, should_end: Callable[[], bool]) -> bool:
    """Returns the sampling rank's decision on every rank."""
    flag = None
    if model.is_sampling_rank:
        flag = torch.tensor([float(should_end())], dtype=torch.float64, device=model.device.torch)
    return bool(model.broadcast(flag, (1,))[0])
