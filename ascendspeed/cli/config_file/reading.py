"""Reads the file of `--config` and gives its settings as words of a command line; writes `--dump-config`."""

import contextlib
import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from ascendspeed.cli import parser
from ascendspeed.cli.config_file import internevo, literal_python, mindformers, plain_yaml
from ascendspeed.models.families import PRESETS
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import checked_text, read_json_object

CONFIG = "--config"
DUMP = "--dump-config"
HINT = "--config FILE reads flags from a file, --dump-config prints them: see docs/intern.md."
LARGEST = 1 << 20
"""Bytes of the largest file."""
RECORDS = ("inputs",)
"""Sections of run.json that describe a run instead of configuring it."""
RIVALS = [
    {"train_iters", "train_epochs", "train_samples"},
    {"lr_warmup_iters", "lr_warmup_fraction"},
    {"rampup_batch_size", "rampup_batch_size_iters"},
]
"""Fields of which only one may be set: one on the command line replaces the others of the file."""
DERIVED = {"train_epochs": "train_iters", "train_samples": "train_iters", "mock_data": "data_path"}
"""Fields of a resolved run -> the field that follows from them."""


@dataclass(frozen=True)
class ConfigFlags:
    """Values of --config and --dump-config, and the other words."""

    words: tuple[str, ...]
    """The command line without the two flags."""
    path: str | None = None
    dumps: bool = False


def take(words: Sequence[str]) -> ConfigFlags:
    """Separates --config and --dump-config from the other words. Raises UserError without a path."""
    rest: list[str] = []
    queue = list(words)
    path = None
    dumps = False
    while queue:
        word = queue.pop(0)
        flag, equals, value = word.partition("=")
        if parser.normalized(flag) == CONFIG:
            if path is not None:
                raise UserError("--config is given twice; merge the files")
            path = value if equals else (queue.pop(0) if queue else "")
            if not path or path.startswith("--"):
                raise UserError("--config needs a file: .yaml, .json, or InternEvo's .py")
        elif parser.normalized(word) == DUMP:
            dumps = True
        else:
            rest.append(word)
    return ConfigFlags(tuple(rest), path, dumps)


