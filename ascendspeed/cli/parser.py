"""Command-line parser: turns dataclasses into flags (tyro), and answers an unknown flag with the nearest
one."""

import contextlib
import dataclasses
import difflib
import io
import re
import sys
import typing
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import tyro

from ascendspeed.cli.megatron_flags import MEGATRON_FLAGS
from ascendspeed.utils.errors import UserError

T = TypeVar("T")
NEAR = 0.75
"""Least similarity of the flag that an error proposes."""


def flag_of(field: str) -> str:
    """Returns the flag of a field: `num_layers` -> `--num-layers`."""
    return f"--{field.replace('_', '-')}"


def parse(
    cls: type[T],
    args: Sequence[str] | None = None,
    *,
    default: T | None = None,
    description: str = "",
    other_flags: Iterable[str] = (),
) -> T:
    """Fills the dataclass `cls` (nested groups are flattened) from `args`, by default those of `sys.argv`.

    The docstring below a field is its help. Hyphens and underscores, `--a b` and `--a=b` are equivalent.
    `other_flags` are handled elsewhere; the error about an unknown flag may propose them. `--help` prints the
    help and exits with code 0. Raises UserError for an unknown flag or a malformed value.
    """
    args = list(sys.argv[1:] if args is None else args)
    parsed, unknown = _parse(cls, args, default, description)
    if unknown:
        raise UserError(_unknown(unknown[0], [*spellings(cls), *other_flags]))
    return parsed


def parse_group(cls: type[T], args: Sequence[str], default: T) -> T:
    """Fills one group of a command from `args`; flags of other groups are left out of account."""
    return _parse(cls, list(args), default, "")[0]


def _parse(cls: type[T], args: list[str], default: T | None, description: str) -> tuple[T, list[str]]:
    """Returns the filled dataclass and the words that it does not know."""
    options: dict[str, Any] = {} if default is None else {"default": default}
    helping = "-h" in args or "--help" in args
    stderr = io.StringIO()
    stdout = io.StringIO()
    try:
        with contextlib.ExitStack() as stack:
            if not helping:
                stack.enter_context(contextlib.redirect_stderr(stderr))
                stack.enter_context(contextlib.redirect_stdout(stdout))
            return tyro.cli(
                cls,
                args=args,
                description=description,
                return_unknown_args=True,
                config=(tyro.conf.OmitArgPrefixes,),
                **options,
            )
    except SystemExit as stop:
        if helping or not stop.code:
            raise
        raise UserError(_one_line(stderr.getvalue() + stdout.getvalue())) from None


def spellings(cls: type, pairs: bool = True) -> dict[str, str]:
    """Returns the field of every flag of a (nested) dataclass; with `pairs`, also of `--no-x` of booleans."""
    fields: dict[str, str] = {}
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint, extras = _split_annotation(hints[field.name])
        if dataclasses.is_dataclass(hint):
            fields |= spellings(hint, pairs and tyro.conf.FlagCreatePairsOff not in extras)
        elif tyro.conf.Suppress not in extras:
            flag = flag_of(field.name)
            flags = [flag]
            for extra in extras:
                flags += getattr(extra, "aliases", None) or ()
            if pairs and hint is bool:
                flags.append(f"--no-{flag[2:]}")
            fields |= dict.fromkeys(flags, field.name)
    return fields


def typed_fields(cls: type, args: Sequence[str] | None = None) -> set[str]:
    """Returns the names of the fields that the command line sets, as opposed to those that keep a default."""
    known = spellings(cls)
    words = sys.argv[1:] if args is None else args
    flags = (normalized(word.partition("=")[0]) for word in words)
    return {known[flag] for flag in flags if flag in known}


def normalized(flag: str) -> str:
    """Returns the spelling of a flag with hyphens."""
    return flag.replace("_", "-")


def stray(word: str) -> UserError:
    """Returns the error for a word that is no flag's value."""
    return UserError(f"{word!r} does not belong to any flag; see --help")


def _split_annotation(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Splits `Annotated[hint, *extras]`."""
    if typing.get_origin(hint) is typing.Annotated:
        hint, *extras = typing.get_args(hint)
        return hint, tuple(extras)
    return hint, ()


def _unknown(word: str, known: Sequence[str]) -> str:
    """Returns the error text for a word that no flag takes."""
    name = word.partition("=")[0]
    if not name.startswith("-"):
        return str(stray(word))
    flag = normalized(name)
    answer = MEGATRON_FLAGS.get(flag)
    if answer and set(re.findall(r"--[a-z][\w-]*", answer)) <= set(known):
        return f"{name} of Megatron-LM does not exist here: {answer}"
    near = difflib.get_close_matches(flag, known, 1, NEAR)
    return f"unknown flag {name}" + (f"; did you mean {near[0]}?" if near else "; see --help")


def _one_line(box: str) -> str:
    """Extracts the message of a tyro error, which is a box: title, rule, message, rule, hints."""
    parts: list[list[str]] = [[]]
    for line in box.splitlines():
        text = re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│ ")
        if re.fullmatch(r"[-─╭╰].*[-─╮╯]", text):
            parts.append([])
        else:
            parts[-1].append(text)
    texts = [" ".join(" ".join(part).split()) for part in parts]
    return next((text for text in texts[1:] if text), texts[0]) + " (see --help)"
