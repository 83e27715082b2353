"""Stop tokens of an answer: those of the tokenizer, of generation_config.json and of the chat template
together."""

from collections.abc import Iterable
from pathlib import Path

from ascendspeed.tokenization.tokenizer import Tokenizer
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import read_json_object

FILE = "generation_config.json"


def stop_token_ids(
    tokenizer: Tokenizer, folders: Iterable[str | Path], template: Iterable[int] = ()
) -> tuple[int, ...]:
    """Returns the ids that end an answer, sorted. Raises `UserError`.

    `folders`: directories that may hold a generation_config.json; `template`: stop ids of the chat format.
    """
    ids = set(template)
    for folder in folders:
        ids.update(generation_config_stops(Path(folder)))
    if tokenizer.eos is not None:
        ids.add(tokenizer.eos)
    return tuple(sorted(ids))


def generation_config_stops(folder: Path) -> tuple[int, ...]:
    """Returns `eos_token_id` of generation_config.json (an id, a list, or missing; -1 means none).

    Raises `UserError` for other values.
    """
    path = folder / FILE
    if not path.is_file():
        return ()
    value = read_json_object(path).get("eos_token_id")
    if value in (None, -1):
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(number) is int and number >= 0 for number in ids):
        raise UserError(f"{path}: eos_token_id is {value!r}, not an id or a list of ids")
    return tuple(ids)
