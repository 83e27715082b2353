"""OpenAPI description of the service, from the models of its requests."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ascendspeed.inference.serving.protocol import (
    IGNORED_FIELDS,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

PATH = "/openapi.json"
REQUESTS: dict[str, tuple[type[BaseModel], str, tuple[str, ...]]] = {
    "/v1/chat/completions": (
        ChatCompletionRequest,
        "Answers a conversation.",
        ("id", "object", "created", "model", "choices", "usage"),
    ),
    "/v1/completions": (
        CompletionRequest,
        "Continues texts.",
        ("id", "object", "created", "model", "choices", "usage"),
    ),
    "/tokenize": (
        TokenizeRequest,
        "Returns the ids of a text or a conversation.",
        ("count", "max_model_len", "tokens"),
    ),
    "/detokenize": (DetokenizeRequest, "Returns the text of ids.", ("prompt",)),
}
"""Path of a POST request -> its body, its summary, and the fields of its answer."""
GETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "/v1/models": ("Lists the one model.", ("object", "data")),
    "/version": ("Returns the version of the service.", ("version",)),
    "/health": ("Returns 200 while the engine runs.", ()),
    "/ready": ("Returns 200 while requests are taken.", ()),
}
"""Path of a GET request -> its summary and the fields of its answer."""
ERRORS = {
    400: "A field is wrong or not supported; `param` names it.",
    401: "The API key is missing or wrong.",
    403: "A page of another site sent the request.",
    404: "The model does not exist.",
    408: "The body was not complete in time.",
    413: "The body is too large.",
    429: "Too many sequences run or wait.",
    500: "Internal error.",
    503: "The engine has failed, or the service is shutting down.",
    504: "The answer was not complete in time.",
}
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
STREAMED = ("/v1/chat/completions", "/v1/completions")
OPEN_PATHS = ("/health",)
"""Paths that need no key."""


def describe(version: str, has_key: bool) -> dict[str, Any]:
    """Returns the OpenAPI document. `has_key`: clients must send an API key."""
    paths: dict[str, Any] = {}
    for path, (body, summary, fields) in REQUESTS.items():
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}}
        paths[path] = {
            "post": {
                "summary": summary,
                "requestBody": {"required": True, "content": content},
                "responses": _responses(path, fields, ERRORS),
            }
        }
    for path, (summary, fields) in GETS.items():
        errors = {status: text for status, text in ERRORS.items() if status in (401, 429, 500, 503)}
        paths[path] = {"get": {"summary": summary, "responses": _responses(path, fields, errors)}}
    document = {
        "openapi": "3.1.0",
        "info": {"title": "InternLM service", "version": version},
        "paths": paths,
        "components": {"schemas": _schemas() | {"Error": ERROR_SCHEMA}},
    }
    if has_key:
        scheme = {"key": {"type": "http", "scheme": "bearer"}}
        document["components"]["securitySchemes"] = scheme
        for path, operations in paths.items():
            for operation in () if path in OPEN_PATHS else operations.values():
                operation["security"] = [{"key": []}]
    return document


def _schemas() -> dict[str, Any]:
    """Schemas of the requests, with the fields that are accepted and ignored."""
    bodies = [(body, "validation") for body, _, _ in REQUESTS.values()]
    _, document = models_json_schema(bodies, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas = document["$defs"]
    for body, _, _ in REQUESTS.values():
        schemas[body.__name__]["properties"] |= {name: {} for name in IGNORED_FIELDS}
    return schemas


EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "JSON of a part of the answer, or [DONE]"}},
}
"""Each server-sent event of a streamed answer, which is how OpenAPI 3.1 tools read the schema of a stream."""


def _responses(path: str, fields: tuple[str, ...], errors: dict[int, str]) -> dict[str, Any]:
    answer = {"type": "object", "required": list(fields)}
    content: dict[str, Any] = {"application/json": {"schema": answer}}
    if path in STREAMED:
        content["text/event-stream"] = {"schema": EVENT}
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": content}}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for status, text in errors.items():
        responses[str(status)] = {"description": text, "content": error}
    return responses
