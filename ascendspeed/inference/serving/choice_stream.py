"""Turns the tokens of one choice into text and tool calls."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ascendspeed.tokenization.chat.messages import TOOLS
from ascendspeed.tokenization.detokenizer import TextStream
from ascendspeed.tokenization.tokenizer import Tokenizer
from ascendspeed.utils.safe_io import parse_json


@dataclass(frozen=True)
class FunctionCall:
    """A tool call of the answer."""

    name: str
    arguments: str
    """JSON."""


class ChoiceStream:
    """Decodes a choice token by token; stop strings are found across tokens.

    With `controls` (id -> name of a control token), the tokens between action_start and action_end are a tool
    call; stop strings inside it do not count. A malformed call comes back as text.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], controls: Mapping[int, str] | None = None
    ) -> None:
        self._tokenizer, self._controls = tokenizer, controls or {}
        self._stream = TextStream(tokenizer, stops)
        self._call: list[int] | None = None
        self._call_kind = ""

    @property
    def stopped(self) -> bool:
        """True once a stop string is complete."""
        return self._stream.stopped

    def push(self, token: int) -> tuple[str, FunctionCall | None]:
        """Returns the text and the call that this token completes."""
        control = self._controls.get(token)
        if control == "action_start":
            self._call, self._call_kind = [], ""
        elif self._call is None:
            return self._stream.push(token), None
        elif control == "action_end":
            return self._end_call()
        elif control in TOOLS:
            self._call_kind = control
        else:
            self._call.append(token)
        return "", None

    def finish(self) -> tuple[str, FunctionCall | None]:
        """Returns the remaining text, and a call that the answer's end completes."""
        text, call = self._end_call() if self._call is not None else ("", None)
        return self._stream.finish() + text, call

    def _end_call(self) -> tuple[str, FunctionCall | None]:
        """Returns the call, or its text if it is none."""
        text = self._tokenizer.decode(self._call or []).strip("\n")
        kind, self._call = self._call_kind, None
        call = parse_function_call(text) if kind != "interpreter" else None
        return ("", call) if call else (text, None)


def parse_function_call(text: str) -> FunctionCall | None:
    """Parses {"name", "parameters"} or {"name", "arguments"}; None if the text is something else."""
    try:
        value: Any = parse_json(text.encode())
    except ValueError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("parameters", value.get("arguments", {}))
    if not isinstance(arguments, dict):
        return None
    return FunctionCall(value["name"], json.dumps(arguments, ensure_ascii=False))
