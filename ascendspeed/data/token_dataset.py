"""Interfaces of training data: `TokenDataset` (a kind of data), `SampleSource` (its samples in a split)."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from ascendspeed.config.schema import DataConfig
from ascendspeed.utils.errors import UserError

if TYPE_CHECKING:  # preprocessing imports subclasses and needs no torch
    from ascendspeed.data.packing.rows import Sample


class SampleSource(Protocol):
    """The endless samples of one dataset in one split."""

    prefix: str
    """Path as the user gave it, for messages."""
    samples_per_epoch: int
    """Above 0."""
    estimated: bool
    """True if `samples_per_epoch` is an estimate, because the data are tokenized in training."""

    @property
    def note(self) -> str:
        """One line for the log at the start; empty: nothing to report."""

    def sample(self, number: int) -> "Sample":
        """Returns sample `number` >= 0; numbers beyond an epoch continue in the next one."""


class TokenDataset(ABC):
    """One kind of data that `--data-path` can name.

    A new kind is a subclass in a file of its own and a line in `dataset.DATASET_KINDS`.
    """

    description: ClassVar[str]
    """Name of the kind in errors, in the plural."""
    flags: ClassVar[tuple[str, ...]] = ()
    """Fields of `DataConfig` that apply to this kind and not to every other."""

    prefix: str
    """Path as the user gave it, for messages."""
    has_loss_mask: bool
    """True if documents have loss masks and are packed; False for plain text."""
    holds_pairs: bool = False
    """True if documents are preference pairs."""

    @classmethod
    @abstractmethod
    def match(cls, path: str) -> bool:
        """Returns True if the path names data of this kind."""

    @classmethod
    @abstractmethod
    def open(cls, path: str, data: DataConfig, vocab_size: int) -> Self:
        """Opens the data; ids must be below `vocab_size`. Raises `UserError` for missing, damaged or
        unsuitable data."""

    @classmethod
    @abstractmethod
    def files(cls, path: str) -> list[Path]:
        """Returns all files that the path names."""

    @classmethod
    def facts(cls, path: str) -> dict[str, Any]:
        """Returns what preprocessing recorded about the data; empty for data of other tools."""
        return {}

    @abstractmethod
    def samples(self, split: str, data: DataConfig, seed: int) -> SampleSource:
        """Returns the samples of a split. Raises `UserError` if it has none."""


def out_of_vocabulary(prefix: str, token_id: int, vocab_size: int) -> UserError:
    """Builds the error for a token id that the model does not have."""
    return UserError(
        f"{prefix} has the token id {token_id}, but the model's vocabulary has {vocab_size} ids; "
        "was another tokenizer used?"
    )


def check_max_token(prefix: str, facts: dict[str, Any], tokens: int, vocab_size: int) -> None:
    """Raises `UserError` if preprocessing recorded an id beyond the vocabulary; facts of other data are
    ignored."""
    max_token = facts.get("max_token", 0)
    if facts.get("tokens") == tokens and max_token >= vocab_size:
        raise out_of_vocabulary(prefix, max_token, vocab_size)
