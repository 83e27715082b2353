"""Which tokens end an answer: those of the tokenizer, of generation_config.json and of the chat template together."""

from collections.abc import Iterable
from pathlib import Path

from ascendspeed.tokenization.tokenizer import Tokenizer
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import read_table

FILE = "generation_config.json"


def stop_token_ids(
    tokenizer: Tokenizer, folders: Iterable[str | Path], template: Iterable[int] = ()
) -> tuple[int, ...]:
    """Ids, sorted. `folders`: where a generation_config.json may lie; `template`: those of the chat format. Raises `UserError`."""
    found = {*template, *(number for folder in folders for number in generation_config_stops(Path(folder)))}
    return tuple(sorted(found | ({tokenizer.eos} if tokenizer.eos is not None else set())))


def generation_config_stops(folder: Path) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json: a number, a list, or nothing. Raises `UserError` for anything else."""
    path = folder / FILE
    if not path.is_file():
        return ()
    said = read_table(path).get("eos_token_id")
    numbers = said if isinstance(said, list) else [] if said is None else [said]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise UserError(f"{path}: eos_token_id is {said!r}, not an id or a list of ids")
    return tuple(numbers)
