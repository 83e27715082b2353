"""Files beside the weights: config.json, generation settings, the tokenizer. Code is copied on request and
never run.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion import chat_assets
from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.conversion.output_files import write_json
from ascendspeed.conversion.token_ids import TOKEN_IDS, reconcile, without_placeholders
from ascendspeed.conversion.tokenizer import export
from ascendspeed.models.families import FAMILIES
from ascendspeed.tokenization import tokenizer
from ascendspeed.tokenization.chat import choose_template
from ascendspeed.tokenization.declared_tokens import read_optional_json
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import checked_file, read_json_object
from ascendspeed.utils.text import shorten_list

logger = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"
COPIED_TABLES = (GENERATION_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json")
"""JSON tables to copy; each must parse."""
COPIED_FILES = ("tokenizer.model", "tokenizer.json", "merges.txt", "chat_template.jinja")
KEPT_ENTRIES = (*TOKEN_IDS, "use_cache")
"""Entries of a config.json that are kept when the architecture is written anew."""
TOKENIZER_CLASSES = {"PreTrainedTokenizer", "TokenizersBackend"} | {
    family.tokenizer_class for family in FAMILIES.values() if family.tokenizer_class
}
"""Tokenizer classes of transformers that an export may name; each may end in Fast."""


def with_tokenizer(reader: CheckpointReader, folder: str | None) -> CheckpointReader:
    """Returns the reader with the tokenizer in `folder` (None: its own), and with its token ids if
    config.json has none.

    Prints a note if the checkpoint has no tokenizer. Raises `UserError` if `folder` has none, or the
    tokenizer is damaged or too large for the model.
    """
    assets_dir = Path(folder) if folder is not None else reader.assets_dir
    if folder is None and not _has_tokenizer(assets_dir):
        place = f" at {assets_dir}" if assets_dir else ""
        logger.info(f"note: no tokenizer was found{place}; none is exported (give --tokenizer DIR)")
        return reader
    loaded = _load_tokenizer(assets_dir, reader.config)
    config_json = reader.config_json
    if all(config_json.get(name) is None for name in TOKEN_IDS):
        ids = zip(TOKEN_IDS, (loaded.bos, loaded.eos, loaded.pad), strict=True)
        config_json = config_json | {
            name: token for name, token in ids if token is not None and token < reader.config.vocab_size
        }
    return replace(reader, assets_dir=assets_dir, config_json=config_json)


def check(reader: CheckpointReader) -> None:
    """Raises `UserError` if a file beside the weights is damaged or belongs to another model; called before
    the long work. Prints a note for every token id that will be corrected.
    """
    folder = reader.assets_dir
    if _has_tokenizer(folder):
        loaded = _load_tokenizer(folder, reader.config)
        if reader.chat_template:
            choose_template(loaded, reader.chat_template)
        beyond = [text for text, number in loaded.added_tokens.items() if number >= reader.config.vocab_size]
        if beyond:
            logger.info(
                f"note: the tokenizer in {folder} adds {shorten_list(beyond)}, beyond the "
                f"{reader.config.vocab_size} ids of the model, which cannot read such a token"
            )
        if all((folder / name).exists() for name in tokenizer.TOKENIZER_CLASSES):
            export.check(folder)
    for path in _files_to_copy(reader):
        checked_file(path)
        if path.name in COPIED_TABLES:
            read_json_object(path)
    for origin, table in _token_tables(reader).items():
        _check_token_ids(origin, without_placeholders(origin, table)[0], reader.config)
        for note in _corrected_table(reader, origin, table)[1]:
            logger.info(f"note: {note}")


def _token_tables(reader: CheckpointReader) -> dict[str, Mapping[str, Any]]:
    """Tables with token ids by their origin for messages: config.json, and generation_config.json if there is
    one."""
    tables: dict[str, Mapping[str, Any]] = {
        f"{reader.path}, by its config.json or its tokenizer": reader.config_json
    }
    generation = reader.assets_dir / GENERATION_CONFIG if reader.assets_dir else None
    if generation and (generation.exists() or generation.is_symlink()):
        tables[str(generation)] = read_json_object(generation)
    return tables


def _corrected_table(
    reader: CheckpointReader, origin: str, table: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Returns the table as it is written, and a note for each change.

    The tokenizer's ids replace a -1 too: without an EOS no program would end an answer.
    """
    notes = []
    if _has_tokenizer(reader.assets_dir):
        loaded = tokenizer.load(reader.assets_dir)
        table, notes = reconcile(origin, table, loaded, reader.config.vocab_size)
    known, dropped = without_placeholders(origin, table)
    return known, notes + dropped


def _corrected(reader: CheckpointReader) -> list[dict[str, Any]]:
    """The tables of `_token_tables` as they are written."""
    return [_corrected_table(reader, *item)[0] for item in _token_tables(reader).items()]


def _check_token_ids(origin: str, table: Mapping[str, Any], config: ModelConfig) -> None:
    """Raises `UserError` for a token id, or one in a list of ids, that the model has no row for."""
    for name in TOKEN_IDS:
        value = table.get(name)
        if value is None:
            continue
        for token in value if isinstance(value, list) else [value]:
            if type(token) is not int or not 0 <= token < config.vocab_size:
                raise UserError(
                    f"{origin}: {name} = {value!r} is no token of a vocabulary of {config.vocab_size} "
                    f"(ids 0 to {config.vocab_size - 1}): correct the entry or remove it"
                )


