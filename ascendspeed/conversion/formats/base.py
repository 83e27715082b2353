"""The contract of a checkpoint format and the options of reading and writing. Free of torch: `--help` lists
the formats.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from ascendspeed.models.families import FAMILIES
from ascendspeed.models.families.internevo_names import InternEvoOptions
from ascendspeed.utils.errors import UserError

if TYPE_CHECKING:
    import torch

    from ascendspeed.checkpoint.discovery import Readers
    from ascendspeed.conversion.checkpoint_reader import CheckpointReader
    from ascendspeed.conversion.write import PlannedFile

Direction = Literal["read", "write"]


@dataclass(frozen=True)
class ReadOptions:
    """Options for opening a checkpoint; each format uses those that concern it."""

    config_dir: Path
    """Folder with config.json and the tokenizer; the checkpoint's own folder by default."""
    internevo: InternEvoOptions = field(default_factory=InternEvoOptions)
    """Facts that the files of an InternEvo training folder may lack."""
    readers: "Readers | None" = None
    """Ranks that open a training checkpoint together and share its verification; None: this process alone."""
    open_reader: "Callable[..., CheckpointReader] | None" = None
    """`registry.open_reader`, for a checkpoint whose weights are in another one (LoRA adapters and their
    base).
    """


@dataclass(frozen=True)
class WriteOptions:
    """Options of the formats that can be written; one that --format does not use is an error."""

    tp: int = 1
    """Tensor-parallel ranks to write rank files for."""
    pp: int = 1
    """Pipeline stages to write rank files for."""
    make_vocab_size_divisible_by: int = 128
    """Rank files pad the vocabulary to a multiple of this x --tp."""
    max_shard_size: str = "10GB"
    """Size of a safetensors file."""
    to_family: str | None = None
    """Write under another family's names (--format hf): internlm2 for a plain Llama that was one; None: the
    source's own.
    """
    copy_code: bool = False
    """Copy the model's *.py too (--format hf), unexecuted, and keep the auto_map that refers to them;
    otherwise both are left out.
    """
    wp: int = 0
    """Weight-parallel ranks (isp) to write an InternEvo folder for, in place of --tp."""
    quantize: Literal["w8a16", "modelslim-w8a16"] | None = None
    """Weights of the layers in int8 with a scale for each output channel (--format hf-llama): w8a16, the
    layout of compressed-tensors (vLLM, transformers); modelslim-w8a16, that of MindIE and vllm-ascend.
    """
    static_rope: int | None = None
    """Replace dynamic rope scaling by its base at this length (--format hf-llama), for programs that do not
    compute it.
    """
    internevo_version: Literal[1, 2] = 2
    """InternEvo folder to write: 1, w2 is up and w3 is down (releases before March 2024); 2, w3 is up and w2
    is down.
    """
    embed_split: bool = True
    """InternEvo folder to write: cut the embedding along the hidden size, as embed_split_hidden=True; else
    along the vocabulary.
    """
    gguf_type: Literal["f16", "bf16", "q8_0"] | None = None
    """Type of the matrices in a GGUF file; None: bf16 for weights in bfloat16, else f16."""


class CheckpointWriter(Protocol):
    """Writes one checkpoint; `convert.convert` calls the methods in this order."""

    def check(self, reader: "CheckpointReader") -> None:
        """Raises `UserError` if the model cannot be written in this format."""

    def files(self, reader: "CheckpointReader", dtype: "torch.dtype | None") -> "Sequence[PlannedFile]":
        """Returns the files of tensors to write."""

    def finish(self, reader: "CheckpointReader", folder: Path, dtype: "torch.dtype | None") -> None:
        """Writes all other files, after the tensors."""


class CheckpointFormat(ABC):
    """One checkpoint format. To add one, write a subclass and add an instance to `registry.FORMATS`.

    The module of the subclass must import without torch; import it inside `detect`, `open` and `writer`.
    """

    name: ClassVar[str]
    """Value of `--format` and row of the support table."""
    summary: ClassVar[str] = ""
    """Help of `--format`, for a format that can be written."""
    contents: ClassVar[str] = ""
    """Noun phrase for messages: a folder holds `contents`."""
    marker_files: ClassVar[str] = ""
    """File names by which `detect` recognizes the format, for messages."""
    read_options: ClassVar[tuple[str, ...]] = ()
    """Fields of `InternEvoOptions` that the format uses."""
    write_options: ClassVar[tuple[str, ...]] = ()
    """Fields of `WriteOptions` that the format uses."""

    @abstractmethod
    def supports(self, family: str, direction: Direction) -> bool:
        """True if a model of this family can be read from, or written in, the format."""

    def detect(self, folder: Path) -> bool:
        """True if a folder holds a checkpoint of this format, by file names.

        A variant that another format detects and opens (other parameter names in the same files) returns
        False.
        """
        return False

    def takes_precedence(self, folder: Path) -> bool:
        """True if marks of other formats in a folder of this format are by-products of the same program."""
        return False

    def open(self, folder: Path, options: ReadOptions) -> "CheckpointReader":
        """Opens a folder that `detect` accepts. Raises `UserError` if the checkpoint is damaged or not
        supported.
        """
        raise UserError(f"{folder}: checkpoints of the format {self.name} cannot be read")

    def writer(self, options: WriteOptions) -> CheckpointWriter:
        """Returns the writer of the format. Raises `UserError` for options that are not valid."""
        raise UserError(f"checkpoints of the format {self.name} cannot be written")

    def families(self, direction: Direction) -> tuple[str, ...]:
        """Families that can be read or written."""
        return tuple(family for family in FAMILIES if self.supports(family, direction))

    def check_family(self, family: str, direction: Direction) -> None:
        """Raises `UserError` if the family is not supported."""
        if not self.supports(family, direction):
            action = "read from" if direction == "read" else "written as"
            choices = ", ".join(self.families(direction))
            raise UserError(f"a model of family {family} cannot be {action} {self.name}, only {choices}")
