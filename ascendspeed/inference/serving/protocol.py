"""Requests of the OpenAI-compatible API, and their translation into sampling parameters.

An unknown field is an error, since most of them would change the answer; those of `IGNORED_FIELDS` do not.
"""

import json
import re
import secrets
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ascendspeed.inference.engine import SamplingParams
from ascendspeed.inference.serving.api_error import ApiError
from ascendspeed.inference.serving.request import RequestParams
from ascendspeed.utils.safe_io import parse_json

IGNORED_FIELDS = ("user", "metadata", "store", "service_tier")
"""Fields that do not change the answer."""
TOKEN_ID = re.compile("0|[1-9][0-9]{0,8}")
"""Key of `logit_bias`: one spelling for each id, since 01 would add to the bias of 1."""
MAX_STOPS = 16
MAX_SEQUENCES = 128
"""Most sequences of one request: prompts times n."""

Body = TypeVar("Body", bound=BaseModel)
TokenIds = list[Annotated[int, Field(ge=0)]]
StopString = Annotated[str, Field(min_length=1)]


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    include_usage: bool = False


class SamplingFields(BaseModel):
    """Fields that chat completions and completions share."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1)] | None = 0
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = False
    min_tokens: Annotated[int, Field(ge=0)] | None = 0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = 1.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    cache_salt: str | None = None

    @property
    def choices(self) -> int:
        """Number of choices per prompt."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def includes_usage(self) -> bool:
        """True if a stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def request_params(
        self,
        *,
        max_new_tokens: int,
        stop_ids: tuple[int, ...],
        vocab_size: int,
        top_logprobs: int,
        default_seed: int,
        number: int,
    ) -> RequestParams:
        """Returns the parameters of choice `number`. Raises `ApiError`."""
        temperature = 1.0 if self.temperature is None else self.temperature
        if 0 < temperature < 1e-4:
            raise ApiError(400, "temperature must be 0 or at least 0.0001", "temperature")
        if (self.min_tokens or 0) > max_new_tokens:
            message = f"min_tokens {self.min_tokens}: at most {max_new_tokens} tokens are generated"
            raise ApiError(400, message, "min_tokens")
        sampling = SamplingParams(
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            repetition_penalty=self.repetition_penalty or 1.0,
            seed=default_seed if self.seed is None else self.seed,
            stop_ids=stop_ids,
            vocab_size=vocab_size,
        )
        return RequestParams(
            sampling,
            number,
            self.presence_penalty or 0.0,
            self.frequency_penalty or 0.0,
            self._logit_bias(vocab_size),
            self.min_tokens or 0,
            top_logprobs,
            self.cache_salt or "",
        )

    def _logit_bias(self, vocab_size: int) -> tuple[tuple[int, float], ...]:
        biases = []
        for name, bias in (self.logit_bias or {}).items():
            if not (TOKEN_ID.fullmatch(name) and int(name) < vocab_size):
                raise ApiError(
                    400, f"logit_bias: {name!r} is not a token id below {vocab_size}", "logit_bias"
                )
            biases.append((int(name), bias))
        return tuple(biases)


class CompletionRequest(SamplingFields):
    """Body of POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1)] | TokenIds | list[TokenIds]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False


class ChatCompletionRequest(SamplingFields):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None


class TokenizeRequest(BaseModel):
    """Body of POST /tokenize: a text or a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(BaseModel):
    """Body of POST /detokenize."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str | None = None
    tokens: TokenIds


def parse_body(cls: type[Body], data: bytes) -> Body:
    """Parses a JSON body. Raises `ApiError` that names the field."""
    try:
        values = parse_json(data)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body is not a JSON object")
    values = {key: value for key, value in values.items() if key not in IGNORED_FIELDS}
    try:
        # As JSON, so that a number without a fraction is accepted where a float is expected.
        return cls.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise _field_error(error) from None


def _field_error(error: ValidationError) -> ApiError:
    """Returns the error of the first field that is wrong."""
    details = error.errors(include_url=False, include_context=False)
    first = details[0]
    if not first["loc"]:  # text that is no Unicode, such as half of a surrogate pair
        return ApiError(400, f"the body is not JSON: {first['msg']}")
    field = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown or unsupported field {field!r}", field)
    reasons = dict.fromkeys(
        detail["msg"] for detail in details if detail["loc"] and str(detail["loc"][0]) == field
    )
    return ApiError(400, f"{field}: {'; or '.join(reasons)}", field)


def random_seed() -> int:
    """Returns a seed for a request that names none."""
    return secrets.randbits(63)
