"""Handlers: rows -> the texts of documents. `HANDLERS` is the registry; a new one is a class and a line there.

A handler says which columns it needs and what text each row makes under each output key; `screen` sorts out what cannot be
tokenized. The handlers here train on every token of a text (`Document.loss_mask` is None); one for instruction tuning would
make documents whose mask leaves the prompt out.
"""

import difflib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from ascendspeed.data.document import Document
from ascendspeed.data.shard import Bad, Batch
from ascendspeed.errors import UserError

__all__ = ["HANDLERS", "Document", "Handler", "check_columns", "handler", "screen"]


class Handler(ABC):
    """Rows -> texts."""

    keys: tuple[str, ...]
    """Outputs; each becomes `<prefix>_<key>_document`."""
    required: tuple[str, ...]
    """Columns without which it cannot work."""
    optional: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that it reads."""
        return self.required + self.optional

    @abstractmethod
    def texts(self, rows: Batch) -> dict[str, list[Any]]:
        """Key -> one value per row: the text, or what stands in its place (None, a `Bad`, whatever is not text)."""


class GeneralPretrainHandler(Handler):
    """Plain text in the columns of `--json-keys`; each key makes a data set of its own."""

    def __init__(self, json_keys: Sequence[str]) -> None:
        self.keys = self.required = tuple(dict.fromkeys(json_keys))

    def texts(self, rows: Batch) -> dict[str, list[Any]]:
        return rows


class AlpacaPretrainHandler(Handler):
    """Alpaca rows (instruction, input, output) as one text, under the key `text`."""

    keys = ("text",)
    required = ("instruction", "output")
    optional = ("input",)

    # The published format to the letter (no space before USER included), except that an empty input leaves its section out.
    PROMPT: ClassVar[str] = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
        "USER: Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n{section}### Response: ASSISTANT: "
    )
    SECTION: ClassVar[str] = "### Input:\n{input}\n\n"

    def __init__(self, json_keys: Sequence[str] = ()) -> None:
        """`json_keys` name nothing here: the columns are Alpaca's."""

    def texts(self, rows: Batch) -> dict[str, list[Any]]:
        return {"text": [self._text(*row) for row in zip(*(rows[name] for name in self.columns), strict=True)]}

    def _text(self, instruction: Any, output: Any, given: Any) -> Any:
        for value in (instruction, output):
            if not isinstance(value, str) or not value.strip():
                return value  # there is nothing to learn; it is counted as what it is
        if given is not None and not isinstance(given, str):
            return given
        section = self.SECTION.format(input=given) if given and given.strip() else ""
        return self.PROMPT.format(instruction=instruction, section=section) + output


HANDLERS: dict[str, type[Handler]] = {kind.__name__: kind for kind in (GeneralPretrainHandler, AlpacaPretrainHandler)}


def handler(name: str, json_keys: Sequence[str]) -> Handler:
    """The handler of `--handler-name`. Raises `UserError` listing what there is."""
    if name not in HANDLERS:
        near = difflib.get_close_matches(name, HANDLERS, 1, 0.3)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unknown handler {name!r}; {hint}There are: {', '.join(HANDLERS)}")
    return HANDLERS[name](json_keys)  # type: ignore[call-arg]


def check_columns(made_by: Handler, where: Any, present: Sequence[str]) -> None:
    """Raises `UserError` when a required column is missing, listing what there is."""
    missing = [name for name in made_by.required if name not in present]
    if missing:
        raise UserError(
            f"{where}: {type(made_by).__name__} needs the column {missing[0]!r}; there are: {', '.join(map(str, present))}"
        )


def screen(values: Sequence[Any], longest: int, skipped: Counter[str]) -> tuple[list[str], int]:
    """The texts that can be tokenized, and their size in bytes; what else there is, is counted in `skipped` by its kind.

    `longest` is the most bytes that a document may have.
    """
    kept, size = [], 0
    for value in values:
        fault, length = _weigh(value, longest)
        if fault:
            skipped[fault] += 1
        else:
            kept.append(value)
            size += length
    return kept, size


def _weigh(value: Any, longest: int) -> tuple[str, int]:
    """(what is wrong with it or "", its bytes)."""
    if not isinstance(value, str):
        return value.value if isinstance(value, Bad) else "null" if value is None else "not text", 0
    if not value or value.isspace():
        return "whitespace" if value else "empty", 0
    try:
        length = len(value.encode())
    except UnicodeEncodeError:
        return "invalid UTF-8", 0
    return "huge" if length > longest else "", length
