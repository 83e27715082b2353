"""What lies beside the weights: config.json, generation settings, the tokenizer. Code is copied when asked for, and never run."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.conversion.output_files import write_json
from ascendspeed.conversion.tokenizer import export
from ascendspeed.models.families import FAMILIES
from ascendspeed.tokenization import tokenizer
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import checked_file, read_json_object

logger = logging.getLogger(__name__)

GENERATION = "generation_config.json"
TABLES = (GENERATION, "special_tokens_map.json", "added_tokens.json", "vocab.json")
"""Copied when they can be read as what they are."""
COPIED = ("tokenizer.model", "tokenizer.json", "merges.txt", "chat_template.jinja")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
KEPT = (*TOKEN_IDS, "use_cache")
"""Entries of a config.json that stay when the architecture is named anew."""
CLASSES = {"PreTrainedTokenizer", "TokenizersBackend"} | {
    family.tokenizer_class for family in FAMILIES.values() if family.tokenizer_class
}
"""Tokenizer classes of transformers that an export may name; each may end in Fast."""


def with_tokenizer(source: CheckpointReader, folder: str | None) -> CheckpointReader:
    """The source with the tokenizer in `folder` (None: its own), and with that one's token ids when it says none itself.

    A note says so when the source has no tokenizer. Raises `UserError` when `folder` has none, or the tokenizer is damaged or too
    large for the model.
    """
    where = Path(folder) if folder is not None else source.assets_dir
    if folder is None and not _has_tokenizer(where):
        logger.info(
            f"note: no tokenizer was found{f' at {where}' if where else ''}; none is exported (give --tokenizer DIR)"
        )
        return source
    found = _load(where, source.config)
    says = any(source.config_json.get(name) is not None for name in TOKEN_IDS)
    ids = zip(TOKEN_IDS, (found.bos, found.eos, found.pad), strict=True)
    theirs = (
        source.config_json
        if says
        else source.config_json | {name: number for name, number in ids if number is not None}
    )
    return replace(source, assets_dir=where, config_json=theirs)


def check(source: CheckpointReader) -> None:
    """Raises `UserError` when what lies beside the weights is damaged or another model's: to be asked before hours of writing."""
    if _has_tokenizer(source.assets_dir):
        _load(source.assets_dir, source.config)
        if all((source.assets_dir / name).exists() for name in tokenizer.TOKENIZER_CLASSES):
            export.check(source.assets_dir)
    _check_ids(f"{source.path}, by its config.json or its tokenizer", source.config_json, source.config)
    for path in _neighbours(source):
        checked_file(path)
        held = read_json_object(path) if path.name in TABLES else {}
        if path.name == GENERATION:
            _check_ids(str(path), held, source.config)


def _check_ids(where: str, said: Mapping[str, Any], config: ModelConfig) -> None:
    """Raises `UserError` for a token that the model has no row for; of several in a list each counts."""
    for name in TOKEN_IDS:
        value = said.get(name)
        for number in value if isinstance(value, list) else [value]:
            if value is not None and (type(number) is not int or not 0 <= number < config.vocab_size):
                raise UserError(
                    f"{where}: {name} = {value!r} is no token of a vocabulary of {config.vocab_size}"
                )


def check_code(source: CheckpointReader, config: ModelConfig) -> None:
    """Raises `UserError` when the source has no code to copy, or has that of another family than `config`'s."""
    if not source.assets_dir or not any(source.assets_dir.glob("*.py")):
        raise UserError(f"{source.assets_dir or source.path} has no *.py: leave --copy-code out")
    if source.config_json.get("model_type") != FAMILIES[config.family].name:
        raise UserError(
            f"the code in {source.assets_dir} is not that of a model of family {config.family}: leave --copy-code out"
        )
    for path in _neighbours(source, copy_code=True):
        checked_file(path)


