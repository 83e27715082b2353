"""A template and a tokenizer -> the ids of a conversation, and the assistant's ids -> its message."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ascendspeed.tokenization.chat.messages import (
    TOOLS,
    InvalidConversation,
    Message,
    ToolCall,
    tools_message,
)
from ascendspeed.tokenization.chat.segments import PromptSegment, SegmentEncoder
from ascendspeed.tokenization.chat.templates import EOS, choose_template, first_token_id
from ascendspeed.tokenization.tokenizer import Tokenizer
from ascendspeed.utils.errors import UserError

NO_PLACE = "no place in the template"
BRACES = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class ControlToken:
    """A control token by its name in the template."""

    name: str


Part = str | ControlToken
Said = tuple[Part, bool]
"""A part, and whether it is what a turn says: its content and the token that ends it, not who speaks."""


class ChatFormat:
    """The chat format of a model."""

    def __init__(self, tokenizer: Tokenizer, family: str | None = None, name: str | None = None) -> None:
        """`family` of the model; `name`: the template, when it is asked for. Raises `UserError`: see `templates.choose`."""
        self.tokenizer = tokenizer
        self.name, self.template = choose_template(tokenizer, family, name)
        found = {name: first_token_id(tokenizer, strings) for name, strings in self.template.controls.items()}
        self.controls = {name: number for name, number in found.items() if number is not None}
        """Name of a control token -> id, of those that the tokenizer has."""
        guarded = {string: tokenizer.token_to_id(string) for string in self.template.guarded}
        self._forbidden = {*self.controls.values(), *guarded.values()} - {None}
        self._strings = {string for string, number in guarded.items() if number is not None}

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end the assistant's turn."""
        return tuple(self.controls[name] for name in self.template.stops)

    @property
    def notes(self) -> list[str]:
        """What the user should know about this format."""
        named = {name: strings[0] for name, strings in self.template.controls.items() if EOS in strings}
        missing = [string for string in named.values() if self.tokenizer.token_to_id(string) is None]
        return [
            f"the tokenizer has no {string}: turns of the assistant end with the end of a document"
            for string in missing
        ]

    def prompt_ids(
        self, messages: Sequence[Message], where: str = "conversation", tools: Any = None
    ) -> list[int]:
        """Ids of a conversation, from its one BOS to what opens the assistant's answer.

        `tools`: descriptions of functions, told to the model after its system message. Raises `UserError`, beginning with
        `where`, for what the template has no place for.
        """
        parts = [part for _, turn in self._turns(messages, where, tools) for part, _ in turn]
        parts += [part for part, _ in self._filled(self.template.answer, {})]
        bos = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
        return bos + list(self._encoded(parts))

    def training_segments(
        self,
        messages: Sequence[Message],
        where: str = "conversation",
        tools: Any = None,
        last_only: bool = False,
    ) -> list[PromptSegment]:
        """A conversation to learn from, to be encoded by `encode_segments`: to be learnt is what the assistant says (with
        `last_only`, in its last turn) and the token that ends its turn. It ends there. Raises `UserError`: see `prompt_ids`."""
        turns = self._turns(messages, where, tools)
        answers = [place for place, (role, _) in enumerate(turns) if role == "assistant"]
        learnt = set(answers[-1:] if last_only else answers)
        found = [] if self.tokenizer.bos is None else [PromptSegment(self.tokenizer.bos)]
        for place, (_, turn) in enumerate(turns):
            found += [PromptSegment(self._what(part), said and place in learnt) for part, said in turn]
        while found and not found[-1].supervised:
            found.pop()
        return found

    @cached_property
    def encode_segments(self) -> SegmentEncoder:
        """Pieces -> ids and what of them is to be learnt; text becomes no control token."""
        return SegmentEncoder(self._texts)

    def answer_message(self, tokens: Iterable[int]) -> dict[str, Any]:
        """The assistant's new tokens -> {"role", "content"} and, where it calls tools, "tool_calls" and "code"."""
        return _spoken(self.parse_answer(tokens))

    def parse_answer(self, tokens: Iterable[int]) -> Message:
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
        return Message(
            "assistant",
            decode(content),
            None,
            tuple(ToolCall(kind, decode(held).strip("\n")) for kind, held in calls),
        )

    def _turns(self, messages: Sequence[Message], where: str, tools: Any) -> list[tuple[str, list[Said]]]:
        """(role, its turn) of every message and of the tools."""
        if tools:
            first = 1 if messages and messages[0].role == "system" else 0
            messages = [*messages[:first], tools_message(tools, where), *messages[first:]]
        return [
            (message.role, self._turn(message, f"{where}, message {n}"))
            for n, message in enumerate(messages, 1)
        ]

    def _turn(self, message: Message, where: str) -> list[Said]:
        template = self.template
        if message.role not in template.turns:
            there = f"no {message.role}, only {', '.join(template.turns)}"
            raise InvalidConversation(NO_PLACE, f"{where}: the chat template {self.name} has {there}")
        if message.name is not None and not template.name:
            raise InvalidConversation(
                NO_PLACE, f"{where}: the chat template {self.name} has no place for a name ({message.name!r})"
            )
        content: list[Part] = [message.content]
        for call in message.calls:
            if call.kind not in template.calls:
                raise InvalidConversation(
                    NO_PLACE, f"{where}: the chat template {self.name} has no place for tools"
                )
            content += [
                part for part, _ in self._filled(template.calls[call.kind], {"content": [call.content]})
            ]
        name: list[Part] = []
        if message.name is not None:
            speaker = ControlToken(message.name) if message.name in TOOLS else message.name
            name = [part for part, _ in self._filled(template.name, {"name": [speaker]})]
        return self._filled(template.turns[message.role], {"content": content, "name": name})

    def _filled(self, pattern: str, values: dict[str, list[Part]]) -> list[Said]:
        found: list[Said] = []
        for index, piece in enumerate(BRACES.split(pattern)):
            parts = [piece] if index % 2 == 0 else values.get(piece, [ControlToken(piece)])
            said = index % 2 == 1 and (piece == "content" or piece in self.template.stops)
            found += [(part, said) for part in parts]
        return found

    def _what(self, part: Part) -> str | int:
        """Text, or the id of a control token."""
        if isinstance(part, str):
            return part
        if part.name not in self.controls:
            wanted = self.template.controls[part.name][0]
            raise InvalidConversation(
                NO_PLACE, f"{self.tokenizer.path}: the tokenizer has no token {wanted!r}"
            )
        return self.controls[part.name]

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
                yield self._what(part)

    def _text(self, text: str) -> list[int]:
        return self._texts([text])[0].tolist() if text else []

    def _texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of texts that are no control tokens: some vocabularies hold the strings of these as ordinary pieces."""
        found = self.tokenizer.encode_batch(texts)
        return [self._harmless(text, ids) for text, ids in zip(texts, found, strict=True)]

    def _harmless(self, text: str, ids: np.ndarray) -> np.ndarray:
        if self._forbidden.isdisjoint(ids.tolist()):
            return ids
        cut = re.compile(
            "|".join(f"(?<={re.escape(s[0])})(?={re.escape(s[1:])})" for s in sorted(self._strings))
        )
        ids = np.concatenate(self.tokenizer.encode_batch([piece for piece in cut.split(text) if piece]))
        if not self._forbidden.isdisjoint(ids.tolist()):
            raise UserError(
                f"{self.tokenizer.path}: text becomes a control token in this vocabulary: {text[:60]!r}"
            )
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
