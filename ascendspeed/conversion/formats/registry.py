"""Registry of the checkpoint formats: detection, opening, and the support table of the documentation. Free of
torch.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ascendspeed.checkpoint.paths import describe_missing
from ascendspeed.conversion.formats.base import CheckpointFormat, ReadOptions
from ascendspeed.conversion.formats.gguf import GgufFormat
from ascendspeed.conversion.formats.huggingface import HuggingFaceFormat, LlamaFormat
from ascendspeed.conversion.formats.internevo import InternEvoFormat
from ascendspeed.conversion.formats.megatron import DeepSpeedFormat, LegacyRankFileFormat, MegatronFormat
from ascendspeed.conversion.formats.mindformers import MindFormersFormat
from ascendspeed.conversion.formats.peft_settings import CONFIG as ADAPTER_CONFIG
from ascendspeed.conversion.formats.training_checkpoint import TrainingCheckpointFormat
from ascendspeed.models.families import FAMILIES
from ascendspeed.models.families.internevo_names import InternEvoOptions
from ascendspeed.tokenization.chat.template_files import recorded_template
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import read_json_object

if TYPE_CHECKING:
    from ascendspeed.checkpoint.discovery import Readers
    from ascendspeed.conversion.checkpoint_reader import CheckpointReader

FORMATS: tuple[CheckpointFormat, ...] = (
    HuggingFaceFormat(),
    LlamaFormat(),
    MegatronFormat(),
    DeepSpeedFormat(),
    LegacyRankFileFormat(),
    MindFormersFormat(),
    GgufFormat(),
    InternEvoFormat(),
    TrainingCheckpointFormat(),
)
"""All formats, in the order of the support table. The choices of `--format` and the round-trip tests come
from here.
"""


def format_named(name: str) -> CheckpointFormat:
    """Returns the format of a `--format` value."""
    return next(form for form in FORMATS if form.name == name)


def writable_formats() -> tuple[CheckpointFormat, ...]:
    """Formats that at least one family can be written in."""
    return tuple(form for form in FORMATS if form.families("write"))


def detect_formats(folder: Path) -> list[CheckpointFormat]:
    """Formats that a folder holds a checkpoint of: one, unless the folder is empty of checkpoints or
    ambiguous.
    """
    detected = [form for form in FORMATS if form.detect(folder)]
    preferred = [form for form in detected if form.takes_precedence(folder)]
    return preferred[-1:] or detected


def detect_format(folder: Path) -> CheckpointFormat:
    """Format of the checkpoint in a folder. Raises `UserError` if there is none, or several."""
    if not folder.is_dir():
        raise UserError(describe_missing(folder))
    detected = detect_formats(folder)
    if len(detected) > 1:
        contents = " and ".join(form.contents for form in detected)
        raise UserError(f"{folder} holds {contents}: move one of them to a folder of its own")
    if not detected:
        refuse_adapters(folder)
        known = ", ".join(f"{form.contents} ({form.marker_files})" for form in FORMATS if form.marker_files)
        entries = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"{folder} holds no checkpoint: looked for {known}; found {entries}")
    return detected[0]


def open_reader(
    path: str | Path,
    config: str | Path | None = None,
    internevo: InternEvoOptions | None = None,
    readers: "Readers | None" = None,
) -> "CheckpointReader":
    """Detects the checkpoint in a folder and opens it.

    `config`: folder with its config.json and tokenizer; None: the same folder. `internevo`: facts that the
    files of an InternEvo training folder may lack. `readers`: ranks that call this together and share the
    verification of a training checkpoint; None: this process alone. Raises `UserError` if the folder holds no
    checkpoint, several, or a damaged one.
    """
    folder = Path(path)
    form = detect_format(folder)
    config_dir = folder if config is None else Path(config)
    options = ReadOptions(config_dir, internevo or InternEvoOptions(), readers, open_reader)
    reader = form.open(folder, options)
    from ascendspeed.conversion import model_card  # here, so that --help needs no torch

    template, notes = reader.chat_template, reader.training_notes
    if template is None and reader.assets_dir is not None:
        template = recorded_template(reader.assets_dir)
    if notes is None:
        notes = model_card.recorded_section(folder)
    return replace(reader, chat_template=template, training_notes=notes)


def refuse_adapters(folder: Path) -> None:
    """Raises `UserError` for a folder of peft adapters without the weights of a model."""
    if not (folder / ADAPTER_CONFIG).is_file() or detect_formats(folder):
        return
    base = read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "BASE"
    raise UserError(
        f"{folder} holds adapters of peft ({ADAPTER_CONFIG}), not a model: merge them into their base "
        f"weights by tools/lora/merge_lora.py --base {base} --adapter {folder} --save DIR, and name DIR; "
        f"training continues them by --load {base} --lora-load {folder}"
    )


def support_table() -> list[str]:
    """Lines of the table of formats and families, in Markdown. R: read, W: written."""
    lines = [f"| format | {' | '.join(FAMILIES)} |", "|---" * (1 + len(FAMILIES)) + "|"]
    for form in FORMATS:
        cells = [_cell(form, family) for family in FAMILIES]
        lines.append(f"| `{form.name}` | {' | '.join(cells)} |")
    return lines


def _cell(form: CheckpointFormat, family: str) -> str:
    marks = [mark for mark, direction in (("R", "read"), ("W", "write")) if form.supports(family, direction)]
    return " ".join(marks) or "–"
