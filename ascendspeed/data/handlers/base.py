"""`Handler`, the interface from rows to documents, and `EncoderConfig`, its settings. `registry` lists the
handlers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ascendspeed.data.document import EncodedRows, Fault
from ascendspeed.data.readers.shard import InvalidValue, RowBatch

MAX_DOCUMENT_BYTES = 16 << 20
"""A longer document is skipped as huge. One of this size takes a quarter of a minute and 600 MiB."""


@dataclass(frozen=True)
class EncoderConfig:
    """Settings that turn rows into documents; small and picklable.

    Names and order of the fields are part of the key of cached stream positions.
    """

    tokenizer_path: str
    handler_name: str
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    longest: int = MAX_DOCUMENT_BYTES
    """Maximum text of a document, in bytes."""
    seq_length: int | None = None
    """Documents with a loss mask are truncated to this many tokens; None: no truncation."""
    chat_template: str | None = None
    """Name of the chat template; None: that of the tokenizer or of the config.json beside it."""
    system: str | None = None
    """System message of conversations without one."""
    loss_on: Literal["all", "last"] | None = None
    """Assistant turns in the loss; None: the handler's default."""
    parse_special_tokens: bool = False
    """Special tokens are found in text; in a chat format all but BOS, EOS and those of the format."""


class Handler(ABC):
    """Converts rows to documents."""

    keys: tuple[str, ...]
    """Outputs; each becomes `<prefix>_<key>_document`, or a masked pair."""
    required: tuple[str, ...]
    """Columns that must exist."""
    optional: tuple[str, ...] = ()
    accepted_settings: ClassVar[tuple[str, ...]] = ()
    """Fields of `EncoderConfig` that apply, of those that only some handlers use."""
    has_loss_mask: ClassVar[bool] = False
    """True if documents have loss masks: they become masked pairs, and files that cannot be read are counted,
    not refused."""
    has_pairs: ClassVar[bool] = False
    """True if documents are preference pairs, which have loss masks."""

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that the handler reads."""
        return self.required + self.optional

    def missing(self, present: Sequence[str]) -> str | None:
        """Returns a required column that is not in `present`; None if all are."""
        return next((name for name in self.required if name not in present), None)

    @property
    def notes(self) -> list[str]:
        """Log lines for the user."""
        return []

    @property
    def facts(self) -> dict[str, Any]:
        """Additional entries of P.meta."""
        return {}

    @abstractmethod
    def encode_rows(self, rows: RowBatch) -> dict[str, EncodedRows]:
        """Returns key -> the documents of the rows, neither truncated nor with a final eos."""


def nul_fault(text: str) -> Fault:
    """Returns the fault of a text with NUL characters, which damaged files and other encodings have."""
    return Fault("NUL characters", f"{text.count(chr(0)):,} of them in a text")


def nan_to_none(value: Any) -> Any:
    """Returns a value with None in place of every NaN, which pandas writes for a missing value."""
    if isinstance(value, float):
        return None if value != value else value
    if isinstance(value, list | tuple):
        return type(value)(map(nan_to_none, value))
    if isinstance(value, dict):
        return {key: nan_to_none(item) for key, item in value.items()}
    return value


def alpaca_question(instruction: Any, context: Any) -> tuple[Any, Any]:
    """Returns instruction and input of an Alpaca row; an input without an instruction is the question."""
    is_blank = instruction is None or (isinstance(instruction, str) and not instruction.strip())
    if is_blank and isinstance(context, str) and context.strip():
        return context, None
    return instruction, context


def text_size(value: Any, longest: int) -> int | Fault:
    """Returns the size of a text in bytes, or the fault if it is no text or longer than `longest` bytes."""
    if isinstance(value, InvalidValue):
        return Fault(value.kind, value.detail)
    if not isinstance(value, str):
        return Fault("null" if value is None else "not text")
    if not value or value.isspace():
        return Fault("whitespace" if value else "empty")
    if "\0" in value:
        return nul_fault(value)
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        return Fault("invalid UTF-8")
    return Fault("huge", f"{size} bytes") if size > longest else size
