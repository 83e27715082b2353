"""POST /v1/completions: continuations of texts or token ids."""

import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from ascendspeed.inference.prompts import InputPrompt, encode_prompt
from ascendspeed.inference.serving.api_error import ApiError
from ascendspeed.inference.serving.choice_stream import ChoiceStream
from ascendspeed.inference.serving.generation_service import (
    Delta,
    Generation,
    GenerationService,
    sequence_specs,
)
from ascendspeed.inference.serving.logprobs import token_text
from ascendspeed.inference.serving.protocol import (
    MAX_SEQUENCES,
    CompletionRequest,
    SamplingFields,
    random_seed,
)
from ascendspeed.inference.serving.request import RequestParams, TokenChoice
from ascendspeed.tokenization.chat import control_token_ids
from ascendspeed.tokenization.tokenizer import Tokenizer
from ascendspeed.utils.errors import UserError


@dataclass
class CompletionChoice:
    """A choice of the answer while it is generated."""

    text: str = ""
    tokens: list[TokenChoice] = field(default_factory=list)
    reason: str | None = None


class CompletionAnswer:
    """One request to /v1/completions."""

    def __init__(self, service: GenerationService, body: CompletionRequest) -> None:
        self.service, self.body = service, body
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.limits.model_name,
        }
        self.scores_prompt = body.echo and body.logprobs is not None
        self._prompt_choices: dict[int, tuple[TokenChoice, ...]] = {}

    async def prepare(self) -> None:
        """Encodes the prompts and checks the parameters. Raises `ApiError`."""
        service, body = self.service, self.body
        prompts = await service.in_tokenizer_thread(lambda: encode_prompts(service, body.prompt))
        if len(prompts) * body.choices > MAX_SEQUENCES:
            raise ApiError(400, f"prompts times n are more than {MAX_SEQUENCES}", "n")
        self.prompts = prompts
        self.generation = new_generation(
            service, body, prompts, body.max_tokens, body.logprobs or 0, scores_prompt=self.scores_prompt
        )

    async def answer(self) -> dict[str, Any]:
        """Returns the complete answer."""
        choices = [CompletionChoice(self._echo(i)) for i in range(len(self.generation.sequences))]
        async for delta in self.generation.deltas():
            choice = choices[delta.index]
            self._keep_prompt(delta)
            choice.text += delta.text
            choice.tokens += delta.tokens
            choice.reason = delta.reason
        return self.head | {
            "choices": [
                self._choice(i, choice.text, choice.tokens, choice.reason, 0, self.scores_prompt)
                for i, choice in enumerate(choices)
            ],
            "usage": self.generation.usage.body,
        }

    async def chunks(self) -> AsyncGenerator[str]:
        """Yields the answer as the data of server-sent events."""
        offsets = [0] * len(self.generation.sequences)
        waiting = {i: echo for i in range(len(offsets)) if (echo := self._echo(i))}
        for i in () if self.scores_prompt else list(waiting):
            yield self._chunk(i, Delta(i, waiting.pop(i)), 0)
        async with aclosing(self.generation.deltas()) as deltas:
            async for delta in deltas:
                self._keep_prompt(delta)
                if delta.index in waiting:
                    echo = waiting.pop(delta.index)
                    yield self._chunk(delta.index, Delta(delta.index, echo), 0, with_prompt=True)
                    offsets[delta.index] = self._prompt_characters(delta.index)
                yield self._chunk(delta.index, delta, offsets[delta.index])
                offsets[delta.index] += len(delta.text)
        if self.body.includes_usage:
            yield json.dumps(self.head | {"choices": [], "usage": self.generation.usage.body})

    def _keep_prompt(self, delta: Delta) -> None:
        """Keeps the scores of a prompt, which its first choice brings, for all its choices."""
        if delta.prompt:
            self._prompt_choices[delta.index // self.body.choices] = delta.prompt

    def _prompt_tokens(self, index: int) -> list[TokenChoice]:
        """Returns the tokens of a choice's prompt; the first one has no log-probability."""
        number = index // self.body.choices
        return [TokenChoice(self.prompts[number][0], None), *self._prompt_choices.get(number, ())]

    def _prompt_characters(self, index: int) -> int:
        """Returns the sum of the lengths of the prompt's tokens as text."""
        tokenizer = self.service.session.tokenizer
        return sum(len(token_text(tokenizer, choice.token)) for choice in self._prompt_tokens(index))

    def _chunk(self, index: int, delta: Delta, offset: int, with_prompt: bool = False) -> str:
        choice = self._choice(index, delta.text, delta.tokens, delta.reason, offset, with_prompt)
        return json.dumps(self.head | {"choices": [choice]}, ensure_ascii=False)

    def _choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[TokenChoice],
        reason: str | None,
        offset: int,
        with_prompt: bool = False,
    ) -> dict[str, Any]:
        logprobs = None
        if with_prompt:
            tokens = [*self._prompt_tokens(index), *tokens]
        if self.body.logprobs is not None:
            logprobs = completion_logprobs(self.service.session.tokenizer, tokens, offset)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _echo(self, index: int) -> str:
        if not self.body.echo:
            return ""
        return self.service.session.tokenizer.decode(self.prompts[index // self.body.choices])


def encode_prompts(
    service: GenerationService, prompt: str | list[str] | list[int] | list[list[int]]
) -> list[list[int]]:
    """Returns the ids of each prompt. Raises `ApiError`."""
    session = service.session
    if isinstance(prompt, str):
        prompt = [prompt]
    items: list[Any] = [prompt] if not prompt or isinstance(prompt[0], int) else list(prompt)
    encoded = []
    for item in items:
        if isinstance(item, str):
            try:
                item = encode_prompt(InputPrompt("prompt", item), session.tokenizer, None, session.adds_bos)
            except UserError as error:
                raise ApiError(400, str(error), "prompt") from None
        elif item and max(item) >= session.usable_vocab_size:
            message = f"prompt: token id {max(item)}; the vocabulary has {session.usable_vocab_size}"
            raise ApiError(400, message, "prompt")
        encoded.append(item)
    return encoded


def new_generation(
    service: GenerationService,
    body: SamplingFields,
    prompts: Sequence[list[int]],
    max_tokens: int | None,
    top_logprobs: int,
    controls: Mapping[int, str] | None = None,
    scores_prompt: bool = False,
) -> Generation:
    """Returns the generation of all choices after `prompts`. Raises `ApiError`.

    `controls`: control tokens of a chat format, see `ChoiceStream`; None: no chat. `scores_prompt`: compute
    the log-probabilities of the prompts too.
    """
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true", "stream_options")
    session, seed = service.session, random_seed()
    stop_ids = completion_stop_ids(service, body, in_chat=controls is not None)

    def params_of(prompt: list[int], number: int) -> RequestParams:
        params = body.request_params(
            max_new_tokens=service.check_length(prompt, max_tokens),
            stop_ids=stop_ids,
            vocab_size=session.usable_vocab_size,
            top_logprobs=top_logprobs,
            default_seed=seed,
            number=number,
        )
        is_first = number % body.choices == 0
        return replace(params, scores_prompt=scores_prompt and is_first)

    sequences = sequence_specs(prompts, body.choices, params_of)
    service.check_available(len(sequences))
    return Generation(service, sequences, lambda: ChoiceStream(session.tokenizer, body.stops, controls))


def completion_stop_ids(service: GenerationService, body: SamplingFields, in_chat: bool) -> tuple[int, ...]:
    """Returns the tokens that end an answer. Raises `ApiError`."""
    session = service.session
    try:
        named = control_token_ids(session.tokenizer, body.stops, "stop")
    except UserError as error:
        raise ApiError(400, str(error), "stop") from None
    ids = {*named, *(body.stop_token_ids or ())}
    if ids and max(ids) >= session.usable_vocab_size:
        message = f"stop_token_ids: token id {max(ids)}; the vocabulary has {session.usable_vocab_size}"
        raise ApiError(400, message, "stop_token_ids")
    if not body.ignore_eos:
        ids.update(session.stop_ids(in_chat))
    return tuple(sorted(ids))


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenChoice], offset: int) -> dict[str, Any]:
    """Returns the `logprobs` object of completions; `offset`: characters of the answer before `tokens`."""
    texts = [token_text(tokenizer, choice.token) for choice in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [choice.logprob for choice in tokens],
        "top_logprobs": [_top_logprobs(tokenizer, choice) for choice in tokens],
        "text_offset": offsets,
    }


def _top_logprobs(tokenizer: Tokenizer, choice: TokenChoice) -> dict[str, float] | None:
    """Returns text -> log-probability of the best tokens and the chosen one; of equal texts (a letter and its
    byte) the likelier. None for the first token of a prompt."""
    entries: dict[str, float] = {}
    if choice.logprob is None:
        return None
    for token, logprob in sorted((*choice.top, (choice.token, choice.logprob)), key=lambda pair: -pair[1]):
        entries.setdefault(token_text(tokenizer, token), logprob)
    return entries
