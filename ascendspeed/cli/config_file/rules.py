"""Rules that translate the keys of another program's configuration into fields of this project."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ascendspeed.utils.errors import UserError


@dataclass(frozen=True)
class Unused:
    """A key without effect here."""

    reason: str = ""
    """Text of a note; empty: the key needs none."""


@dataclass(frozen=True)
class Only:
    """A key that may only have values that agree with this project."""

    values: tuple[Any, ...]
    reason: str


Rule = str | Unused | Only | Callable[[Any], dict[str, Any]]
"""A field of the same value, or one of the above, or a function: value -> fields."""


def flatten(
    values: Mapping[str, Any], rules: Mapping[str, Rule], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of nested dictionaries; a key that has a rule is not divided."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in rules and value:
            yield from flatten(value, rules, f"{name}.")
        else:
            yield name, value


def translate(
    values: Mapping[str, Any], rules: Mapping[str, Rule], where: str, program: str
) -> tuple[dict[str, Any], list[str]]:
    """Returns fields and notes. Raises UserError for keys without a rule, all of which it names."""
    fields: dict[str, Any] = {}
    notes: list[str] = []
    unknown: list[str] = []
    for key, value in flatten(values, rules):
        rule = rules.get(key)
        section = key.rpartition(".")[0]
        while rule is None and section:  # a section that is unused as a whole
            rule = rules.get(f"{section}.*")
            section = section.rpartition(".")[0]
        if rule is None:
            unknown.append(key)
        elif isinstance(rule, Unused):
            notes += [f"{where}: {key}: {rule.reason}"] if rule.reason else []
        elif isinstance(rule, Only):
            if value not in rule.values:
                raise UserError(f"{where}: {key} = {value!r}: {rule.reason}")
        elif isinstance(rule, str):
            fields |= {} if value is None else {rule: value}
        else:
            try:
                fields |= rule(value)
            except UserError as error:
                raise UserError(f"{where}: {key} = {value!r:.80}: {error}") from None
            except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError):
                raise UserError(f"{where}: {key} = {value!r:.80}: not a value of this key") from None
    if unknown:
        raise UserError(
            f"{where}: {program} keys that have no meaning here: {', '.join(sorted(unknown))}; "
            "remove them, or set the flag that has their effect"
        )
    return fields, notes