def words_of(cls: type, path: str, typed: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Returns the words that set what a file sets and the command line (`typed`: its fields and their first
    words) does not; and notes.

    Raises UserError for an unreadable file, and for keys that the command does not have.
    """
    fields, notes = _fields_of(cls, path, typed)
    group = dict(_groups(cls)).get("model")
    model_fields = {field.name for field in dataclasses.fields(group)} if group else set()
    if "model" in typed:
        dropped = model_fields & fields.keys()
        notes += [f"{path}: --model replaces the architecture of the file"] if dropped else []
        fields = {name: value for name, value in fields.items() if name not in model_fields}
    family = fields.pop("family", None)
    if family is not None and fields.get("model") is None:
        fields["model"] = _preset_of(family, path)
    flags = {field: flag for flag, field in reversed(parser.spellings(cls, pairs=False).items())}
    appended, switches = _appended_fields(cls), _switches(cls)
    words: list[str] = []
    for name, value in fields.items():
        rivals = set().union(*(group for group in RIVALS if name in group))
        if name not in typed and not rivals & typed.keys() and name in flags:
            _check_value(flags[name], value, path, is_switch=name in switches)
            new = _words(flags[name], value, in_model=name in model_fields)
            repeated = isinstance(value, list) and name in appended
            words += [word for item in new[1:] for word in (new[0], item)] if repeated else new
    return words, notes


def _preset_of(family: Any, path: str) -> str:
    """Name of a preset of a family. Raises UserError for a family that does not exist."""
    names = [name for name, model in PRESETS.items() if model.family == family]
    if not names:
        known = dict.fromkeys(model.family for model in PRESETS.values())
        raise UserError(f"{path}: family = {family!r:.80} does not exist; choose from {', '.join(known)}")
    return names[0]


def dump(values: Mapping[str, Any], written: Sequence[str] = ()) -> typing.NoReturn:
    """Prints settings as YAML and exits with code 0. `written`: sections to print; empty: all."""
    import yaml

    chosen = {name: value for name, value in values.items() if not written or name in written}
    print(yaml.safe_dump(_plain(chosen), sort_keys=False, allow_unicode=True), end="")
    raise SystemExit(0)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _fields_of(cls: type, path: str, typed: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Reads a file and returns its fields and notes."""
    file = checked_text(path)
    if file.stat().st_size > LARGEST:
        raise UserError(f"{path}: larger than {LARGEST >> 20} MiB, which no configuration is")
    suffix = file.suffix.lower()
    is_training = any(name == "optim" for name, _ in _groups(cls))
    if suffix == ".py":
        if not is_training:
            raise UserError(f"{path}: InternEvo's configurations are for training")
        assignments = literal_python.read_assignments(_text(file), path)
        with _named_types(path):
            return internevo.fields_of(assignments, path, typed)
    if suffix == ".json":
        return _own_fields(cls, read_json_object(file), path), []
    if suffix not in (".yaml", ".yml"):
        raise UserError(f"{path}: --config reads .yaml, .json (run.json) and InternEvo's .py")
    values = plain_yaml.read(_text(file), path)
    if is_training and mindformers.is_mindformers(values):
        with _named_types(path):
            return mindformers.fields_of(values, path)
    return _own_fields(cls, values, path), []


@contextlib.contextmanager
def _named_types(path: str) -> Iterator[None]:
    """Makes an error of computing with values of another program's file a `UserError`."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path}: a value is of a wrong type: {str(error)[:200]}") from None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text") from None


def _groups(cls: type) -> list[tuple[str, Any]]:
    """(name, dataclass) of the groups of a command."""
    hints = typing.get_type_hints(cls)
    return [(name, hint) for name, hint in hints.items() if dataclasses.is_dataclass(hint)]


def _appended_fields(cls: type) -> set[str]:
    """Fields whose flag takes one value and may be repeated."""
    names: set[str] = set()
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
        if dataclasses.is_dataclass(inner):
            names |= _appended_fields(inner)
        elif tyro.conf.UseAppendAction in getattr(hint, "__metadata__", ()):
            names.add(name)
    return names


def _switches(cls: type) -> set[str]:
    """Fields that are on or off."""
    names: set[str] = set()
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            names |= _switches(hint)
        elif hint is bool:
            names.add(name)
    return names


def _own_fields(cls: type, values: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Returns the fields of a file of this project: sections of `cls`, or flags without `--`.

    A section of run.json gives its values that differ from the default; the architecture is given whole.
    """
    groups = dict(_groups(cls))
    flags = parser.spellings(cls, pairs=False)
    fields: dict[str, Any] = {}
    places: dict[str, str] = {}
    unknown: list[str] = []

    def take_field(field: str, value: Any, place: str) -> None:
        if field in places:
            raise UserError(f"{path}: {place} and {places[field]} set the same; leave one of them out")
        places[field] = place
        fields[field] = value

    for key, value in values.items():
        if key in groups and isinstance(value, Mapping):
            hidden = {field.name for field in dataclasses.fields(groups[key])}
            own = parser.spellings(groups[key], pairs=False)
            for name, item in value.items():
                if name in hidden or parser.normalized(f"--{name}") in own:
                    field = own.get(parser.normalized(f"--{name}"), name)
                    if key == "model" or not _is_default(groups[key], field, item):
                        take_field(field, item, f"{key}.{name}")
                else:
                    unknown.append(f"{key}.{name}")
        elif isinstance(key, str) and parser.normalized(f"--{key}") in flags:
            take_field(flags[parser.normalized(f"--{key}")], value, key)
        elif key not in RECORDS:
            unknown.append(str(key))
    if unknown:
        raise UserError(
            f"{path}: unknown: {', '.join(unknown)}; sections are {', '.join(groups)}, keys are flags "
            "without --"
        )
    for name, derived in DERIVED.items():
        if fields.get(name) and name in flags.values():
            fields.pop(derived, None)
    return fields


def _is_default(group: type, name: str, value: Any) -> bool:
    """True if a value is the default of a field; such a value must not count as set by the user."""
    default = {field.name: field.default for field in dataclasses.fields(group)}.get(name)
    return value == default or (isinstance(value, list) and tuple(value) == default)


def _check_value(flag: str, value: Any, path: str, is_switch: bool) -> None:
    """Raises UserError for a value of a type that the flag does not have."""
    if isinstance(value, dict):
        raise UserError(f"{path}: {flag[2:]} is one value, not a section")
    if is_switch and not isinstance(value, bool | None):
        raise UserError(f"{path}: {flag[2:]} is {value!r:.80}; choose true or false, without quotes")
    items = value if isinstance(value, list | tuple) else [value]
    if not is_switch and any(isinstance(item, bool) for item in items):
        raise UserError(
            f"{path}: {flag[2:]} is {str(value).lower()}, but it is no switch; give its value (quote a text "
            "that YAML reads as true or false: yes, no, on, off)"
        )
    if any(isinstance(item, list | tuple | dict | None) for item in items if items is value):
        raise UserError(f"{path}: {flag[2:]} is a list of plain values")


def _words(flag: str, value: Any, in_model: bool) -> list[str]:
    """Words of a flag; a switch that is off has none, except in the architecture (--no-x)."""
    if isinstance(value, bool):
        return [flag] if value else [f"--no-{flag[2:]}"] if in_model else []
    if value is None:
        return [flag, "None"] if in_model else []
    if isinstance(value, list | tuple):
        return [flag, *map(str, value)] if value else []
    return [f"{flag}={value}"]


def supports(cls: type) -> bool:
    """True if a command has no flag --config of its own."""
    return CONFIG not in parser.spellings(cls)


__all__ = ["CONFIG", "DUMP", "HINT", "ConfigFlags", "dump", "supports", "take", "words_of"]
