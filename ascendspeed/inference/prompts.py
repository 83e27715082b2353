"""What is to be answered: texts and conversations from flags, files and stdin -> token ids. Every fault is named with its line."""

import sys
from codecs import BOM_UTF8
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendspeed.inference.args import GenerationArgs
from ascendspeed.tokenization.chat import ChatFormat, Message, read_messages
from ascendspeed.tokenization.tokenizer import Tokenizer
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import parse_json

DEMONSTRATION = (
    "How are you?",
    "The capital of France is",
    "1, 1, 2, 3, 5, 8,",
    "书生·浦语是上海人工智能实验室",
)


@dataclass(frozen=True)
class InputPrompt:
    """A text to go on with, or a conversation to answer."""

    where: str
    """Its place, for errors."""
    text: str | None = None
    messages: tuple[Message, ...] = ()
    said: Any = None
    """The conversation as it was given, for the output file."""
    tools: Any = None


def prompts_from_flags(asked: GenerationArgs) -> list[InputPrompt]:
    """Of --prompt and --input-texts. Raises `UserError`."""
    named = (("--prompt", asked.prompt), ("--input-texts", asked.input_texts))
    found = [
        InputPrompt(f"{flag} {number}", text) for flag, texts in named for number, text in enumerate(texts, 1)
    ]
    for prompt in found:
        if any(
            "\ud800" <= letter <= "\udfff" for letter in prompt.text or ""
        ):  # how Python keeps bytes that are no text
            raise UserError(f"{prompt.where} is not UTF-8")
    return found


def prompts_from_file(path: str) -> list[InputPrompt]:
    """Of a file of JSON lines. Raises `UserError`."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--input-file {path} cannot be read: {error.strerror}") from None
    return prompts_from_json_lines(data, path)


def prompts_from_json_lines(data: bytes, where: str) -> list[InputPrompt]:
    """Of JSON lines; empty lines count, but ask for nothing. Raises `UserError`."""
    lines = enumerate(data.removeprefix(BOM_UTF8).split(b"\n"), 1)
    found = [_line(line, f"{where}, line {number}") for number, line in lines if line.strip()]
    if not found:
        raise UserError(f"{where} holds no prompts")
    return found


def prompts_from_text(data: bytes, where: str) -> list[InputPrompt]:
    """Of plain text, a line each. Raises `UserError`."""
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
    """All of it; nothing when it is a terminal, or closed."""
    return b"" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read()


def _line(line: bytes, where: str) -> InputPrompt:
    try:
        said = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}; a text stands in quotation marks") from None
    if isinstance(said, str):
        return InputPrompt(where, said)
    if isinstance(said, list):
        return _conversation(said, None, where)
    if isinstance(said, Mapping) and set(said) <= {"prompt"} and isinstance(said.get("prompt"), str):
        return InputPrompt(where, said["prompt"])
    if isinstance(said, Mapping) and "messages" in said and set(said) <= {"messages", "tools"}:
        return _conversation(said["messages"], said.get("tools"), where)
    kinds = 'a text, a list of role and content, {"prompt": text} or {"messages": list, "tools": list}'
    raise UserError(f"{where} is neither {kinds}")


def _conversation(said: Any, tools: Any, where: str) -> InputPrompt:
    return InputPrompt(where, None, tuple(read_messages(said, where)), said, tools)


def as_conversation(prompt: InputPrompt, system: str | None) -> InputPrompt:
    """A text as what a user says; with a system message where there is none."""
    messages = prompt.messages or (Message("user", prompt.text or ""),)
    if system is not None and messages[0].role != "system":
        messages = (Message("system", system), *messages)
    return InputPrompt(prompt.where, None, messages, prompt.said, prompt.tools)


def encode_prompt(
    prompt: InputPrompt, tokenizer: Tokenizer, chat: ChatFormat | None, add_bos: bool = True
) -> list[int]:
    """Ids, with exactly one BOS in front where the tokenizer has one. `chat` is needed for conversations. Raises `UserError`."""
    if prompt.messages:
        assert chat is not None
        return chat.prompt_ids(prompt.messages, prompt.where, prompt.tools)
    text = prompt.text or ""
    bos = [tokenizer.bos] if add_bos and tokenizer.bos is not None else []
    ids = bos + tokenizer.encode(text).tolist()
    if not ids:
        raise UserError(f"{prompt.where} is empty, and the tokenizer has no token to begin a text with")
    return ids


def check_lengths(prompts: Sequence[InputPrompt], ids: Iterable[Sequence[int]], longest: int | None) -> None:
    """Raises `UserError` for the first prompt that is too long."""
    for prompt, tokens in zip(prompts, ids, strict=True):
        if longest is not None and len(tokens) > longest:
            raise UserError(f"{prompt.where} has {len(tokens)} tokens; --max-input-length is {longest}")


def prompt_as_json(prompt: InputPrompt) -> Any:
    """As it stands in the output file."""
    if prompt.text is not None:
        return prompt.text
    return (
        prompt.said
        if prompt.said is not None
        else [{"role": m.role, "content": m.content} for m in prompt.messages]
    )
