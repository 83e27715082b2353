"""Checks a `--deepspeed_config` file by DeepSpeed's own configuration classes, before weights are loaded."""

import difflib
import functools
import importlib
import logging
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pydantic import BaseModel, ValidationError

from ascendspeed.training.engines.deepspeed_config import merge
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import first_line, shorten_list

logger = logging.getLogger(__name__)

SHOWN_KEYS = 12
"""Legal keys that an error lists, those with the nearest spelling first."""
NEAR = 0.75
"""Least similarity of a key that an error suggests."""
NO_EFFECT = {
    "activation_checkpointing": "--recompute-granularity decides that",
    "checkpoint": "checkpoints are this program's own",
    "data_efficiency": "batches are this program's own",
    "dataloader_drop_last": "batches are this program's own",
    "pipeline": "pipeline stages belong to Megatron's engine",
}
"""Sections that DeepSpeed reads and that change nothing here -> the reason."""
PROBE = "?"
"""Value that stands for "auto" while a key is checked."""
TYPES = {"steps_per_print": 10}
"""Values of the right type for settings whose default in DeepSpeed is None."""
OWN_ERRORS = (AssertionError, AttributeError, KeyError, NotImplementedError, TypeError, ValueError)
"""Errors by which DeepSpeed refuses a configuration, beside its `DeepSpeedConfigError`."""


class RecordingDict(dict):
    """Dictionary that records the keys that its reader asks for and their defaults, nested dictionaries
    included.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(
            {key: RecordingDict(value) if isinstance(value, dict) else value for key, value in values.items()}
        )
        self.asked: dict[str, Any] = {}
        """Key -> the reader's default value, None if it gave none."""

    def __getitem__(self, key: str) -> Any:
        self.asked.setdefault(key, None)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """See `dict.get`."""
        self.asked[key] = default
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.setdefault(str(key), None)
        return super().__contains__(key)

    def keys(self) -> Any:
        """The dictionary itself, so that `key in values.keys()` is recorded."""
        return self

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def __copy__(self) -> "RecordingDict":
        return self


