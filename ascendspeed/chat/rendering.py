"""A template and a tokenizer -> the ids of a conversation, and the assistant's ids -> its message."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ascendspeed.chat.messages import TOOLS, Call, Message, tools_message
from ascendspeed.chat.templates import EOS, choose, find
from ascendspeed.errors import UserError
from ascendspeed.tokenizer import Tokenizer

BRACES = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Control:
    """A control token by its name in the template."""

    name: str


Part = str | Control


class Chat:
    """The chat format of a model."""

    def __init__(self, tokenizer: Tokenizer, family: str | None = None, name: str | None = None) -> None:
        """`family` of the model; `name`: the template, when it is asked for. Raises `UserError`: see `templates.choose`."""
        self.tokenizer = tokenizer
        self.name, self.template = choose(tokenizer, family, name)
        found = {name: find(tokenizer, strings) for name, strings in self.template.controls.items()}
        self.controls = {name: number for name, number in found.items() if number is not None}
        """Name of a control token -> id, of those that the tokenizer has."""
        guarded = {string: tokenizer.find(string) for string in self.template.guarded}
        self._forbidden = {*self.controls.values(), *guarded.values()} - {None}
        self._strings = {string for string, number in guarded.items() if number is not None}

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids that end the assistant's turn."""
        return tuple(self.controls[name] for name in self.template.stops)

    @property
    def notes(self) -> list[str]:
        """What the user should know about this format."""
        named = {name: strings[0] for name, strings in self.template.controls.items() if EOS in strings}
        missing = [string for string in named.values() if self.tokenizer.find(string) is None]
        return [f"the tokenizer has no {string}: turns of the assistant end with the end of a document" for string in missing]

    def ids(self, messages: Sequence[Message], where: str = "conversation", tools: Any = None) -> list[int]:
        """Ids of a conversation, from its one BOS to what opens the assistant's answer.

        `tools`: descriptions of functions, told to the model after its system message. Raises `UserError`, beginning with
        `where`, for what the template has no place for.
        """
        if tools:
            first = 1 if messages and messages[0].role == "system" else 0
            messages = [*messages[:first], tools_message(tools, where), *messages[first:]]
        parts = [part for number, message in enumerate(messages, 1) for part in self._turn(message, f"{where}, message {number}")]
        parts += self._filled(self.template.answer, {})
        bos = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
        return bos + list(self._encoded(parts))

    def message(self, tokens: Iterable[int]) -> dict[str, Any]:
        """The assistant's new tokens -> {"role", "content"} and, where it calls tools, "tool_calls" and "code"."""
        return _spoken(self.heard(tokens))

    def heard(self, tokens: Iterable[int]) -> Message:
        """The same as a turn to go on from: its calls are kept as the model wrote them, wrong ones too."""
        names = {number: name for name, number in self.controls.items()}
        content: list[int] = []
        calls: list[tuple[str, list[int]]] = []
        inside = False
        for token in tokens:
            control = names.get(token)
            if control == "action_start":
                inside = True
                calls.append(("plugin", []))
            elif control == "action_end":
                inside = False
            elif inside and control in TOOLS:
                calls[-1] = (control, calls[-1][1])
            else:
                (calls[-1][1] if inside else content).append(token)
        decode = self.tokenizer.decode
        return Message("assistant", decode(content), None, tuple(Call(kind, decode(held).strip("\n")) for kind, held in calls))

    def _turn(self, message: Message, where: str) -> list[Part]:
        template = self.template
        if message.role not in template.turns:
            raise UserError(f"{where}: the chat template {self.name} has no {message.role}, only {', '.join(template.turns)}")
        if message.name is not None and not template.name:
            raise UserError(f"{where}: the chat template {self.name} has no place for a name ({message.name!r})")
        content: list[Part] = [message.content]
        for call in message.calls:
            if call.kind not in template.calls:
                raise UserError(f"{where}: the chat template {self.name} has no place for tools")
            content += self._filled(template.calls[call.kind], {"content": [call.content]})
        name: list[Part] = []
        if message.name is not None:
            name = self._filled(template.name, {"name": [Control(message.name) if message.name in TOOLS else message.name]})
        return self._filled(template.turns[message.role], {"content": content, "name": name})

    def _filled(self, pattern: str, values: dict[str, list[Part]]) -> list[Part]:
        parts: list[Part] = []
        for index, piece in enumerate(BRACES.split(pattern)):
            parts += [piece] if index % 2 == 0 else values.get(piece, [Control(piece)])
        return parts

    def _encoded(self, parts: Iterable[Part]) -> Iterator[int]:
        """Text between two control tokens is encoded as one, as the original tokenizers do."""
        text = ""
        for part in (*parts, None):
            if isinstance(part, str):
                text += part
                continue
            yield from self._text(text)
            text = ""
            if part is not None:
                if part.name not in self.controls:
                    self.tokenizer.id_of(self.template.controls[part.name][0])  # says that it is missing
                yield self.controls[part.name]

    def _text(self, text: str) -> list[int]:
        """Ids of text that are no control tokens: some vocabularies hold the strings of these as ordinary pieces."""
        if not text:
            return []
        ids = self.tokenizer.encode(text).tolist()
        if not self._forbidden.intersection(ids):
            return ids
        cut = re.compile("|".join(f"(?<={re.escape(s[0])})(?={re.escape(s[1:])})" for s in sorted(self._strings)))
        ids = [number for piece in cut.split(text) if piece for number in self.tokenizer.encode(piece).tolist()]
        if self._forbidden.intersection(ids):
            raise UserError(f"{self.tokenizer.path}: text becomes a control token in this vocabulary: {text[:60]!r}")
        return ids


def _spoken(heard: Message) -> dict[str, Any]:
    message: dict[str, Any] = {"role": heard.role, "content": heard.content}
    functions = [_parsed(call.content) for call in heard.calls if call.kind == "plugin"]
    codes = [call.content for call in heard.calls if call.kind == "interpreter"]
    if functions:
        message["tool_calls"] = functions
    if codes:
        message["code"] = "\n".join(codes)
    return message


def _parsed(text: str) -> Any:
    """A function call as JSON; what a model wrote otherwise stays text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
