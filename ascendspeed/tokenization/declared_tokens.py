"""Tokens that the JSON files beside a vocabulary declare: tokenizer_config.json, special_tokens_map.json and
added_tokens.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import read_json_object

CONTROL_TOKEN_NAMES = ("bos", "eos", "unk", "pad")
ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip")
"""Fields of an added token: match whole words only; strip the whitespace to its left or right."""


@dataclass(frozen=True)
class DeclaredToken:
    """A string that the JSON files beside a vocabulary declare to be one token."""

    number: int | None
    """Token id; None: the id of the vocabulary entry with this string."""
    special: bool
    """True if decoded text leaves it out."""
    flags: Mapping[str, bool]
    """Matching options, see `ADDED_TOKEN_FLAGS`."""


def declared_tokens(folder: Path) -> tuple[dict[str, Any], dict[str, DeclaredToken]]:
    """Reads tokenizer_config.json, special_tokens_map.json and added_tokens.json.

    Returns the merged settings of the first two, and the declared tokens of all three by string. Where the
    files contradict each other, the precedence is that of transformers. Raises `UserError`.
    """
    try:
        return _declared_tokens(folder)
    except (TypeError, AttributeError, ValueError) as error:  # e.g. a list where an object is expected
        raise UserError(
            f"{folder}: the tokenizer's JSON files do not have the structure that transformers writes: "
            f"{error}"
        ) from None


def _declared_tokens(folder: Path) -> tuple[dict[str, Any], dict[str, DeclaredToken]]:
    config = read_optional_json(folder / "tokenizer_config.json")
    names = read_optional_json(folder / "special_tokens_map.json")
    settings = names | config if config.get("added_tokens_decoder") else config | names
    special = _special_strings(settings)
    tokens = {text: DeclaredToken(None, True, {}) for text in special}
    for text, number in read_optional_json(folder / "added_tokens.json").items():
        tokens[text] = DeclaredToken(_token_id(number), text in special, {})
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        text = token_text(token)
        flags = {name: bool(token.get(name)) for name in ADDED_TOKEN_FLAGS}
        tokens[text] = DeclaredToken(_token_id(number), bool(token.get("special")) or text in special, flags)
    return settings, tokens


def _special_strings(settings: Mapping[str, Any]) -> list[str]:
    """Returns the strings of the named control tokens and of the additional special tokens."""
    tokens = [settings.get(f"{name}_token") for name in CONTROL_TOKEN_NAMES]
    tokens = [token for token in tokens if token is not None]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        additional = settings.get(key) or ()
        tokens += additional.values() if isinstance(additional, Mapping) else additional
    return [token_text(token) for token in tokens]


def adds_bos_token(settings: Mapping[str, Any]) -> bool:
    """Returns `add_bos_token` of tokenizer_config.json; true, as for InternLM, where it is missing."""
    return settings.get("add_bos_token") is not False


def token_text(token: Any) -> str:
    """Returns the string of a token that a JSON file holds as a string or as {"content": string}.

    Raises `ValueError`.
    """
    text = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(text, str) or not text:
        raise ValueError(f"{token!r} is not a token")
    return text


def _token_id(number: Any) -> int:
    if not str(number).isdecimal() or int(number) >= 2**31:
        raise ValueError(f"{number!r} is not a token id")
    return int(number)


def read_optional_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file; returns {} if the file does not exist. Raises `UserError`."""
    return read_json_object(path) if path.exists() or path.is_symlink() else {}
