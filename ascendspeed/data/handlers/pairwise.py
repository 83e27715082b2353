"""Handlers for preference data: rows with a prompt, a chosen and a rejected answer.

A row becomes one document, the chosen conversation before the rejected one, in which only the two answers
are supervised. The row formats are those of LLaMA-Factory, which MindSpeed-LLM shares, and of TRL.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ascendspeed.data.handlers import chat_rows
from ascendspeed.data.handlers.base import EncoderConfig
from ascendspeed.data.handlers.instruction import (
    WHERE,
    ChatHandler,
    Row,
    SharegptStyleInstructionHandler,
    alpaca_prompt,
    conversation_of,
    required_text,
)
from ascendspeed.tokenization.chat import InvalidConversation, PromptSegment, read_training_messages
from ascendspeed.tokenization.tokenizer import Tokenizer
from ascendspeed.utils.text import shorten

ANSWERS = ("chosen", "rejected")


class PairwiseHandler(ChatHandler):
    """Preference pairs in the model's own chat format."""

    keys = ("preference",)
    has_pairs = True
    accepted_settings = ("chat_template", "system")

    def conversations(self, row: Row) -> list[list[PromptSegment]]:
        prompt, *answers = self.pair(row)
        _check_different(*answers)
        segments = []
        for name, answer in zip(ANSWERS, answers, strict=True):
            messages = read_training_messages([*prompt, answer], f"{WHERE} with {name!r}")
            if any(message.in_loss is not None for message in messages):
                raise InvalidConversation(
                    "wrong loss",
                    f"{WHERE}: of a pair just both answers are in the loss; leave out loss and weight",
                )
            segments.append(self._segments(row, messages, last_only=True))
        return segments

    @abstractmethod
    def pair(self, row: Row) -> tuple[list[Any], Any, Any]:
        """Returns the messages of the prompt, and the messages of the chosen and of the rejected answer.
        Raises `InvalidConversation`."""


class AlpacaStylePairwiseHandler(PairwiseHandler):
    """Alpaca rows with the answers `chosen` and `rejected`; `history` is a list of earlier questions and
    answers."""

    required = ("instruction", *ANSWERS)
    optional = ("input", "system", "history")

    def pair(self, row: Row) -> tuple[list[Any], Any, Any]:
        chosen, rejected = ({"role": "assistant", "content": required_text(row, name)} for name in ANSWERS)
        return alpaca_prompt(row), chosen, rejected


class SharegptStylePairwiseHandler(PairwiseHandler):
    """A conversation that ends with a question, and the messages `chosen` and `rejected`."""

    LISTS: ClassVar[tuple[str, ...]] = SharegptStyleInstructionHandler.LISTS
    required = ANSWERS
    optional = (*LISTS, "system", "tools")

    def missing(self, present: Sequence[str]) -> str | None:
        has_list = bool(set(self.LISTS) & set(present))
        return super().missing(present) or (None if has_list else " or ".join(self.LISTS))

    def pair(self, row: Row) -> tuple[list[Any], Any, Any]:
        chosen, rejected = (_answer(row, name) for name in ANSWERS)
        return conversation_of(row, self.LISTS), chosen, rejected


class HuggingFacePairwiseHandler(PairwiseHandler):
    """TRL's rows `prompt`, `chosen`, `rejected`: lists of messages, or texts.

    Texts are used as they are, without a chat template: BOS, prompt, answer, EOS. Without a list as prompt,
    the messages that `chosen` and `rejected` begin with in common are the prompt.
    """

    required = ANSWERS
    optional = ("prompt", "system", "tools")

    def __init__(self, config: EncoderConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self._tokenizer = tokenizer

    def conversations(self, row: Row) -> list[list[PromptSegment]]:
        if all(_is_plain_text(row[name]) for name in ANSWERS):
            return self._texts(row)
        return super().conversations(row)

    def pair(self, row: Row) -> tuple[list[Any], Any, Any]:
        chosen, rejected = (_messages(row, name) for name in ANSWERS)
        if row["prompt"] is not None and not _is_plain_text(row["prompt"]):
            prompt = _messages(row, "prompt")
        else:
            prompt = _common_beginning(chosen, rejected)
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
            prompt = _with_text(prompt, row["prompt"])
        for name, messages in zip(ANSWERS, (chosen, rejected), strict=True):
            if len(messages) != 1:
                raise InvalidConversation(
                    "wrong order",
                    f"{name!r} has {len(messages)} messages after the prompt; it must have the assistant's",
                )
        return prompt, chosen[0], rejected[0]

    def _texts(self, row: Row) -> list[list[PromptSegment]]:
        prompt = required_text(row, "prompt")
        if self._tokenizer.eos is None:
            raise InvalidConversation("no end of text", f"the tokenizer names no eos_token to end {ANSWERS}")
        answers = [required_text(row, name) for name in ANSWERS]
        _check_different(*answers)
        begin = [] if self._tokenizer.bos is None else [PromptSegment(self._tokenizer.bos)]
        return [
            [
                *begin,
                PromptSegment(prompt),
                PromptSegment(answer, True),
                PromptSegment(self._tokenizer.eos, True),
            ]
            for answer in answers
        ]


def _check_different(chosen: Any, rejected: Any) -> None:
    """Raises `InvalidConversation` for equal answers, which say nothing about a preference."""
    if chosen == rejected:
        raise InvalidConversation("equal answers", "'chosen' and 'rejected' are the same answer")


def _answer(row: Row, name: str) -> Any:
    """Returns the message in a column: a message, or its text. Raises `InvalidConversation`."""
    value = row[name]
    if _is_plain_text(value):
        return {"role": "assistant", "content": required_text(row, name)}
    messages = _messages(row, name)
    if len(messages) != 1:
        raise InvalidConversation(
            "wrong order", f"{name!r} has {len(messages)} messages; it must have one, the assistant's"
        )
    return messages[0]


def _messages(row: Row, name: str) -> list[Any]:
    """Returns the messages in a column, which may be one message. Raises `InvalidConversation`."""
    if row[name] is None:
        raise InvalidConversation(f"no {name!r}", f"{name!r} is missing or null")
    value = chat_rows.json_or_value(row[name])
    is_message = isinstance(value, Mapping) and not all(isinstance(v, list | None) for v in value.values())
    return chat_rows.read_conversation([value] if is_message else value, name)


def _is_plain_text(value: Any) -> bool:
    return isinstance(value, str) and isinstance(chat_rows.json_or_value(value), str | int | float | None)


def _common_beginning(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """Returns the messages with which both conversations begin, short of the last one of each."""
    common = []
    for one, other in zip(first[:-1], second[:-1], strict=False):
        if one != other:
            break
        common.append(one)
    return common


def _with_text(messages: list[Any], prompt: str | None) -> list[Any]:
    """Returns the messages of a prompt that is given as text, too. Raises `InvalidConversation` if the two
    differ, or if there is neither."""
    if not messages and not (prompt and prompt.strip()):
        raise InvalidConversation(
            "no 'prompt'", "'prompt' is empty, and both answers begin with different messages"
        )
    questions = [
        message["content"]
        for message in messages
        if isinstance(message, Mapping) and message.get("role") == "user" and message.get("content")
    ]
    if not messages:
        return [{"role": "user", "content": prompt}]
    if prompt and not any(str(question).strip() == prompt.strip() for question in questions):
        raise InvalidConversation(
            "two prompts",
            f"'prompt' is {shorten(prompt)}, which no question of 'chosen' is; remove one of them",
        )
    return messages
