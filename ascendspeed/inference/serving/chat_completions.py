"""POST /v1/chat/completions: answers in a conversation, with tool calls."""

import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ascendspeed.inference.serving.api_error import ApiError
from ascendspeed.inference.serving.choice_stream import FunctionCall
from ascendspeed.inference.serving.completions import new_generation
from ascendspeed.inference.serving.generation_service import (
    Delta,
    GenerationService,
)
from ascendspeed.inference.serving.logprobs import chat_logprobs
from ascendspeed.inference.serving.protocol import ChatCompletionRequest
from ascendspeed.inference.serving.request import TokenChoice
from ascendspeed.tokenization.chat import read_messages
from ascendspeed.utils.errors import UserError


@dataclass
class ChatChoice:
    """A choice of the answer while it is generated."""

    content: str = ""
    calls: list[FunctionCall] = field(default_factory=list)
    tokens: list[TokenChoice] = field(default_factory=list)
    reason: str | None = None


class ChatAnswer:
    """One request to /v1/chat/completions."""

    def __init__(self, service: GenerationService, body: ChatCompletionRequest) -> None:
        self.service, self.body = service, body
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.limits.model_name,
        }
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        if None not in (body.max_tokens, body.max_completion_tokens):
            raise ApiError(400, "max_tokens and max_completion_tokens: give one of them", "max_tokens")

    async def prepare(self) -> None:
        """Renders the conversation and checks the parameters. Raises `ApiError`."""
        service, body = self.service, self.body
        tools = None if body.tool_choice == "none" else body.tools
        prompt = await service.in_tokenizer_thread(lambda: encode_chat(service, body.messages, tools))
        max_tokens = body.max_completion_tokens or body.max_tokens
        controls = {number: name for name, number in service.session.chat_format.controls.items()}
        self.generation = new_generation(
            service, body, [prompt], max_tokens, body.top_logprobs or 0, controls
        )

    async def answer(self) -> dict[str, Any]:
        """Returns the complete answer."""
        choices = [ChatChoice() for _ in self.generation.sequences]
        async for delta in self.generation.deltas():
            choice = choices[delta.index]
            choice.content += delta.text
            choice.tokens += delta.tokens
            choice.calls += [delta.call] if delta.call else []
            choice.reason = delta.reason
        return self.head | {
            "object": "chat.completion",
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": self.generation.usage.body,
        }

    async def chunks(self) -> AsyncGenerator[str]:
        """Yields the answer as the data of server-sent events."""
        calls = [0] * len(self.generation.sequences)
        for index in range(len(calls)):
            yield self._chunk(index, {"role": "assistant", "content": ""}, None, ())
        async with aclosing(self.generation.deltas()) as deltas:
            async for delta in deltas:
                yield self._delta_chunk(delta, calls[delta.index])
                calls[delta.index] += delta.call is not None
        if self.body.includes_usage:
            head = self.head | {"object": "chat.completion.chunk", "choices": []}
            yield json.dumps(head | {"usage": self.generation.usage.body})

    def _delta_chunk(self, delta: Delta, calls_before: int) -> str:
        """Returns a chunk; `calls_before`: number of tool calls that the choice had before."""
        change: dict[str, Any] = {"content": delta.text} if delta.text else {}
        if delta.call:
            change["tool_calls"] = [{"index": calls_before} | _tool_call(delta.call)]
        return self._chunk(delta.index, change, delta.reason, delta.tokens)

    def _chunk(
        self, index: int, change: dict[str, Any], reason: str | None, tokens: Sequence[TokenChoice]
    ) -> str:
        choice = {
            "index": index,
            "delta": change,
            "logprobs": self._logprobs(tokens),
            "finish_reason": reason,
        }
        chunk = self.head | {"object": "chat.completion.chunk", "choices": [choice]}
        return json.dumps(chunk, ensure_ascii=False)

    def _choice(self, index: int, choice: ChatChoice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.content, "refusal": None}
        if choice.calls:
            message["content"] = choice.content or None
            message["tool_calls"] = [_tool_call(call) for call in choice.calls]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.reason,
        }

    def _logprobs(self, tokens: Sequence[TokenChoice]) -> dict[str, Any] | None:
        return chat_logprobs(self.service.session.tokenizer, tokens) if self.body.logprobs else None


def encode_chat(
    service: GenerationService, messages: Sequence[Mapping[str, Any]], tools: Any = None
) -> list[int]:
    """Returns the ids of a conversation up to the answer. Raises `ApiError`."""
    try:
        parsed = read_messages([_plain_message(message) for message in messages], "messages")
        return service.session.chat_format.prompt_ids(parsed, "messages", _plain_tools(tools))
    except UserError as error:
        raise ApiError(400, str(error), "messages") from None


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a message without fields that are null, and with the text of its parts as content.

    The `openai` client sends null for every field that an answer lacked.
    """
    plain = {key: value for key, value in message.items() if value is not None}
    if plain.get("annotations") == []:
        del plain["annotations"]
    content = plain.get("content")
    if isinstance(content, list):
        if not all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        ):
            raise ApiError(400, "messages: only parts of type text are supported", "messages")
        plain["content"] = "".join(part["text"] for part in content)
    return plain


def _plain_tools(tools: Any) -> Any:
    """Returns the descriptions of functions without OpenAI's wrapper {"type", "function"}."""
    return [tool.get("function", tool) for tool in tools] if tools else None


def _tool_call(call: FunctionCall) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