def check_code(reader: CheckpointReader, config: ModelConfig) -> None:
    """Raises `UserError` if the checkpoint has no code to copy, or that of another family than `config`'s."""
    folder = reader.assets_dir
    if not folder or not any(folder.glob("*.py")):
        raise UserError(f"{folder or reader.path} has no *.py: leave --copy-code out")
    if reader.config_json.get("model_type") != FAMILIES[config.family].name:
        raise UserError(
            f"the code in {folder} is not that of a model of family {config.family}: leave --copy-code out"
        )
    for path in _files_to_copy(reader, copy_code=True):
        checked_file(path)


def write(
    reader: CheckpointReader,
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype | None,
    for_transformers: bool = False,
    copy_code: bool = False,
) -> None:
    """Writes config.json of `config`, with the token ids and the type of the tensors, the tokenizer and the
    generation settings.

    `for_transformers`: also writes a tokenizer.json if that is possible. `copy_code`: copies the `*.py` files
    and keeps the entries that refer to them, which only `trust_remote_code` follows.
    """
    own_config, *corrected = _corrected(reader)
    config_json = _config_json(replace(reader, config_json=own_config), config, copy_code)
    config_json["torch_dtype"] = str(dtype or _most_common_dtype(reader)).removeprefix("torch.")
    write_json(folder / "config.json", config_json)
    for path in _files_to_copy(reader, copy_code):
        shutil.copyfile(checked_file(path), folder / path.name)
    token_ids = {name: config_json[name] for name in TOKEN_IDS if config_json.get(name) is not None}
    generation = corrected[0] if corrected else token_ids
    if generation and generation != read_optional_json(folder / GENERATION_CONFIG):
        write_json(folder / GENERATION_CONFIG, generation)
    _write_tokenizer_config(reader, folder, copy_code)
    lacks_json = (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists()
    if for_transformers and lacks_json:
        reason = export.write(folder)
        if reason:
            logger.info(
                f"note: no tokenizer.json: {reason}; stock transformers may not load the tokenizer as it "
                f"should"
            )
    if reader.chat_template and _has_tokenizer(folder):
        chat_assets.write(folder, reader.chat_template, reader.assets_dir)


def _has_tokenizer(folder: Path | None) -> bool:
    return folder is not None and any((folder / name).exists() for name in tokenizer.TOKENIZER_CLASSES)


def _load_tokenizer(folder: Path, config: ModelConfig) -> tokenizer.Tokenizer:
    """Reads every tokenizer file of the folder, so that none is copied unread. Raises `UserError`."""
    for name, tokenizer_class in tokenizer.TOKENIZER_CLASSES.items():
        if (folder / name).exists():
            size = tokenizer_class(folder).base_vocab_size
            if size > config.vocab_size:
                raise UserError(
                    f"{folder / name} has {size} pieces, but the vocabulary of the model "
                    f"{config.vocab_size}: "
                    "it is another model's (give --tokenizer DIR)"
                )
    return tokenizer.load(folder)


def _files_to_copy(reader: CheckpointReader, copy_code: bool = False) -> Iterator[Path]:
    """Files that are copied unchanged."""
    folder = reader.assets_dir
    if folder:
        paths = [folder / name for name in (*COPIED_TABLES, *COPIED_FILES)]
        if copy_code:
            paths += sorted(folder.glob("*.py"))
        yield from (path for path in paths if path.exists() or path.is_symlink())


def _config_json(reader: CheckpointReader, config: ModelConfig, copy_code: bool) -> dict[str, Any]:
    """The checkpoint's own config.json if it describes `config`; else a new one with the entries that the
    architecture lacks.
    """
    family = FAMILIES[config.family]
    own = reader.config_json
    if own.get("model_type") == family.name and family.read_config(own) == config:
        dropped = ("dtype",) if copy_code else ("dtype", "auto_map")
        return {name: value for name, value in own.items() if name not in dropped}
    kept = (*KEPT_ENTRIES, "auto_map") if copy_code else KEPT_ENTRIES
    return family.write_config(config) | {name: own[name] for name in kept if name in own}


def _most_common_dtype(reader: CheckpointReader) -> torch.dtype:
    dtypes = list(reader.dtypes.values())
    return max(dtypes, key=dtypes.count)


def _write_tokenizer_config(reader: CheckpointReader, folder: Path, copy_code: bool) -> None:
    """Writes the checkpoint's own file, with a class that stock transformers have and without references to
    code.
    """
    values = read_optional_json(reader.assets_dir / "tokenizer_config.json") if reader.assets_dir else {}
    has_own_code = values.get("auto_map") is not None
    if not copy_code:
        values.pop("auto_map", None)
    if "tokenizer_class" in values:
        name = str(values["tokenizer_class"]).removesuffix("Fast")
        if has_own_code or name not in TOKENIZER_CLASSES:
            values["tokenizer_class"] = export.GENERIC_CLASS
    if values:
        write_json(folder / "tokenizer_config.json", values)
