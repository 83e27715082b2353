"""Handlers for instruction data: rows -> conversations, of which the assistant's answers are learnt and nothing else.

Two of them write the published prompt (`### Instruction:`), two the model's own chat format. What cannot be read is a `Fault` of
its row, by kind.
"""

import json
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ascendspeed.data.document import Document, EncodedRows, Fault
from ascendspeed.data.handlers.base import EncoderConfig, Handler
from ascendspeed.data.readers.shard import MISSPELLED, InvalidValue, RowBatch
from ascendspeed.tokenization.chat import (
    ChatFormat,
    InvalidConversation,
    Message,
    PromptSegment,
    SegmentEncoder,
    read_training_messages,
    shorten,
)
from ascendspeed.tokenization.tokenizer import Tokenizer, adds_bos_token, declared_tokens

Row = Mapping[str, Any]
WHERE = "conversation"


class InstructionHandler(Handler):
    """Rows -> pieces -> documents with masks."""

    keys = ("packed",)
    learns_answers = True
    encode: SegmentEncoder

    def __init__(self, job: EncoderConfig, tokenizer: Tokenizer) -> None:
        self._longest = job.longest

    @abstractmethod
    def pieces(self, row: Row) -> list[PromptSegment]:
        """What to learn from a row. Raises `WrongMessage` with what it is counted under."""

    def make(self, rows: RowBatch) -> dict[str, EncodedRows]:
        names = self.columns
        found = [
            self._read(dict(zip(names, values, strict=True)))
            for values in zip(*(rows[n] for n in names), strict=True)
        ]
        good = [one for one in found if not isinstance(one, Fault)]
        encoded = iter(self.encode([pieces for pieces, _ in good]))
        documents = [one if isinstance(one, Fault) else Document(*next(encoded)) for one in found]
        return {"packed": EncodedRows(documents, sum(size for _, size in good))}

    def _read(self, row: Row) -> tuple[list[PromptSegment], int] | Fault:
        """Pieces and the bytes of their text."""
        bad = next((value for value in row.values() if isinstance(value, InvalidValue)), None)
        if bad:
            return Fault(bad.kind, bad.detail)
        try:
            pieces = self.pieces(row)
            size = sum(len(piece.content.encode()) for piece in pieces if isinstance(piece.content, str))
        except InvalidConversation as error:
            return Fault(error.kind, str(error))
        except UnicodeEncodeError:
            return Fault("invalid UTF-8")
        return Fault("huge", f"{size} bytes") if size > self._longest else (pieces, size)


class GeneralInstructionHandler(InstructionHandler):
    """Alpaca rows in the published prompt, byte for byte; a missing input is an empty one."""

    required: tuple[str, ...] = ("instruction", "output")
    optional: tuple[str, ...] = ("input",)

    HEAD: ClassVar[str] = (
        "\nBelow is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request. "
        "Please note that you need to think through your response logically and step by step.\n"
    )

    def __init__(self, job: EncoderConfig, tokenizer: Tokenizer) -> None:
        super().__init__(job, tokenizer)
        begins = tokenizer.bos is not None and adds_bos_token(declared_tokens(tokenizer.path)[0])
        self._begin = [PromptSegment(tokenizer.bos)] if begins else []  # type: ignore[arg-type]
        self._every, self._ends = job.loss_on == "all", job.append_eod
        self.encode = SegmentEncoder(tokenizer.encode_batch)

    def pieces(self, row: Row) -> list[PromptSegment]:
        found = [*self._begin, PromptSegment(self.HEAD)]
        turns = self.turns(row)
        for place, (question, answer) in enumerate(turns, 1):
            found += [PromptSegment(f"### Instruction:\n{question}\n### Response:\n")]
            found += [PromptSegment(f"{answer}\n", self._every or place == len(turns))]
        return found

    @property
    def notes(self) -> list[str]:
        return (
            []
            if self._ends
            else ["answers have no end in the published prompt, so models learn none: add --append-eod"]
        )

    def turns(self, row: Row) -> list[tuple[str, str]]:
        """Questions and answers."""
        question, answer, given = _text(row, "instruction"), _text(row, "output"), _optional(row, "input")
        return [(f"{question}\n{given or ''}", answer)]


