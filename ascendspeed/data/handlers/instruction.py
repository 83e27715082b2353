"""Handlers for instruction data: conversations of which only the assistant's answers are supervised.

Two of them write the published prompt (`### Instruction:`), two the model's own chat format. A row that
cannot be read becomes a `Fault`.
"""

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from ascendspeed.data.document import Document, EncodedRows, Fault
from ascendspeed.data.handlers import chat_rows
from ascendspeed.data.handlers.base import EncoderConfig, Handler, alpaca_question, nul_fault
from ascendspeed.data.readers.shard import MISSPELLED, InvalidValue, RowBatch
from ascendspeed.tokenization.chat import (
    ChatFormat,
    InvalidConversation,
    Message,
    PromptSegment,
    SegmentEncoder,
    read_training_messages,
)
from ascendspeed.tokenization.declared_tokens import adds_bos_token, declared_tokens
from ascendspeed.tokenization.tokenizer import Tokenizer
from ascendspeed.utils.text import shorten

Row = Mapping[str, Any]
WHERE = "conversation"
ANSWERS = ("output", "chosen", "rejected")
"""Columns of answers, for the kind of a fault."""


class InstructionHandler(Handler):
    """Converts a row to segments of text, and these to a document with a loss mask."""

    keys = ("packed",)
    has_loss_mask = True
    encode_segments: SegmentEncoder

    def __init__(self, config: EncoderConfig, tokenizer: Tokenizer) -> None:
        self._longest = config.longest

    @abstractmethod
    def conversations(self, row: Row) -> list[list[PromptSegment]]:
        """Returns the segments of a row's conversation, or of both conversations of a pair. Raises
        `InvalidConversation` with the kind of the fault."""

    def encode_rows(self, rows: RowBatch) -> dict[str, EncodedRows]:
        names = self.columns
        results = []
        for values in zip(*(rows[name] for name in names), strict=True):
            results.append(self._read(dict(zip(names, values, strict=True))))
        valid = [result for result in results if not isinstance(result, Fault)]
        flat = [segments for conversations, _ in valid for segments in conversations]
        encoded = iter([Document(*pair) for pair in self.encode_segments(flat)])
        documents: list[Document | Fault] = []
        for result in results:
            documents.append(result if isinstance(result, Fault) else self._next_document(encoded))
        return {self.keys[0]: EncodedRows(documents, sum(size for _, size in valid))}

    def _next_document(self, encoded: Iterator[Document]) -> Document:
        """Returns the document of a row from its encoded conversations, the next ones in `encoded`."""
        return Document.of_pair(next(encoded), next(encoded)) if self.has_pairs else next(encoded)

    def _read(self, row: Row) -> tuple[list[list[PromptSegment]], int] | Fault:
        """Returns the segments of a row's conversations and the size of their text in bytes."""
        invalid = next((value for value in row.values() if isinstance(value, InvalidValue)), None)
        if invalid:
            return Fault(invalid.kind, invalid.detail)
        try:
            conversations = self.conversations(row)
            segments = [segment for conversation in conversations for segment in conversation]
            texts = [segment.content for segment in segments if isinstance(segment.content, str)]
            size = sum(len(text.encode()) for text in texts)
        except InvalidConversation as error:
            return Fault(error.kind, str(error))
        except UnicodeEncodeError:
            return Fault("invalid UTF-8")
        damaged = next((text for text in texts if "\0" in text), None)
        if damaged:
            return nul_fault(damaged)
        return Fault("huge", f"{size} bytes") if size > self._longest else (conversations, size)


