"""Generates the choices of HTTP requests: submits sequences to the engine and yields their text."""

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from ascendspeed.inference.serving.api_error import ApiError
from ascendspeed.inference.serving.choice_stream import ChoiceStream, FunctionCall
from ascendspeed.inference.serving.engine_loop import EngineLoop
from ascendspeed.inference.serving.metrics import ServiceMetrics
from ascendspeed.inference.serving.paged_engine import GeneratedToken
from ascendspeed.inference.serving.request import RequestParams, Submission, TokenChoice
from ascendspeed.inference.session import Session

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class ServiceLimits:
    """Limits of the service."""

    model_name: str
    max_model_len: int
    """Most tokens of prompt and answer."""
    max_sequences: int
    """Most sequences that run or wait."""
    max_body_bytes: int
    request_seconds: float
    """Deadline of a request."""


@dataclass(frozen=True)
class SequenceSpec:
    """A choice that is to be generated."""

    prompt: list[int]
    params: RequestParams
    shares_previous: bool = False
    """Its prompt is that of the choice before it."""


@dataclass(frozen=True)
class Delta:
    """Progress of a choice."""

    index: int
    text: str = ""
    tokens: tuple[TokenChoice, ...] = ()
    call: FunctionCall | None = None
    reason: str | None = None
    """stop, length or tool_calls, with the last delta of the choice."""
    prompt: tuple[TokenChoice, ...] = ()
    """Log-probabilities of the prompt's tokens from the second one on, with the first delta of its first
    choice, if they were asked for."""


@dataclass
class TokenUsage:
    """Token counts of a request."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    @property
    def body(self) -> dict[str, object]:
        """The `usage` object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass
class _Choice:
    """A choice that is being generated."""

    index: int
    request_id: int
    stream: ChoiceStream
    tokens: int = 0
    has_call: bool = False


@dataclass
class Generation:
    """The choices of one HTTP request; iterate over `deltas` once."""

    service: "GenerationService"
    sequences: Sequence[SequenceSpec]
    new_stream: Callable[[], ChoiceStream]
    usage: TokenUsage = field(default_factory=TokenUsage)

    async def deltas(self) -> AsyncGenerator[Delta]:
        """Yields the progress of all choices. Raises `ApiError`; frees what is left if it is closed."""
        service = self.service
        arrivals: asyncio.Queue[GeneratedToken | str] = asyncio.Queue()
        choices = service.submit(self.sequences, self.new_stream, arrivals)
        self.usage.prompt = sum(len(spec.prompt) for spec in self.sequences if not spec.shares_previous)
        timer = service.metrics.start_request(self.usage.prompt)
        active = {choice.request_id: choice for choice in choices}
        try:
            async with asyncio.timeout(service.limits.request_seconds):
                while active:
                    item = await arrivals.get()
                    if isinstance(item, str):
                        raise ApiError(500, f"the engine has failed: {item}")
                    choice = active.get(item.request.id)
                    if choice is None:
                        continue  # a token of the step in which a stop string was found
                    timer.record_token()
                    delta = self._advance(choice, item)
                    if delta.reason:
                        del active[choice.request_id]
                        service.metrics.count_finished(delta.reason)
                    yield delta
        except TimeoutError:
            seconds = service.limits.request_seconds
            raise ApiError(504, f"the answer was not complete after {seconds:g} s") from None
        finally:
            timer.stop()
            for request_id in active:
                service.engine_loop.cancel(request_id)
                service.metrics.count_finished("abort")
            service.forget(choices)

    def _advance(self, choice: _Choice, result: GeneratedToken) -> Delta:
        """Adds a token to a choice."""
        token, reason = result.choice, result.reason
        if reason == "error":
            raise ApiError(500, "the model's output is NaN")
        self.usage.completion += 1
        if not choice.tokens and not self.sequences[choice.index].shares_previous:
            self.usage.cached += result.request.shared_tokens
        prompt = () if choice.tokens else tuple(result.request.prompt_choices)
        choice.tokens += 1
        is_stop_token = reason == "stop"  # only a stop token makes the engine say so
        text, call = ("", None) if is_stop_token else choice.stream.push(token.token)
        tokens = () if is_stop_token else (token,)
        if choice.stream.stopped and reason != "stop":
            if reason is None:
                self.service.engine_loop.cancel(choice.request_id)
            reason = "stop"
        if reason:
            rest, last_call = choice.stream.finish()
            text, call = text + rest, call or last_call
        choice.has_call = choice.has_call or call is not None
        if reason == "stop" and choice.has_call:
            reason = "tool_calls"
        return Delta(choice.index, text, tokens, call, reason, prompt)


