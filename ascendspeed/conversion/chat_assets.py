"""Chat template and stop tokens of an exported model, in the files that transformers and others read."""

import logging
from dataclasses import replace
from pathlib import Path

from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.conversion.output_files import write_json
from ascendspeed.conversion.tokenizer.export import ESCAPE_REMOVAL
from ascendspeed.tokenization import tokenizer
from ascendspeed.tokenization.chat import (
    TEMPLATES,
    ChatFormat,
    generation_config_stops,
    stop_token_ids,
    to_jinja,
)
from ascendspeed.tokenization.chat.template_files import TEMPLATE_FILE, TOKENIZER_CONFIG, own_template
from ascendspeed.tokenization.declared_tokens import read_optional_json
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import checked_file

logger = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"


def with_template(reader: CheckpointReader, name: str | None) -> CheckpointReader:
    """Returns the reader with the chat template of --chat-template; None: that of the checkpoint.

    Raises `UserError` for a name that does not exist, and for a checkpoint that was trained with another one.
    """
    if name is None:
        return reader
    if name not in TEMPLATES:
        raise UserError(f"--chat-template {name} does not exist; choose from {', '.join(TEMPLATES)}")
    if reader.chat_template not in (None, name):
        raise UserError(
            f"--chat-template {name}, but {reader.path} was trained with {reader.chat_template}; leave it out"
        )
    return replace(reader, chat_template=name)


def own_template_text(folder: Path | None) -> str | None:
    """Chat template in a folder that is the model's own; None: it has none, or several."""
    own = own_template(folder)
    if own == TEMPLATE_FILE:
        return checked_file(folder / own).read_text(encoding="utf-8")
    is_file = own is not None and (folder / own).is_file()
    value = read_optional_json(folder / own).get("chat_template") if is_file else None
    return value if isinstance(value, str) else None


def stops_beside(folder: Path | None) -> list[int]:
    """Stop tokens of generation_config.json, or without it of config.json, except the tokenizer's own end."""
    if folder is None:
        return []
    return [number for number in generation_config_stops(folder) if number != tokenizer.load(folder).eos]


def write(folder: Path, name: str, source: Path | None) -> None:
    """Writes the chat template `name` of an exported model, and adds the end of a turn to its stop tokens.

    `source`: folder of the model's own files; a template there is left out with a note, because the model was
    trained with `name`. Raises `UserError` if the tokenizer in `folder` lacks a control token.
    """
    chat_format = ChatFormat(tokenizer.load(folder), name)
    own = own_template(source)
    if own:
        logger.info(
            f"note: the chat template in {source / own} is left out: the weights were trained with {name}, "
            f"which is in {TEMPLATE_FILE}"
        )
    settings = read_optional_json(folder / TOKENIZER_CONFIG)
    if settings.pop("chat_template", None) is not None:
        write_json(folder / TOKENIZER_CONFIG, settings)
    text = to_jinja(chat_format, control_strings(folder))
    (folder / TEMPLATE_FILE).write_text(text, encoding="utf-8")
    generation = read_optional_json(folder / GENERATION_CONFIG)
    stops = list(stop_token_ids(chat_format.tokenizer, [folder], chat_format.stop_ids))
    write_json(folder / GENERATION_CONFIG, generation | {"eos_token_id": stops})


def control_strings(folder: Path) -> list[str]:
    """Strings of control tokens to escape in messages; none if the tokenizer.json is not this project's."""
    values = read_optional_json(folder / "tokenizer.json")
    if values.get("pre_tokenizer") != ESCAPE_REMOVAL:
        return []
    return [token["content"] for token in values["added_tokens"] if token["special"]]


def write_for_adapter(folder: Path, name: str, tokenizer_dir: str) -> None:
    """Writes the chat template beside adapters. Prints a note if their tokenizer is no longer there."""
    try:
        chat_format = ChatFormat(tokenizer.load(tokenizer_dir), name)
    except UserError as error:
        logger.info(f"note: no {TEMPLATE_FILE} (the adapters were trained with {name}): {error}")
        return
    (folder / TEMPLATE_FILE).write_text(to_jinja(chat_format), encoding="utf-8")
