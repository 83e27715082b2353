"""The HTTP service: routes, limits, and what happens when a client leaves."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ascendspeed.inference.serving import chat_page, completions, openapi
from ascendspeed.inference.serving.access import error_response
from ascendspeed.inference.serving.api_error import ApiError
from ascendspeed.inference.serving.chat_completions import ChatAnswer, encode_chat
from ascendspeed.inference.serving.completions import CompletionAnswer
from ascendspeed.inference.serving.generation_service import GenerationService
from ascendspeed.inference.serving.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    parse_body,
)

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""Status that is logged when a client leaves before its answer."""
DISCONNECT_POLL_SECONDS = 0.1


class Routes:
    """Handlers of the service."""

    def __init__(self, service: GenerationService, version: str, has_key: bool) -> None:
        self.service, self.version, self.has_key = service, version, has_key

    def table(self) -> list[Route]:
        """Returns all routes."""
        return [
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.metrics),
            Route("/version", self.show_version),
            Route(openapi.PATH, self.describe),
            chat_page.route(),
        ]

    async def chat_completions(self, request: Request) -> Response:
        """Answers a conversation."""
        body = await self._read(request, ChatCompletionRequest)
        return await self._generate(request, ChatAnswer(self.service, body), body.stream)

    async def completions(self, request: Request) -> Response:
        """Continues texts."""
        body = await self._read(request, CompletionRequest)
        return await self._generate(request, CompletionAnswer(self.service, body), body.stream)

    async def models(self, request: Request) -> Response:
        """Lists the one model."""
        limits = self.service.limits
        entry = {
            "id": limits.model_name,
            "object": "model",
            "created": 0,
            "owned_by": self.service.session.config.family,
            "max_model_len": limits.max_model_len,
        }
        return JSONResponse({"object": "list", "data": [entry]})

    async def tokenize(self, request: Request) -> Response:
        """Returns the ids of a text or a conversation."""
        body = await self._read(request, TokenizeRequest)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", "prompt")
        service = self.service
        if body.messages is not None:
            messages, tools = body.messages, body.tools
            ids = await service.in_tokenizer_thread(lambda: encode_chat(service, messages, tools))
        elif body.add_special_tokens:
            prompt = body.prompt or ""
            (ids,) = await service.in_tokenizer_thread(lambda: completions.encode_prompts(service, prompt))
        else:
            text = body.prompt or ""
            ids = await service.in_tokenizer_thread(lambda: service.session.tokenizer.encode(text).tolist())
        return JSONResponse({"count": len(ids), "max_model_len": service.limits.max_model_len, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        """Returns the text of ids."""
        body = await self._read(request, DetokenizeRequest)
        tokenizer = self.service.session.tokenizer
        if body.tokens and max(body.tokens) >= tokenizer.vocab_size:
            raise ApiError(
                400, f"token id {max(body.tokens)}; the vocabulary has {tokenizer.vocab_size}", "tokens"
            )
        return JSONResponse({"prompt": tokenizer.decode(body.tokens)})

    async def health(self, request: Request) -> Response:
        """200 while the engine runs."""
        if self.service.engine_loop.error:
            raise ApiError(503, self.service.engine_loop.error)
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """200 while new requests are taken."""
        self.service.check_available(1)
        return JSONResponse({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        """Prometheus metrics."""
        return Response(self.service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def show_version(self, request: Request) -> Response:
        """Version of this package."""
        return JSONResponse({"version": self.version})

    async def describe(self, request: Request) -> Response:
        """OpenAPI description of the requests."""
        return JSONResponse(openapi.describe(self.version, self.has_key))

    async def _read(self, request: Request, cls: type[Any]) -> Any:
        """Returns the checked body. Raises `ApiError`."""
        seconds = self.service.limits.request_seconds
        try:
            async with asyncio.timeout(seconds):
                data = await self._read_bytes(request)
        except TimeoutError:
            raise ApiError(408, f"the body was not complete after {seconds:g} s") from None
        body: BaseModel = parse_body(cls, data)
        wanted, name = getattr(body, "model", None), self.service.limits.model_name
        if wanted not in (None, name):
            raise ApiError(
                404, f"the model {wanted!r} does not exist; this is {name!r}", "model", "model_not_found"
            )
        return body

    async def _read_bytes(self, request: Request) -> bytes:
        """Returns the body. Raises `ApiError`."""
        limit = self.service.limits.max_body_bytes
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > limit:
                raise ApiError(413, f"the body is larger than {limit:,} bytes")
        return bytes(data)

    async def _generate(
        self, request: Request, completion: CompletionAnswer | ChatAnswer, stream: bool
    ) -> Response:
        await completion.prepare()
        if stream:
            return StreamingResponse(_server_sent_events(completion), media_type="text/event-stream")
        answer = await _unless_client_leaves(request, completion.answer())
        if answer is None:
            logger.info(f"{completion.head['id']}: the client left")
            return Response(status_code=CLIENT_LEFT)
        return JSONResponse(answer)


async def _server_sent_events(completion: CompletionAnswer | ChatAnswer) -> AsyncIterator[str]:
    """Yields events; an error after the first byte is an event too. Closing it frees the sequences."""
    try:
        async with aclosing(completion.chunks()) as chunks:
            async for data in chunks:
                yield f"data: {data}\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body)}\n\n"
    yield "data: [DONE]\n\n"


async def _unless_client_leaves(request: Request, answer: Awaitable[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the answer, or None if the client leaves first; Starlette cancels only streamed answers."""

    async def wait_for_disconnect() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(DISCONNECT_POLL_SECONDS)

    work, departure = asyncio.ensure_future(answer), asyncio.ensure_future(wait_for_disconnect())
    try:
        await asyncio.wait({work, departure}, return_when=asyncio.FIRST_COMPLETED)
        return await work if work.done() else None
    finally:
        for task in (work, departure):
            task.cancel()
        await asyncio.gather(work, departure, return_exceptions=True)


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(ApiError(error.status_code, f"{request.url.path}: {error.detail}"))


async def _answer_departure(request: Request, error: Exception) -> Response:
    logger.info(f"{request.url.path}: the client left before its request was complete")
    return Response(status_code=CLIENT_LEFT)


async def _answer_crash(request: Request, error: Exception) -> Response:
    return error_response(ApiError(500, "internal error; see the log of the service"))


def create_app(
    service: GenerationService, version: str, has_key: bool, on_start: Callable[[], None]
) -> Starlette:
    """Returns the application, without its key; `on_start` is called when it takes requests."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        on_start()
        yield
        service.engine_loop.stop()

    return Starlette(
        routes=Routes(service, version, has_key).table(),
        lifespan=lifespan,
        exception_handlers={
            ApiError: _answer_api_error,
            HTTPException: _answer_http_error,
            ClientDisconnect: _answer_departure,
            Exception: _answer_crash,
        },
    )
