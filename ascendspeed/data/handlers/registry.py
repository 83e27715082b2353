"""Which handlers there are, by name; a new one is a class and a line in `HANDLERS`."""

import difflib
from collections.abc import Sequence
from typing import Any

from ascendspeed.data.document import Document
from ascendspeed.data.handlers.base import EncoderConfig, Handler
from ascendspeed.data.handlers.instruction import (
    AlpacaStyleInstructionHandler,
    BelleMultiTurnInstructionHandler,
    GeneralInstructionHandler,
    SharegptStyleInstructionHandler,
)
from ascendspeed.data.handlers.pretrain import AlpacaPretrainHandler, GeneralPretrainHandler
from ascendspeed.tokenization.tokenizer import Tokenizer
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import shorten_list

__all__ = ["HANDLERS", "Document", "Handler", "check_columns", "create_handler", "unread_columns"]

HANDLER_CLASSES: tuple[type[Handler], ...] = (
    GeneralPretrainHandler,
    AlpacaPretrainHandler,
    GeneralInstructionHandler,
    AlpacaStyleInstructionHandler,
    SharegptStyleInstructionHandler,
    BelleMultiTurnInstructionHandler,
)
HANDLERS: dict[str, type[Handler]] = {kind.__name__: kind for kind in HANDLER_CLASSES}
HANDLER_SETTINGS = ("chat_template", "system", "loss_on")
"""Of a `Job`, that only some handlers take."""
MAX_LISTED = 12
"""Names of columns that are said."""


def create_handler(job: EncoderConfig, tokenizer: Tokenizer) -> Handler:
    """The handler of `--handler-name`. Raises `UserError`: listing what there is, or for a setting that means nothing to it."""
    name = job.handler_name
    if name not in HANDLERS:
        within = [other for other in HANDLERS if name and name.casefold() in other.casefold()]
        near = within or difflib.get_close_matches(name, HANDLERS, 1, 0.3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"unknown handler {name!r}; {hint}There are: {', '.join(HANDLERS)}")
    kind = HANDLERS[name]
    for setting in HANDLER_SETTINGS:
        if getattr(job, setting) is not None and setting not in kind.takes:
            others = ", ".join(other for other, one in HANDLERS.items() if setting in one.takes)
            raise UserError(
                f"--{setting.replace('_', '-')} means nothing to {name}, only to {others}; leave it out"
            )
    return kind(job, tokenizer)  # type: ignore[call-arg]


def unread_columns(made_by: Handler, present: Sequence[str]) -> str:
    """What is said of columns that the handler does not read; empty when it reads all."""
    names = [str(name) for name in present if name not in made_by.columns]
    return f"columns not read: {shorten_list(names, MAX_LISTED)}" if names else ""


def check_columns(made_by: Handler, where: Any, present: Sequence[str]) -> None:
    """Raises `UserError` when a required column is missing, listing what there is."""
    missing = made_by.missing(present)
    if missing:
        raise UserError(
            f"{where}: {type(made_by).__name__} needs the column {missing!r}; there are: {', '.join(map(str, present))}"
        )