class GeneralInstructionHandler(InstructionHandler):
    """Alpaca rows in the published prompt, byte for byte; a missing input counts as empty."""

    required: tuple[str, ...] = ("instruction", "output")
    optional: tuple[str, ...] = ("input",)

    HEAD: ClassVar[str] = (
        "\nBelow is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request. "
        "Please note that you need to think through your response logically and step by step.\n"
    )

    def __init__(self, config: EncoderConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        has_bos = tokenizer.bos is not None and adds_bos_token(declared_tokens(tokenizer.path)[0])
        self._begin = [PromptSegment(tokenizer.bos)] if has_bos else []  # type: ignore[arg-type]
        self._all_answers = config.loss_on == "all"
        self._append_eod = config.append_eod
        self.encode_segments = SegmentEncoder(tokenizer.encode_batch)

    def conversations(self, row: Row) -> list[list[PromptSegment]]:
        segments = [*self._begin, PromptSegment(self.HEAD)]
        turns = self.turns(row)
        for number, (question, answer) in enumerate(turns, 1):
            segments.append(PromptSegment(f"### Instruction:\n{question}\n### Response:\n"))
            segments.append(PromptSegment(f"{answer}\n", self._all_answers or number == len(turns)))
        return [segments]

    @property
    def notes(self) -> list[str]:
        if self._append_eod:
            return []
        return ["answers have no end in the published prompt, so models learn none: add --append-eod"]

    def turns(self, row: Row) -> list[tuple[str, str]]:
        """Returns (question, answer) of every turn."""
        question, context = _alpaca_question(row)
        return [(f"{question}\n{context or ''}", required_text(row, "output"))]


class BelleMultiTurnInstructionHandler(GeneralInstructionHandler):
    """Belle's conversations in the published prompt: `instruction` is a text of turns, `output` answers the
    last of them.

    As published, only the last answer is supervised; with `--loss-on all` all answers are.
    """

    optional = ()
    accepted_settings = ("loss_on",)
    SPEAKERS: ClassVar[re.Pattern[str]] = re.compile("(Human|Assistant):")

    def turns(self, row: Row) -> list[tuple[str, str]]:
        before, *parts = self.SPEAKERS.split(required_text(row, "instruction"))
        if parts[-2:-1] == ["Assistant"] and not parts[-1].strip():
            parts = parts[:-2]  # the cue for the answer
        parts += ["Assistant", required_text(row, "output")]
        speakers = parts[::2]
        texts = [text.strip() for text in parts[1::2]]
        if before.strip() or speakers != ["Human", "Assistant"] * (len(speakers) // 2):
            detail = "a text before the first Human:" if before.strip() else ", ".join(speakers[:8])
            raise InvalidConversation(
                "wrong order", f"instruction: Human: and Assistant: do not take turns: {detail}"
            )
        for speaker, text in zip(speakers, texts, strict=True):
            if not text:
                kind = "empty answer" if speaker == "Assistant" else "empty question"
                raise InvalidConversation(kind, f"instruction: the {speaker} says nothing")
        return list(zip(texts[::2], texts[1::2], strict=True))


class ChatHandler(InstructionHandler):
    """Conversations in the model's own chat format."""

    accepted_settings: ClassVar[tuple[str, ...]] = ("chat_template", "system", "loss_on")

    def __init__(self, config: EncoderConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.chat = ChatFormat(tokenizer, config.chat_template)
        self.encode_segments = self.chat.encode_segments
        self._system = config.system
        self._last_only = config.loss_on == "last"

    def conversations(self, row: Row) -> list[list[PromptSegment]]:
        return [self._segments(row, read_training_messages(self.messages(row), WHERE), self._last_only)]

    def _segments(self, row: Row, messages: list[Message], last_only: bool) -> list[PromptSegment]:
        """Returns the segments of a conversation, with the system message and the tools of the row."""
        column = optional_text(row, "system")
        first = messages[0]
        if first.role != "system" or first.name is not None:  # a system message with a name describes tools
            system = column or self._system
            if system:
                messages.insert(0, Message("system", system))
        elif column and column.strip() != first.content.strip():
            detail = f"the column is {shorten(column)}, the conversation begins with {shorten(first.content)}"
            raise InvalidConversation("two system messages", f"'system': {detail}")
        return self.chat.training_segments(messages, WHERE, _tools(row.get("tools")), last_only)

    @property
    def notes(self) -> list[str]:
        return [f"chat template {self.chat.name}", *self.chat.notes]

    @property
    def facts(self) -> dict[str, Any]:
        return {"chat_template": self.chat.name}

    def messages(self, row: Row) -> Sequence[Any]:
        """Returns the messages of a row, with role and content, at least one."""
        raise NotImplementedError


class AlpacaStyleInstructionHandler(ChatHandler):
    """Alpaca rows: `history` is a list of earlier questions and answers."""

    required = ("instruction", "output")
    optional = ("input", "system", "history")

    def messages(self, row: Row) -> Sequence[Any]:
        return [*alpaca_prompt(row), {"role": "assistant", "content": required_text(row, "output")}]


class SharegptStyleInstructionHandler(ChatHandler):
    """Conversations under `conversations`, `messages` or `conversation`, as `chat_rows` reads them."""

    LISTS: ClassVar[tuple[str, ...]] = ("conversations", "messages", "conversation")
    required = ()
    optional = (*LISTS, "system", "tools")

    def missing(self, present: Sequence[str]) -> str | None:
        return None if set(self.LISTS) & set(present) else " or ".join(self.LISTS)

    def _read(self, row: Row) -> tuple[list[list[PromptSegment]], int] | Fault:
        """Reads a row; one of the lists is enough, so a column similar to another name is no fault."""
        has_list = any(row[name] and not isinstance(row[name], InvalidValue) for name in self.LISTS)
        misspelled = []
        for name in self.LISTS:
            value = row[name]
            if has_list and isinstance(value, InvalidValue) and value.kind == MISSPELLED:
                misspelled.append(name)
        return super()._read({**row, **dict.fromkeys(misspelled)})

    def messages(self, row: Row) -> Sequence[Any]:
        return conversation_of(row, self.LISTS)


def conversation_of(row: Row, lists: Sequence[str]) -> list[Any]:
    """Returns the messages in the columns `lists`, one of which is enough. Raises `InvalidConversation`."""
    filled = {name: row[name] for name in lists if row[name]}
    if not filled:
        value = next((row[name] for name in lists if row[name] is not None), None)
        raise InvalidConversation(
            "no conversation", f"{' or '.join(lists)} is {shorten(value)}, not a list of messages"
        )
    conversations = [chat_rows.read_conversation(value, name) for name, value in filled.items()]
    if any(other != conversations[0] for other in conversations[1:]):
        raise InvalidConversation(
            "two conversations", f"{' and '.join(filled)} hold different messages; remove one of them"
        )
    return conversations[0]


def alpaca_prompt(row: Row) -> list[Any]:
    """Returns the messages of an Alpaca row up to its last question. Raises `InvalidConversation`."""
    question, context = _alpaca_question(row)
    if context and context.strip():
        question = f"{question}\n{context}"
    messages = []
    for user, assistant in _history(row["history"]):
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": assistant})
    return [*messages, {"role": "user", "content": question}]


def required_text(row: Row, name: str) -> str:
    """Returns the text of a required column. Raises `InvalidConversation`."""
    value = row[name]
    if value is None:
        raise InvalidConversation(f"no {name!r}", f"{name!r} is missing or null")
    if not isinstance(value, str):
        raise InvalidConversation("not text", f"{name!r} is {shorten(value)}, not a text")
    if not value.strip():
        raise InvalidConversation(
            "empty answer" if name in ANSWERS else "empty question", f"{name!r} says nothing"
        )
    return value


def _alpaca_question(row: Row) -> tuple[str, str | None]:
    """Returns instruction and input of an Alpaca row. Raises `InvalidConversation`."""
    instruction, context = alpaca_question(row["instruction"], optional_text(row, "input"))
    return required_text({"instruction": instruction}, "instruction"), context


def optional_text(row: Row, name: str) -> str | None:
    """Returns the text of an optional column, or None. Raises `InvalidConversation` for another type."""
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidConversation("not text", f"{name!r} is {shorten(value)}, not a text")
    return value


def _history(value: Any) -> list[Sequence[str]]:
    """Returns earlier questions and answers. Raises `InvalidConversation`."""
    is_blank = value is None or (isinstance(value, str) and not value.strip())
    turns = [] if is_blank else chat_rows.json_or_value(value)
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise InvalidConversation(
            "wrong history", f"'history' is {shorten(value)}, not a list of questions and answers"
        )
    return turns


def _tools(value: Any) -> Any:
    """Returns descriptions of functions, given as a list or as its JSON. Raises `InvalidConversation`."""
    return (
        chat_rows.parse_json(value, "wrong tools")
        if isinstance(value, str) and value.strip()
        else value or None
    )
