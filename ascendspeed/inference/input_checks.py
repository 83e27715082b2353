"""Checks that an inference command has its weights, tokenizer and prompts, by the names of files alone."""

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

from ascendspeed.checkpoint.paths import describe_missing
from ascendspeed.utils.errors import UserError


def check_folders(load: str, tokenizer: str | None) -> None:
    """Raises UserError naming what is missing of weights and tokenizer (None: there need be none).

    Every rank would find it too, but only after all processes have started.
    """
    checks: list[Callable[[], object]] = [lambda: _check_weights(Path(load))]
    if tokenizer is not None and (tokenizer != load or Path(load).is_dir()):
        checks.append(lambda: _check_tokenizer(tokenizer))
    _run_all(checks)


def check_input_file(path: str | None) -> None:
    """Raises UserError unless the file of --input-file exists; `-` is stdin."""
    if path in (None, "-"):
        return
    with contextlib.suppress(OSError):  # opening it names the cause
        if not Path(path).exists():
            raise UserError(f"--input-file {path}: there is no such file")
        if Path(path).is_dir():
            raise UserError(f"--input-file {path} is a directory: give a file of JSON lines")


def check_chat_template(name: str | None) -> None:
    """Raises UserError unless --chat-template names a template."""
    from ascendspeed.tokenization.chat.templates import TEMPLATES  # here, so that --help does not wait for it

    if name is not None and name not in TEMPLATES:
        raise UserError(f"--chat-template {name} does not exist; choose from {', '.join(TEMPLATES)}")


def _check_weights(folder: Path) -> None:
    from ascendspeed.conversion.formats.registry import detect_format

    if not folder.is_dir():
        raise UserError(f"--load: {describe_missing(folder)}")
    detect_format(folder)


def _check_tokenizer(folder: str) -> None:
    from ascendspeed.tokenization.tokenizer import find_vocabulary

    find_vocabulary(Path(folder))


def _run_all(checks: Iterable[Callable[[], object]]) -> None:
    """Raises one UserError with the messages of all checks that fail."""
    messages = []
    for check in checks:
        try:
            check()
        except UserError as error:
            messages.append(str(error))
    if messages:
        raise UserError("; ".join(messages))
