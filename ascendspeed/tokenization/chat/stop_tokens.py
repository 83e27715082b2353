"""Stop tokens of an answer: those of the tokenizer, of generation_config.json (without it, of config.json)
and of the chat template together."""

import re
from collections.abc import Iterable
from pathlib import Path

from ascendspeed.tokenization.chat.templates import TEMPLATES, first_token_id
from ascendspeed.tokenization.tokenizer import Tokenizer
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import read_json_object

FILES = ("generation_config.json", "config.json")
"""Files with `eos_token_id`; transformers asks the second if the first does not exist."""
TOKEN_NAME = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
"""Strings inside a text that may be the name of a control token: `<|im_end|>`, `[UNUSED_TOKEN_145]`."""


def stop_token_ids(
    tokenizer: Tokenizer, folders: Iterable[str | Path], template: Iterable[int] = ()
) -> tuple[int, ...]:
    """Returns the ids that end an answer, sorted. Raises `UserError`.

    `folders`: directories that may hold a generation_config.json or config.json; `template`: stop ids of the
    chat format.
    """
    ids = set(template)
    for folder in folders:
        ids.update(generation_config_stops(Path(folder)))
    if tokenizer.eos is not None:
        ids.add(tokenizer.eos)
    return tuple(sorted(ids))


def generation_config_stops(folder: Path) -> tuple[int, ...]:
    """Returns `eos_token_id` of generation_config.json, or of config.json if there is no such file (an id, a
    list, or missing; -1 means none).

    Raises `UserError` for other values.
    """
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        return ()
    value = read_json_object(path).get("eos_token_id")
    if value in (None, -1):
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(number) is int and number >= 0 for number in ids):
        raise UserError(f"{path}: eos_token_id is {value!r}, not an id or a list of ids")
    return tuple(ids)


def control_token_ids(tokenizer: Tokenizer, stops: Iterable[str], flag: str = "--stop") -> tuple[int, ...]:
    """Returns the ids of the control tokens that stop strings name, sorted.

    Decoded text leaves control tokens out, so `<|im_end|>` is never found in it. Raises `UserError` for a
    string of a control token and other text.
    """
    ids = set()
    for stop in stops:
        if (number := _control_token_id(tokenizer, stop)) is not None:
            ids.add(number)
            continue
        for name in TOKEN_NAME.findall(stop):
            if _control_token_id(tokenizer, name) is not None:
                raise UserError(
                    f"{flag} {stop!r} holds the control token {name} and other text; an answer ends at the "
                    f"token alone: {flag} {name!r}"
                )
    return tuple(sorted(ids))


def _control_token_id(tokenizer: Tokenizer, name: str) -> int | None:
    """Returns the id of a token that decoded text leaves out, or None.

    A name of a chat template denotes the token that the tokenizer has in its place.
    """
    number = tokenizer.token_to_id(name)
    if number is not None:
        return number if not tokenizer.decode([number]) and name.strip("\u2581 ") else None
    for template in TEMPLATES.values():
        for strings in template.controls.values():
            if name == strings[0] and (number := first_token_id(tokenizer, strings)) is not None:
                return number
    return None