def check(config: dict[str, Any], given: dict[str, Any], path: str) -> None:
    """Checks `config`, the whole configuration, which holds the settings `given` of the file `path`.

    Logs a note for sections without effect. Raises `UserError` for a key that DeepSpeed does not know, in any
    section, and for values that it refuses. DeepSpeed must have been imported for the device.
    """
    module = importlib.import_module("deepspeed.runtime.config")
    # Sizes of one replica: whether the batch fits the ranks has been checked with the flags.
    samples = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
    config = config | {"train_batch_size": samples}
    asked = RecordingDict(config)
    try:
        _validate(asked)
    except ValidationError as error:
        raise UserError(f"--deepspeed_config {path}: {_validation_text(error, config)}") from error
    except (module.DeepSpeedConfigError, *OWN_ERRORS) as error:
        raise UserError(f"--deepspeed_config {path}: DeepSpeed refuses it: {first_line(error)}") from error
    for key in getattr(module, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", ()):  # asked for in order to refuse them
        asked.asked.pop(key, None)
    _check_keys(asked, given, path)
    _check_auto_keys(config, given, path)
    for section in sorted(NO_EFFECT.keys() & given.keys()):
        logger.info(f"note: --deepspeed_config {path}: {section} has no effect: {NO_EFFECT[section]}")


def _validate(config: dict[str, Any]) -> None:
    """Raises what DeepSpeed raises for a configuration of one replica."""
    module = importlib.import_module("deepspeed.runtime.config")
    module.DeepSpeedConfig(config, mpu=SimpleNamespace(get_data_parallel_world_size=lambda: 1))


def _check_auto_keys(config: dict[str, Any], given: dict[str, Any], path: str) -> None:
    """Raises `UserError` for an unknown key with the value "auto" in a section.

    These keys are not in `config`, and DeepSpeed's classes leave "auto" out. So they are added one by one
    with another value: an unknown key is refused or not asked for; any other error is about the value of a
    key that DeepSpeed knows.
    """
    refusals = (importlib.import_module("deepspeed.runtime.config").DeepSpeedConfigError, *OWN_ERRORS)
    for names in _auto_keys(given):
        added: Any = PROBE
        for name in reversed(names):
            added = {name: added}
        asked = RecordingDict(merge(config, added))
        try:
            _validate(asked)
            section = functools.reduce(dict.__getitem__, names[:-1], asked)
            if not section.asked or names[-1] in section.asked:
                continue
            legal = sorted(section.asked)
        except ValidationError as error:
            problem = error.errors()[0]
            if problem["type"] != "extra_forbidden":
                continue
            legal = _legal_keys(error.title, [str(name) for name in problem["loc"][:-1]])
        except refusals:
            continue
        raise UserError(f"--deepspeed_config {path}: {_unknown_text('.'.join(names), names[-1], legal)}")


def _auto_keys(given: dict[str, Any], section: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yields the names that lead to each key with the value "auto" inside a section."""
    for key, value in given.items():
        if isinstance(value, dict):
            yield from _auto_keys(value, (*section, key))
        elif value == "auto" and section:
            yield (*section, key)


def is_refusal(error: Exception) -> bool:
    """True for errors by which DeepSpeed refuses a configuration, not those of memory, files and devices."""
    return isinstance(error, OWN_ERRORS) or type(error) is Exception


def refused(error: Exception, path: str) -> UserError:
    """The error of a configuration that DeepSpeed refuses while it sets up the engine."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    problem = first_line(error) if str(error).strip() else f"{frame.line} ({Path(frame.filename).name})"
    return UserError(
        f"--deepspeed_config {path}: DeepSpeed cannot set up an engine with it: {problem}; "
        "remove what it names from the file"
    )


def _validation_text(error: ValidationError, config: dict[str, Any]) -> str:
    """The first problem that pydantic found: key, value, requirement, legal keys."""
    problem = error.errors()[0]
    names = [str(name) for name in problem["loc"]]
    sections = [
        key for key, value in config.items() if isinstance(value, dict) and names and names[0] in value
    ]
    key = ".".join([*sections[:1], *names])
    if problem["type"] == "extra_forbidden":
        legal = _legal_keys(error.title, names[:-1])
        return _unknown_text(key, names[-1], legal)
    requirement = problem["msg"].removeprefix("Value error, ")
    return f"{key} = {problem['input']!r}: {requirement}"


def _legal_keys(title: str, path: list[str]) -> list[str]:
    """Keys of the configuration class `title`, or of the one at `path` below it, by the names in a file."""
    base = importlib.import_module("deepspeed.runtime.config_utils").DeepSpeedConfigModel
    model = next((cls for cls in _subclasses(base) if cls.__name__ == title), None)
    for name in path:
        model = _nested_model(model, name)
    if model is None:
        return []
    return [field.alias or name for name, field in model.model_fields.items()]


def _subclasses(base: type) -> Iterator[type]:
    for cls in base.__subclasses__():
        yield cls
        yield from _subclasses(cls)


def _nested_model(model: Any, name: str) -> type[BaseModel] | None:
    """The class of a field that holds a section."""
    field = model.model_fields.get(name) if model else None
    kinds = (field.annotation, *getattr(field.annotation, "__args__", ())) if field else ()
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _check_keys(asked: RecordingDict, given: dict[str, Any], path: str, section: str = "") -> None:
    """Raises `UserError` for a key of the file that DeepSpeed never asked for, or a value whose type is not
    that of its default.

    Sections that DeepSpeed validates by a class record nothing: they have been checked there.
    """
    for key, value in given.items():
        if value == "auto" and section:
            continue  # left out of the configuration; see `_check_auto_keys`
        if key not in asked.asked:
            raise UserError(
                f"--deepspeed_config {path}: {_unknown_text(section + key, key, sorted(asked.asked))}"
            )
        default = TYPES.get(key, asked.asked[key])
        if value != "auto" and not _has_type_of(value, default):
            raise UserError(
                f"--deepspeed_config {path}: {section}{key} = {value!r} has the wrong type; "
                f"DeepSpeed's default is {default!r}"
            )
        inner = dict.get(asked, key)
        if isinstance(value, dict) and isinstance(inner, RecordingDict) and inner.asked:
            _check_keys(inner, value, path, f"{section}{key}.")


def _has_type_of(value: Any, default: Any) -> bool:
    """True if a value may replace a default; None is unknown, and integers are numbers."""
    kinds = next((kinds for kinds in ((bool,), (int, float), (str,)) if isinstance(default, kinds)), None)
    if value is None or kinds is None:
        return True
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _unknown_text(key: str, name: str, legal: list[str]) -> str:
    near = difflib.get_close_matches(name, legal, 1, NEAR)
    suggestion = f"; did you mean {near[0]}?" if near else ""
    ordered = sorted(legal, key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio())
    choices = f" (it has {shorten_list(ordered, SHOWN_KEYS)})" if legal else ""
    return f"DeepSpeed has no setting {key}{suggestion}{choices}; correct or remove it"
