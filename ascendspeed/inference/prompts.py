"""Reads prompts (texts and conversations) from flags, files and stdin, and encodes them; errors name the
line."""

import sys
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ascendspeed.inference.args import GenerationArgs
from ascendspeed.tokenization.chat import ChatFormat, Message, read_messages
from ascendspeed.tokenization.tokenizer import Tokenizer
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import (
    HEAD_BYTES,
    parse_json,
    refuse_carriage_returns,
    refuse_compressed,
    refuse_lfs_pointer,
    refuse_utf16,
)
from ascendspeed.utils.text import shorten_list

OUTPUT_KEYS = frozenset(
    (
        "task",
        "number",
        "prompt",
        "prompt_tokens",
        "new_tokens",
        "answers",
        "tokens",
        "pieces",
        "logprobs",
        "logprob",
    )
)
"""Keys of a record of the output file."""
DEMONSTRATION = (
    "How are you?",
    "The capital of France is",
    "1, 1, 2, 3, 5, 8,",
    "书生·浦语是上海人工智能实验室",
)


@dataclass(frozen=True)
class InputPrompt:
    """A text to continue, or a conversation to answer."""

    where: str
    """Flag, or file and line, for error messages."""
    text: str | None = None
    messages: tuple[Message, ...] = ()
    raw_messages: Any = None
    """Messages as read from JSON, for the output file."""
    tools: Any = None
    further: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of its row, which are copied to the output file."""


def demonstration_prompts() -> list[InputPrompt]:
    """Returns the prompts of the demonstration."""
    return [InputPrompt(f"demonstration {number}", text) for number, text in enumerate(DEMONSTRATION, 1)]


def prompts_from_flags(args: GenerationArgs) -> list[InputPrompt]:
    """Reads --prompt and --input-texts. Raises `UserError`."""
    prompts = []
    for flag, texts in (("--prompt", args.prompt), ("--input-texts", args.input_texts)):
        for number, text in enumerate(texts, 1):
            # Python decodes invalid bytes of the command line to surrogates.
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise UserError(f"{flag} {number} is not UTF-8")
            prompts.append(InputPrompt(f"{flag} {number}", text))
    return prompts


def prompts_from_file(path: str) -> list[InputPrompt]:
    """Reads a file of JSON lines. Raises `UserError`."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--input-file {path} cannot be read: {error.strerror}") from None
    refuse_lfs_pointer(path, data)
    return prompts_from_json_lines(data, path)


def prompts_from_json_lines(data: bytes, where: str) -> list[InputPrompt]:
    """Parses JSON lines; empty lines are skipped but counted. Raises `UserError`."""
    refuse_compressed(where, data[:HEAD_BYTES])
    refuse_utf16(where, data[:HEAD_BYTES])
    refuse_carriage_returns(where, [data])
    lines = data.removeprefix(BOM_UTF8).split(b"\n")
    prompts = [
        _parse_line(line, f"{where}, line {number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not prompts:
        raise UserError(f"{where} contains no prompts")
    return prompts


def prompts_from_text(data: bytes, where: str) -> list[InputPrompt]:
    """Parses plain text with a prompt per line. Raises `UserError`."""
    refuse_compressed(where, data[:HEAD_BYTES])
    refuse_utf16(where, data[:HEAD_BYTES])
    refuse_carriage_returns(where, [data])
    if b"\0" in data:
        number = data[: data.index(b"\0")].count(b"\n") + 1
        raise UserError(f"{where}, line {number} holds NUL characters, which are no text")
    try:
        lines = data.removeprefix(BOM_UTF8).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8: {error.reason} at byte {error.start}") from None
    return [
        InputPrompt(f"{where}, line {number}", line.rstrip("\r"))
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def read_stdin() -> bytes:
    """Returns all of stdin; b"" if it is a terminal or closed."""
    return b"" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read()


def _parse_line(line: bytes, where: str) -> InputPrompt:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}; a text must be in quotation marks") from None
    if isinstance(value, str):
        return InputPrompt(where, value)
    if isinstance(value, list):
        return _conversation(value, None, where)
    if isinstance(value, Mapping):
        own_keys = {"prompt"} if "prompt" in value else {"messages", "tools"}
        further = {key: item for key, item in value.items() if key not in own_keys}
        if (taken := OUTPUT_KEYS.intersection(further)) or {"messages", "tools"}.intersection(further):
            raise UserError(f"{where}: {_clash(taken)}")
        if isinstance(value.get("prompt"), str):
            return InputPrompt(where, value["prompt"], further=further)
        if "messages" in value:
            return replace(_conversation(value["messages"], value.get("tools"), where), further=further)
    kinds = 'a text, a list of role and content, {"prompt": text} or {"messages": list, "tools": list}'
    raise UserError(f"{where} is not one of: {kinds}")


def _clash(taken: Iterable[str]) -> str:
    """Returns why the further keys of a row are refused."""
    if names := sorted(taken):
        return f"the key {names[0]!r} is one of the output file's; give it another name"
    return "'messages' or 'tools' beside 'prompt': a row has a text, or messages with their tools"


def further_keys(prompts: Sequence[InputPrompt]) -> str | None:
    """Returns a note that names the further keys of all rows; None if there are none."""
    counts = Counter(key for prompt in prompts for key in prompt.further)
    if not counts:
        return None
    names = shorten_list([f"{key} ({count} rows)" for key, count in counts.items()])
    return f"keys that are no prompt are copied to the output file: {names}"


def _conversation(messages: Any, tools: Any, where: str) -> InputPrompt:
    return InputPrompt(where, None, tuple(read_messages(messages, where)), messages, tools)


def as_conversation(prompt: InputPrompt, system: str | None) -> InputPrompt:
    """Turns a text into a user message, and adds the system message to a conversation that has none."""
    messages = prompt.messages or (Message("user", prompt.text or ""),)
    if system is not None and messages[0].role != "system":
        messages = (Message("system", system), *messages)
    return replace(prompt, text=None, messages=messages)


def encode_prompt(
    prompt: InputPrompt, tokenizer: Tokenizer, chat_format: ChatFormat | None, add_bos: bool = True
) -> list[int]:
    """Returns the ids of a prompt, with one BOS at the beginning if the tokenizer has one.

    `chat_format` is required for conversations. Raises `UserError`.
    """
    if prompt.messages:
        assert chat_format is not None
        return chat_format.prompt_ids(prompt.messages, prompt.where, prompt.tools)
    text = prompt.text or ""
    bos = [tokenizer.bos] if add_bos and tokenizer.bos is not None else []
    ids = bos + tokenizer.encode(text).tolist()
    if not ids:
        raise UserError(f"{prompt.where} is empty, and the tokenizer has no token that begins a text")
    return ids


def check_lengths(prompts: Sequence[InputPrompt], ids: Iterable[Sequence[int]], longest: int | None) -> None:
    """Raises `UserError` for the first prompt with more than `longest` tokens."""
    for prompt, tokens in zip(prompts, ids, strict=True):
        if longest is not None and len(tokens) > longest:
            raise UserError(f"{prompt.where} has {len(tokens)} tokens; --max-input-length is {longest}")


def prompt_as_json(prompt: InputPrompt) -> Any:
    """Returns the prompt's value in the output file."""
    if prompt.text is not None:
        return prompt.text
    if prompt.raw_messages is not None:
        return prompt.raw_messages
    return [{"role": message.role, "content": message.content} for message in prompt.messages]