def write(
    source: CheckpointReader,
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype | None,
    for_transformers: bool = False,
    copy_code: bool = False,
) -> None:
    """config.json of `config`, with the token ids and the type of the source, and its tokenizer and generation settings.

    `for_transformers`: with a tokenizer.json if that can be made. `copy_code`: with the source's `*.py`, and with the entries that
    lead to them, which only `trust_remote_code` follows.
    """
    theirs = _config_json(source, config, copy_code)
    theirs["torch_dtype"] = str(dtype or _main_dtype(source)).removeprefix("torch.")
    write_json(folder / "config.json", theirs)
    for path in _neighbours(source, copy_code):
        shutil.copyfile(checked_file(path), folder / path.name)
    ids = {name: theirs[name] for name in TOKEN_IDS if theirs.get(name) is not None}
    if ids and not (folder / GENERATION).exists():
        write_json(folder / "generation_config.json", ids)
    _write_tokenizer_config(source, folder, copy_code)
    if (
        for_transformers
        and (folder / "tokenizer.model").exists()
        and not (folder / "tokenizer.json").exists()
    ):
        why_not = export.write(folder)
        if why_not:
            logger.info(
                f"note: no tokenizer.json: {why_not}; stock transformers may not load the tokenizer as it should"
            )


def _has_tokenizer(folder: Path | None) -> bool:
    return folder is not None and any((folder / name).exists() for name in tokenizer.TOKENIZER_CLASSES)


def _load(folder: Path, config: ModelConfig) -> tokenizer.Tokenizer:
    """Reads every tokenizer of the folder: none is copied unread. Raises `UserError`."""
    for name, kind in tokenizer.TOKENIZER_CLASSES.items():
        if (folder / name).exists():
            found = kind(folder)
            if found.base_vocab_size > config.vocab_size:
                raise UserError(
                    f"{folder / name} has {found.base_vocab_size} pieces, but the vocabulary of the model {config.vocab_size}: "
                    "it is another model's (give --tokenizer DIR)"
                )
    return tokenizer.load(folder)


def _neighbours(source: CheckpointReader, copy_code: bool = False) -> Iterator[Path]:
    """The files to copy as they are."""
    if source.assets_dir:
        code = sorted(source.assets_dir.glob("*.py")) if copy_code else []
        named = (source.assets_dir / name for name in (*TABLES, *COPIED))
        yield from (path for path in (*named, *code) if path.exists() or path.is_symlink())


def _config_json(source: CheckpointReader, config: ModelConfig, copy_code: bool) -> dict[str, Any]:
    """The source's own where it says the same; else ours, with what the source knows beyond it."""
    family = FAMILIES[config.family]
    if (
        source.config_json.get("model_type") == family.name
        and family.read_config(source.config_json) == config
    ):
        dropped = ("dtype",) if copy_code else ("dtype", "auto_map")
        return {name: value for name, value in source.config_json.items() if name not in dropped}
    kept = (*KEPT, "auto_map") if copy_code else KEPT
    return family.write_config(config) | {
        name: source.config_json[name] for name in kept if name in source.config_json
    }


def _main_dtype(source: CheckpointReader) -> torch.dtype:
    kinds = list(source.dtypes.values())
    return max(kinds, key=kinds.count)


def _write_tokenizer_config(source: CheckpointReader, folder: Path, copy_code: bool) -> None:
    """The source's own, with a class that stock transformers have, and without what leads to code that is not there."""
    values = (
        tokenizer.read_optional_json(source.assets_dir / "tokenizer_config.json") if source.assets_dir else {}
    )
    own_code = values.get("auto_map") is not None
    if not copy_code:
        values.pop("auto_map", None)
    if "tokenizer_class" in values and (
        own_code or str(values["tokenizer_class"]).removesuffix("Fast") not in CLASSES
    ):
        values["tokenizer_class"] = export.GENERIC
    if values:
        write_json(folder / "tokenizer_config.json", values)