class GenerationService:
    """Asyncio side of the engine: one per process, on rank 0."""

    def __init__(
        self, session: Session, engine_loop: EngineLoop, limits: ServiceLimits, metrics: ServiceMetrics
    ) -> None:
        self.session, self.engine_loop, self.limits, self.metrics = session, engine_loop, limits, metrics
        self.is_draining = False
        self._arrivals: dict[int, asyncio.Queue[GeneratedToken | str]] = {}
        self._numbers = itertools.count(1)
        # One thread: a tokenizer need not be safe for several, and a long text must not block the event loop.
        self._tokenizer_thread = ThreadPoolExecutor(1, "tokenizer")

    @property
    def active(self) -> int:
        """Sequences that run or wait."""
        return len(self._arrivals)

    def start(self) -> None:
        """Starts the engine thread; call it on the event loop."""
        event_loop = asyncio.get_running_loop()
        call = event_loop.call_soon_threadsafe
        self.engine_loop.deliver = partial(call, self._dispatch)
        self.engine_loop.report_failure = partial(call, self._fail)
        self.engine_loop.start()

    async def in_tokenizer_thread(self, work: Callable[[], T]) -> T:
        """Runs tokenization beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizer_thread, work)

    def check_available(self, sequences: int) -> None:
        """Raises `ApiError` if the service cannot take so many sequences, now or ever."""
        if self.is_draining:
            raise ApiError(503, "the service is shutting down")
        self._check_capacity(sequences)

    def _check_capacity(self, sequences: int) -> None:
        """Raises `ApiError` if the engine has failed or the queue is full."""
        if self.engine_loop.error:
            raise ApiError(503, self.engine_loop.error)
        most = self.limits.max_sequences
        if sequences > most:  # clients repeat a request after 429, and this one never fits
            raise ApiError(400, f"prompts times n are {sequences} sequences; the limit is {most}", "n")
        if self.active + sequences > most:
            raise ApiError(
                429, f"{self.active} sequences run or wait; try again later", code="rate_limit_exceeded"
            )

    def check_length(self, prompt: Sequence[int], max_tokens: int | None) -> int:
        """Returns the most new tokens after a prompt. Raises `ApiError`."""
        limit = self.limits.max_model_len
        if not prompt:
            raise ApiError(400, "the prompt is empty", "prompt")
        remaining = limit - len(prompt)
        if remaining < 1 or (max_tokens or 1) > remaining:
            wanted = f" and {max_tokens} new ones are asked for" if max_tokens else ""
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens{wanted}; the limit is {limit} together",
                "prompt",
                "context_length_exceeded",
            )
        return max_tokens or remaining

    def submit(
        self,
        sequences: Sequence[SequenceSpec],
        new_stream: Callable[[], ChoiceStream],
        arrivals: "asyncio.Queue[GeneratedToken | str]",
    ) -> list[_Choice]:
        """Sends sequences to the engine; their tokens come to `arrivals`. Raises `ApiError`."""
        self._check_capacity(len(sequences))  # while draining, a stream that has begun is finished
        choices, submissions = [], []
        leader: int | None = None
        for index, spec in enumerate(sequences):
            request_id = next(self._numbers)
            if not spec.shares_previous:
                leader = request_id
            follows = leader if spec.shares_previous else None
            submissions.append(Submission(request_id, spec.prompt, spec.params, follows))
            choices.append(_Choice(index, request_id, new_stream()))
            self._arrivals[request_id] = arrivals
        self.engine_loop.submit(submissions)
        return choices

    def forget(self, choices: Sequence[_Choice]) -> None:
        """Removes the entries of an HTTP request."""
        for choice in choices:
            self._arrivals.pop(choice.request_id, None)

    def _dispatch(self, results: Sequence[GeneratedToken]) -> None:
        for result in results:
            if arrivals := self._arrivals.get(result.request.id):
                arrivals.put_nowait(result)

    def _fail(self, cause: str) -> None:
        for arrivals in set(self._arrivals.values()):
            arrivals.put_nowait(cause)


def sequence_specs(
    prompts: Sequence[list[int]], choices: int, params_of: Callable[[list[int], int], RequestParams]
) -> list[SequenceSpec]:
    """Returns `choices` sequences per prompt; the choices of a prompt share its cache."""
    return [
        SequenceSpec(prompt, params_of(prompt, p * choices + i), shares_previous=i > 0)
        for p, prompt in enumerate(prompts)
        for i in range(choices)
    ]
