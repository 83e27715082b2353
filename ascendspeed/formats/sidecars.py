"""What lies beside the weights: config.json, generation_config.json and the tokenizer. Code (`*.py`) is never copied."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ascendspeed import tokenizer
from ascendspeed.config import ModelConfig
from ascendspeed.families import FAMILIES
from ascendspeed.formats.files import write_json
from ascendspeed.formats.source import Source
from ascendspeed.inputs import read_json

COPIED = (
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
KEPT = (*TOKEN_IDS, "use_cache")
"""Entries of a config.json that stay when the architecture is named anew."""


def with_tokenizer(source: Source, folder: str | None) -> Source:
    """The source with the tokenizer in `folder` (None: its own), and with that one's token ids when it says none itself.

    A note says so when the source has no tokenizer. Raises `UserError` when `folder` has none, or a damaged one.
    """
    where = Path(folder) if folder is not None else source.beside
    if folder is None and not (where and any((where / name).is_file() for name in tokenizer.FILES)):
        print(f"note: no tokenizer was found{f' at {where}' if where else ''}; none is exported (give --tokenizer DIR)", flush=True)
        return source
    says = any(source.theirs.get(name) is not None for name in TOKEN_IDS)
    if folder is None and says:
        return source  # its tokenizer is copied unread
    found = tokenizer.load(where)
    ids = zip(TOKEN_IDS, (found.bos, found.eos, found.pad), strict=True)
    theirs = source.theirs if says else source.theirs | {name: number for name, number in ids if number is not None}
    return replace(source, beside=where, theirs=theirs)


def write(source: Source, folder: Path, config: ModelConfig, dtype: torch.dtype | None) -> None:
    """config.json of `config`, with the token ids and the type of the source, and its tokenizer and generation settings."""
    theirs = _config_json(source, config)
    theirs["torch_dtype"] = str(dtype or _main_dtype(source)).removeprefix("torch.")
    write_json(folder / "config.json", theirs)
    for name in COPIED:
        if source.beside and (source.beside / name).is_file():
            shutil.copyfile(source.beside / name, folder / name)
    ids = {name: theirs[name] for name in TOKEN_IDS if theirs.get(name) is not None}
    if ids and not (folder / "generation_config.json").exists():
        write_json(folder / "generation_config.json", ids)
    if source.beside and (source.beside / "tokenizer_config.json").is_file():
        write_json(folder / "tokenizer_config.json", _own_code_dropped(read_json(source.beside / "tokenizer_config.json")))


def _config_json(source: Source, config: ModelConfig) -> dict[str, Any]:
    """The source's own where it says the same; else ours, with what the source knows beyond it."""
    family = FAMILIES[config.family]
    if source.theirs.get("model_type") == family.name and family.read_config(source.theirs) == config:
        return {name: value for name, value in source.theirs.items() if name not in ("auto_map", "dtype")}
    return family.write_config(config) | {name: source.theirs[name] for name in KEPT if name in source.theirs}


def _main_dtype(source: Source) -> torch.dtype:
    kinds = list(source.dtypes.values())
    return max(kinds, key=kinds.count)


def _own_code_dropped(tokenizer_config: Any) -> Any:
    """Without what would make `AutoTokenizer` ask for the repository's own code; tokenizer.model or tokenizer.json say it all."""
    if isinstance(tokenizer_config, dict) and tokenizer_config.pop("auto_map", None) is not None:
        tokenizer_config.pop("tokenizer_class", None)
    return tokenizer_config
