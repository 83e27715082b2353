"""Renders conversations to token ids by a chat template and parses answers back into messages."""

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
from ascendspeed.tokenization.chat.template_files import own_template
from ascendspeed.tokenization.chat.templates import EOS, choose_template, first_token_id
from ascendspeed.tokenization.tokenizer import Tokenizer
from ascendspeed.utils.errors import UserError

NOT_IN_TEMPLATE = "no place in the template"
"""Category of conversations that the chat template cannot express."""
PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class ControlToken:
    """A control token by its name in the template."""

    name: str


TurnPart = str | ControlToken
SpokenPart = tuple[TurnPart, bool]
"""A part of a turn, and whether the speaker produces it: true for content and the token that ends it, false
for the header."""


class ChatFormat:
    """Chat template of a model, bound to its tokenizer."""

    def __init__(self, tokenizer: Tokenizer, name: str | None = None, family: str | None = None) -> None:
        """`name`: a template, by default the one of the tokenizer; `family` of the model, for the error.

        Raises `UserError`, see `choose_template`.
        """
        self.tokenizer = tokenizer
        self.name, self.template = choose_template(tokenizer, name, family)
        self.controls: dict[str, int] = {}
        """Name of a control token -> id, for those that the tokenizer has."""
        for control, strings in self.template.controls.items():
            number = first_token_id(tokenizer, strings)
            if number is not None:
                self.controls[control] = number
        strings = {*self.template.guarded}
        if tokenizer.parses_special_tokens:
            strings.update(tokenizer.control_strings, *self.template.controls.values())
            strings.discard(EOS)
        guarded = {string: tokenizer.token_to_id(string) for string in strings}
        self._forbidden_ids = {*self.controls.values(), *guarded.values()} - {None}
        known = [string for string, number in guarded.items() if number is not None]
        self.split_strings = self._find_split_strings(known)
        """Strings of control tokens that are pieces of the vocabulary; text that holds one is encoded in two
        parts.
        """

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end the assistant's turn."""
        return tuple(self.controls[name] for name in self.template.stops)

    @property
    def notes(self) -> list[str]:
        """Notes for the user about this format."""
        with_fallback = [strings[0] for strings in self.template.controls.values() if EOS in strings]
        notes = []
        if own := own_template(self.tokenizer.path):
            notes.append(
                f"{self.tokenizer.path / own} has a chat template of the model's own, which is not used: "
                f"conversations follow the template {self.name} (--chat-template names another)"
            )
        return notes + [
            f"the tokenizer has no {string}: turns of the assistant end with the end-of-document token"
            for string in with_fallback
            if self.tokenizer.token_to_id(string) is None
        ]

    def prompt_ids(
        self, messages: Sequence[Message], where: str = "conversation", tools: Any = None
    ) -> list[int]:
        """Returns the ids of a conversation, from BOS to the header of the assistant's answer.

        `tools`: descriptions of functions, rendered after the system message. Raises `UserError`, its text
        beginning with `where`, for a message that the template cannot express.
        """
        turns = self._turns(_insert_tools(messages, where, tools), where)
        parts = [part for turn in turns for part, _ in turn]
        parts += [part for part, _ in self._fill(self.template.answer, {})]
        bos = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
        return bos + list(self._encode_parts(parts))

    def training_segments(
        self,
        messages: Sequence[Message],
        where: str = "conversation",
        tools: Any = None,
        last_only: bool = False,
    ) -> list[PromptSegment]:
        """Returns a conversation for training, as segments up to the last supervised one.

        Supervised are the assistant's messages (only the last one with `last_only`) and the tokens that end
        its turns, except where a message has `in_loss`. Raises `UserError`, see `prompt_ids`, and if no
        message is supervised.
        """
        messages = _insert_tools(messages, where, tools)
        answers = [message for message in messages if message.role == "assistant"]
        default = answers[-1:] if last_only else answers
        segments = [] if self.tokenizer.bos is None else [PromptSegment(self.tokenizer.bos)]
        for message, turn in zip(messages, self._turns(messages, where), strict=True):
            by_default = any(message is answer for answer in default)
            supervised = by_default if message.in_loss is None else message.in_loss
            for part, spoken in turn:
                segments.append(PromptSegment(self._resolve(part), spoken and supervised))
        while segments and not segments[-1].supervised:
            segments.pop()
        if not segments:
            raise InvalidConversation("no answer in the loss", f"{where}: every answer is left out of it")
        return segments

    @cached_property
    def encode_segments(self) -> SegmentEncoder:
        """Encoder of segments in which text never becomes a control token."""
        return SegmentEncoder(self._encode_texts)

    def answer_message(self, tokens: Iterable[int]) -> dict[str, Any]:
        """Parses an answer's tokens into {"role", "content"} and, for tool calls, "tool_calls" and "code"."""
        return _as_dict(self.parse_answer(tokens))

    def parse_answer(self, tokens: Iterable[int]) -> Message:
        """Parses an answer's tokens into a `Message`; tool calls, even malformed ones, stay as written."""
        names = {number: name for name, number in self.controls.items()}
        content: list[int] = []
        calls: list[tuple[str, list[int]]] = []
        inside_call = False
        for token in tokens:
            control = names.get(token)
            if control == "action_start":
                inside_call = True
                calls.append(("plugin", []))
            elif control == "action_end":
                inside_call = False
            elif inside_call and control in TOOLS:
                calls[-1] = (control, calls[-1][1])
            else:
                (calls[-1][1] if inside_call else content).append(token)
        decode = self.tokenizer.decode
        tool_calls = tuple(ToolCall(kind, decode(ids).strip("\n")) for kind, ids in calls)
        return Message("assistant", decode(content), None, tool_calls)

    def _turns(self, messages: Sequence[Message], where: str) -> list[list[SpokenPart]]:
        """Returns the parts of the turn of every message."""
        return [self._turn(message, f"{where}, message {n}") for n, message in enumerate(messages, 1)]

    def _turn(self, message: Message, where: str) -> list[SpokenPart]:
        template = self.template
        prefix = f"{where}: the chat template {self.name}"
        if message.role not in template.turns:
            raise InvalidConversation(
                NOT_IN_TEMPLATE, f"{prefix} has no role {message.role}, only {', '.join(template.turns)}"
            )
        if message.name is not None and not template.name:
            raise InvalidConversation(NOT_IN_TEMPLATE, f"{prefix} does not support a name ({message.name!r})")
        content: list[TurnPart] = [message.content]
        for call in message.calls:
            if call.kind not in template.calls:
                raise InvalidConversation(NOT_IN_TEMPLATE, f"{prefix} does not support tools")
            filled = self._fill(template.calls[call.kind], {"content": [call.content]})
            content += [part for part, _ in filled]
        name: list[TurnPart] = []
        if message.name is not None:
            speaker = ControlToken(message.name) if message.name in TOOLS else message.name
            name = [part for part, _ in self._fill(template.name, {"name": [speaker]})]
        return self._fill(template.turns[message.role], {"content": content, "name": name})

    def _fill(self, pattern: str, values: dict[str, list[TurnPart]]) -> list[SpokenPart]:
        """Replaces the placeholders of a pattern by `values` or by control tokens."""
        filled: list[SpokenPart] = []
        for index, word in enumerate(PLACEHOLDER.split(pattern)):
            is_placeholder = index % 2 == 1
            parts = values.get(word, [ControlToken(word)]) if is_placeholder else [word]
            spoken = is_placeholder and (word == "content" or word in self.template.stops)
            filled += [(part, spoken) for part in parts]
        return filled

    def _resolve(self, part: TurnPart) -> str | int:
        """Returns text, or the id of a control token.

        Raises `InvalidConversation` if the tokenizer has no such token.
        """
        if isinstance(part, str):
            return part
        if part.name not in self.controls:
            string = self.template.controls[part.name][0]
            raise InvalidConversation(
                NOT_IN_TEMPLATE, f"{self.tokenizer.path}: the tokenizer has no token {string!r}"
            )
        return self.controls[part.name]

    def _encode_parts(self, parts: Iterable[TurnPart]) -> Iterator[int]:
        """Encodes the text between two control tokens in one piece, as the original tokenizers do."""
        text = ""
        for part in parts:
            if isinstance(part, str):
                text += part
                continue
            yield from self._encode_text(text)
            text = ""
            yield self._resolve(part)  # type: ignore[misc]
        yield from self._encode_text(text)

    def _encode_text(self, text: str) -> list[int]:
        return self._encode_texts([text])[0].tolist() if text else []

    def _encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes texts without control tokens: some vocabularies hold the strings of these as ordinary
        pieces."""
        encoded = self.tokenizer.encode_batch(texts)
        return [self._without_control_tokens(text, ids) for text, ids in zip(texts, encoded, strict=True)]

    def _find_split_strings(self, guarded: Sequence[str]) -> list[str]:
        """Returns the strings that the tokenizer encodes to their own control token."""
        encoded = self.tokenizer.encode_batch(guarded) if guarded else []
        return sorted(
            string
            for string, ids in zip(guarded, encoded, strict=True)
            if not self._forbidden_ids.isdisjoint(ids.tolist())
        )

    def _without_control_tokens(self, text: str, ids: np.ndarray) -> np.ndarray:
        """Encodes a text again, split inside every guarded string, if its ids contain a control token."""
        if self._forbidden_ids.isdisjoint(ids.tolist()):
            return ids
        after_first_letter = re.compile(
            "|".join(f"(?<={re.escape(s[0])})(?={re.escape(s[1:])})" for s in self.split_strings)
        )
        parts = [part for part in after_first_letter.split(text) if part]
        ids = np.concatenate(self.tokenizer.encode_batch(parts))
        if not self._forbidden_ids.isdisjoint(ids.tolist()):
            raise UserError(
                f"{self.tokenizer.path}: text becomes a control token in this vocabulary: {text[:60]!r}"
            )
        return ids


def _insert_tools(messages: Sequence[Message], where: str, tools: Any) -> Sequence[Message]:
    """Returns the messages with the description of the tools after the system message."""
    if not tools:
        return messages
    first = 1 if messages and messages[0].role == "system" else 0
    return [*messages[:first], tools_message(tools, where), *messages[first:]]


def _as_dict(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    functions = [_parse_call(call.content) for call in message.calls if call.kind == "plugin"]
    codes = [call.content for call in message.calls if call.kind == "interpreter"]
    if functions:
        fields["tool_calls"] = functions
    if codes:
        fields["code"] = "\n".join(codes)
    return fields


def _parse_call(text: str) -> Any:
    """Parses a function call; text that is not JSON is returned unchanged."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