class BelleMultiTurnInstructionHandler(GeneralInstructionHandler):
    """Belle's conversations in the same prompt: `instruction` is a text of turns, `output` answers the last of them.

    As published, the last answer is learnt; with `--loss-on all` every one.
    """

    optional = ()
    takes = ("loss_on",)
    SPEAKERS: ClassVar[re.Pattern[str]] = re.compile("(Human|Assistant):")

    def turns(self, row: Row) -> list[tuple[str, str]]:
        before, *said = self.SPEAKERS.split(_text(row, "instruction"))
        if said[-2:-1] == ["Assistant"] and not said[-1].strip():
            said = said[:-2]  # whose turn it is
        said += ["Assistant", _text(row, "output")]
        speakers, texts = said[::2], [text.strip() for text in said[1::2]]
        if before.strip() or speakers != ["Human", "Assistant"] * (len(speakers) // 2):
            what = "a text before the first Human:" if before.strip() else ", ".join(speakers[:8])
            raise InvalidConversation(
                "wrong order", f"instruction: Human: and Assistant: do not take turns: {what}"
            )
        for speaker, text in zip(speakers, texts, strict=True):
            if not text:
                kind = "empty answer" if speaker == "Assistant" else "empty question"
                raise InvalidConversation(kind, f"instruction: the {speaker} says nothing")
        return list(zip(texts[::2], texts[1::2], strict=True))


class ChatHandler(InstructionHandler):
    """Conversations in the model's own chat format."""

    takes = ("chat_template", "system", "loss_on")

    def __init__(self, job: EncoderConfig, tokenizer: Tokenizer) -> None:
        super().__init__(job, tokenizer)
        self.chat = ChatFormat(tokenizer, job.chat_template)
        self.encode = self.chat.encode_segments
        self._system, self._last_only = job.system, job.loss_on == "last"

    def pieces(self, row: Row) -> list[PromptSegment]:
        messages = read_training_messages(self.messages(row), WHERE)
        column, first = _optional(row, "system"), messages[0]
        if first.role != "system" or first.name is not None:  # one with a name describes tools
            messages[:0] = [Message("system", system)] if (system := column or self._system) else []
        elif column and column.strip() != first.content.strip():
            what = f"the column is {shorten(column)}, the conversation begins with {shorten(first.content)}"
            raise InvalidConversation("two system messages", f"'system': {what}")
        return self.chat.training_segments(messages, WHERE, _tools(row.get("tools")), self._last_only)

    @property
    def notes(self) -> list[str]:
        return [f"chat template {self.chat.name}", *self.chat.notes]

    @property
    def facts(self) -> dict[str, Any]:
        return {"chat_template": self.chat.name}

    @abstractmethod
    def messages(self, row: Row) -> Sequence[Any]:
        """Roles and contents, at least one."""


class AlpacaStyleInstructionHandler(ChatHandler):
    """Alpaca rows: `history` is a list of questions and answers that came before."""

    required = ("instruction", "output")
    optional = ("input", "system", "history")
    nested = ("history",)

    def messages(self, row: Row) -> Sequence[Any]:
        question, answer, given = _text(row, "instruction"), _text(row, "output"), _optional(row, "input")
        turns = [
            *_history(row["history"]),
            (f"{question}\n{given}" if given and given.strip() else question, answer),
        ]
        return [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]


class SharegptStyleInstructionHandler(ChatHandler):
    """Conversations as lists of from and value, or of role and content, under `conversations` or `messages`."""

    LISTS: ClassVar[tuple[str, ...]] = ("conversations", "messages")
    required = ()
    optional = (*LISTS, "system", "tools")
    nested = LISTS
    ROLES: ClassVar[dict[str, str]] = {
        "human": "user",
        "gpt": "assistant",
        "chatgpt": "assistant",
        "observation": "tool",
        "function_response": "tool",
    }

    def missing(self, present: Sequence[str]) -> str | None:
        return None if set(self.LISTS) & set(present) else " or ".join(self.LISTS)

    def _read(self, row: Row) -> tuple[list[PromptSegment], int] | Fault:
        """One of the two names is enough: what is much like the other one may stand beside it."""
        said = any(row[name] and not isinstance(row[name], InvalidValue) for name in self.LISTS)
        near = [
            name
            for name in self.LISTS
            if said and isinstance(row[name], InvalidValue) and row[name].kind == MISSPELLED
        ]
        return super()._read({**row, **dict.fromkeys(near)})

    def messages(self, row: Row) -> Sequence[Any]:
        held = [row[name] for name in self.LISTS if row[name] is not None]
        items = next((one for one in held if one), held[0] if held else None)
        if not isinstance(items, Sequence) or isinstance(items, str) or not items:
            raise InvalidConversation(
                "no conversation", f"{' or '.join(self.LISTS)} is {shorten(items)}, not a list of messages"
            )
        return [self._message(item) for item in items]

    def _message(self, item: Any) -> Any:
        """In the words of role and content; columnar files have every key in every message, most of them null."""
        if not isinstance(item, Mapping):
            return item
        known = {key: value for key, value in item.items() if value is not None}
        if "from" not in known:
            return known
        role, said = known.pop("from"), known.pop("value", None)
        if role == "function_call":
            calls = _json(said, "wrong tool call")
            return known | {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}
        return known | {
            "role": self.ROLES.get(role, role) if isinstance(role, str) else role,
            "content": said,
        }


def _text(row: Row, name: str) -> str:
    """What a row must have."""
    value = row[name]
    if value is None:
        raise InvalidConversation(f"no {name!r}", f"{name!r} is missing or null")
    if not isinstance(value, str):
        raise InvalidConversation("not text", f"{name!r} is {shorten(value)}, not a text")
    if not value.strip():
        raise InvalidConversation(
            "empty answer" if name == "output" else "empty question", f"{name!r} says nothing"
        )
    return value


def _optional(row: Row, name: str) -> str | None:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidConversation("not text", f"{name!r} is {shorten(value)}, not a text")
    return value


def _history(value: Any) -> list[Sequence[str]]:
    turns = [] if value is None else value
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise InvalidConversation(
            "wrong history", f"'history' is {shorten(value)}, not a list of questions and answers"
        )
    return turns


def _tools(value: Any) -> Any:
    """Descriptions of functions, as a list or as its JSON."""
    return _json(value, "wrong tools") if isinstance(value, str) and value.strip() else value or None


def _json(text: Any, kind: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise InvalidConversation(kind, f"{shorten(text)} is not JSON") from None
