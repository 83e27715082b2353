"""Generates a set of completions by continuous batching: the next sequence takes the place of one that ends,
and tokens that prompts have in common pass through the model once."""

from collections.abc import Callable, Sequence

from ascendspeed.distributed.cuda_graphs import Capture
from ascendspeed.inference.engine import Completion, LanguageModel, SamplingParams
from ascendspeed.inference.engine.language_model import NAN_MESSAGE, PREFILL_CHUNK
from ascendspeed.inference.serving.paged_engine import EngineSettings, GeneratedToken, PagedEngine
from ascendspeed.inference.serving.request import Events, RequestParams, Submission
from ascendspeed.utils.errors import UserError

StopCallback = Callable[[int, int], bool]
"""(index of the prompt, new token) -> True if its sequence ends with this token. Called on every rank."""


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    max_running: int,
    stop_callback: StopCallback,
    on_completion: Callable[[int, Completion], None],
    capture: Capture | None = None,
) -> None:
    """Calls `on_completion` with the completion of every prompt (ids, not empty), in the order in which they
    end.

    At most `max_running` sequences are generated at a time; the cache holds as many of the longest.
    A completion is that of `sample` with the prompt alone. `capture`: see `PagedEngine`. Collective. Raises
    `UserError`.
    """
    params.check()
    if not prompts:
        return
    max_running = min(max_running, len(prompts))
    longest = max(len(prompt) for prompt in prompts) + params.max_new_tokens
    size = model.paged_block_size
    blocks = max_running * (-(-longest // size) + 1)
    settings = EngineSettings(blocks, size, PREFILL_CHUNK, max_running, max_request_tokens=longest)
    try:
        engine = PagedEngine(model, settings, capture)
        engine.apply(Events(submissions=_submissions(prompts, params, size)))
        scores = [0.0] * len(prompts)
        while not engine.scheduler.is_idle:
            stopped = []
            for result in engine.step():
                number = result.request.id
                scores[number] += result.choice.logprob
                reason = _end_reason(result, stop_callback)
                if reason:
                    on_completion(number, Completion(result.request.output, reason, scores[number]))
                    if not result.reason:
                        stopped.append(number)
            engine.apply(Events(cancellations=tuple(stopped)))
    finally:
        model.free_cache()


def _end_reason(result: GeneratedToken, stop_callback: StopCallback) -> str | None:
    if result.reason == "error":
        raise UserError(NAN_MESSAGE)
    if result.reason != "stop" and stop_callback(result.request.id, result.choice.token):
        return "stop"
    return result.reason


def _submissions(
    prompts: Sequence[Sequence[int]], params: SamplingParams, block_size: int
) -> tuple[Submission, ...]:
    """Returns a request per prompt, sorted by tokens. A request with a common prefix of at least one block
    waits until the first prompt with this prefix is in the cache."""
    submissions: list[Submission] = []
    order = sorted(range(len(prompts)), key=lambda i: list(prompts[i]))
    leader: int | None = None
    for number in order:
        prompt = list(prompts[number])
        shares = leader is not None and prompt[:block_size] == list(prompts[leader][:block_size])
        shares = shares and len(prompt) > block_size
        leader = leader if shares else number
        submissions.append(
            Submission(number, prompt, RequestParams(params, number), leader if shares else None)
        )
    return tuple(submissions)
