"""Registry of dataset handlers by name. A new handler is a class and a line in `HANDLER_CLASSES`."""

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
from ascendspeed.data.handlers.pairwise import (
    AlpacaStylePairwiseHandler,
    HuggingFacePairwiseHandler,
    SharegptStylePairwiseHandler,
)
from ascendspeed.data.handlers.pretrain import AlpacaPretrainHandler, GeneralPretrainHandler
from ascendspeed.tokenization.tokenizer import Tokenizer
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import shorten_list

__all__ = [
    "HANDLERS",
    "Document",
    "Handler",
    "check_columns",
    "create_handler",
    "refuse_repeated_columns",
    "unread_columns",
]

HANDLER_CLASSES: tuple[type[Handler], ...] = (
    GeneralPretrainHandler,
    AlpacaPretrainHandler,
    GeneralInstructionHandler,
    AlpacaStyleInstructionHandler,
    SharegptStyleInstructionHandler,
    BelleMultiTurnInstructionHandler,
    AlpacaStylePairwiseHandler,
    SharegptStylePairwiseHandler,
    HuggingFacePairwiseHandler,
)
HANDLERS: dict[str, type[Handler]] = {kind.__name__: kind for kind in HANDLER_CLASSES}
HANDLER_SETTINGS = ("chat_template", "system", "loss_on")
"""Fields of `EncoderConfig` that only some handlers use."""
MAX_LISTED = 12
"""Names of columns in a note."""


def create_handler(config: EncoderConfig, tokenizer: Tokenizer) -> Handler:
    """Creates the handler of `--handler-name`. Raises `UserError` if it does not exist or does not use a
    given setting."""
    name = config.handler_name
    if name not in HANDLERS:
        containing = [other for other in HANDLERS if name and name.casefold() in other.casefold()]
        similar = containing or difflib.get_close_matches(name, HANDLERS, 1, 0.3)
        hint = f"did you mean {' or '.join(similar)}? " if similar else ""
        raise UserError(f"unknown handler {name!r}; {hint}There are: {', '.join(HANDLERS)}")
    handler_class = HANDLERS[name]
    for setting in HANDLER_SETTINGS:
        if getattr(config, setting) is not None and setting not in handler_class.accepted_settings:
            others = [other for other, cls in HANDLERS.items() if setting in cls.accepted_settings]
            raise UserError(
                f"--{setting.replace('_', '-')} means nothing to {name}, only to {', '.join(others)}; leave "
                "it out"
            )
    return handler_class(config, tokenizer)  # type: ignore[call-arg]


def unread_columns(handler: Handler, present: Sequence[str]) -> str:
    """Returns a note about columns that the handler does not read; empty if it reads all."""
    unread = [str(name) for name in present if name not in handler.columns]
    names = [name if name and name == name.strip() else repr(name) for name in unread]
    return f"columns not read: {shorten_list(names, MAX_LISTED)}" if names else ""


def refuse_repeated_columns(handler: Handler, source: Any, present: Sequence[str]) -> None:
    """Raises `UserError` if a column of `source` (a path) that is read occurs twice."""
    repeated = next((name for name in handler.columns if present.count(name) > 1), None)
    if repeated:
        raise UserError(
            f"{source}: the column {repeated!r} occurs {present.count(repeated)} times; rename or "
            "remove all but one"
        )


def check_columns(handler: Handler, source: Any, present: Sequence[str]) -> None:
    """Raises `UserError` if a required column of `source` (a path) is missing, or one that is read stands
    there twice."""
    refuse_repeated_columns(handler, source, present)
    missing = handler.missing(present)
    if missing:
        columns = ", ".join(map(str, present))
        raise UserError(
            f"{source}: {type(handler).__name__} needs the column {missing!r}; there are: {columns}"
        )
