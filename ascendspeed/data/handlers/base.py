"""What a handler is: rows -> documents. Which there are: `handlers`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ascendspeed.data.document import EncodedRows, Fault
from ascendspeed.data.readers.shard import InvalidValue, RowBatch

MAX_DOCUMENT_BYTES = 16 << 20
"""Bytes; a longer document is skipped as huge. One of this size takes a quarter of a minute and 600 MiB."""


@dataclass(frozen=True)
class EncoderConfig:
    """How rows are made documents; small and picklable."""

    tokenizer_path: str
    handler_name: str
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    longest: int = MAX_DOCUMENT_BYTES
    """Bytes of text of a document."""
    seq_length: int | None = None
    """Longer documents are cut to this many tokens, where the handler says so; None: they stay whole."""
    chat_template: str | None = None
    """By name; None: that of the tokenizer or of the config.json beside it."""
    system: str | None = None
    """System message of conversations that have none."""
    loss_on: Literal["all", "last"] | None = None
    """Which turns of the assistant are learnt; None: as the handler does."""


class Handler(ABC):
    """Rows -> documents."""

    keys: tuple[str, ...]
    """Outputs; each becomes `<prefix>_<key>_document`, or a couple of them."""
    required: tuple[str, ...]
    """Columns without which it cannot work."""
    optional: tuple[str, ...] = ()
    nested: tuple[str, ...] = ()
    """Columns that hold lists."""
    takes: ClassVar[tuple[str, ...]] = ()
    """Settings of a `Job` that mean something here, of those that only some handlers have."""
    learns_answers: ClassVar[bool] = False
    """Whether its documents have masks: they become a couple of pairs, and a row that makes none is not the end of it."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that it reads."""
        return self.required + self.optional

    def missing(self, present: Sequence[str]) -> str | None:
        """What it needs and is not among the columns; None: nothing."""
        return next((name for name in self.required if name not in present), None)

    @property
    def notes(self) -> list[str]:
        """What the user should know."""
        return []

    @property
    def facts(self) -> dict[str, Any]:
        """What else there is to say of the documents, for P.meta."""
        return {}

    @abstractmethod
    def make(self, rows: RowBatch) -> dict[str, EncodedRows]:
        """Key -> the documents of the rows, as long as they are and without an eos at the end."""


def text_size(value: Any, longest: int) -> int | Fault:
    """The size of a text in bytes, or what is wrong with it."""
    if isinstance(value, InvalidValue):
        return Fault(value.kind, value.detail)
    if not isinstance(value, str):
        return Fault("null" if value is None else "not text")
    if not value or value.isspace():
        return Fault("whitespace" if value else "empty")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        return Fault("invalid UTF-8")
    return Fault("huge", f"{size} bytes") if size > longest else size
