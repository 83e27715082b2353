"""Dataclasses -> command line, by tyro; refuses what it does not know with one line and the nearest name."""

import contextlib
import dataclasses
import difflib
import io
import re
import sys
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from ascendspeed.utils.errors import UserError

T = TypeVar("T")


def parse(
    cls: type[T], args: Sequence[str] | None = None, *, default: T | None = None, description: str = ""
) -> T:
    """Fills the dataclass `cls` (nested groups flatten) from `args`, or from sys.argv.

    The docstring under a field is its help. Hyphens and underscores, `--a b` and `--a=b` are the same.
    Raises `UserError` for an unknown flag (naming the nearest one) or a bad value; `--help` prints and exits 0.
    """
    args = list(sys.argv[1:] if args is None else args)
    said, shown = io.StringIO(), io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    helping = "-h" in args or "--help" in args
    try:
        with (
            contextlib.nullcontext() if helping else contextlib.redirect_stderr(said),
            contextlib.nullcontext() if helping else contextlib.redirect_stdout(shown),
        ):
            parsed, unknown = tyro.cli(
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
        raise UserError(_one_line(said.getvalue() + shown.getvalue())) from None
    if unknown:
        raise UserError(_unknown(unknown[0], cls))
    return parsed


def spellings(cls: type, pairs: bool = True) -> dict[str, str]:
    """Every flag of a (nested) dataclass -> the name of its field; with `pairs`, `--no-x` of a boolean included."""
    found: dict[str, str] = {}
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        bare, extras = _bare(hints[field.name])
        if dataclasses.is_dataclass(bare):
            found |= spellings(bare, pairs and tyro.conf.FlagCreatePairsOff not in extras)
        elif tyro.conf.Suppress not in extras:
            name = field.name.replace("_", "-")
            names = [f"--{name}", *(a for e in extras for a in getattr(e, "aliases", None) or ())]
            found |= dict.fromkeys(names + ([f"--no-{name}"] if pairs and bare is bool else []), field.name)
    return found


def typed(cls: type, args: Sequence[str] | None = None) -> set[str]:
    """Names of the fields that the command line sets itself, as opposed to those that keep a default."""
    known = spellings(cls)
    given = (a.partition("=")[0].replace("_", "-") for a in (sys.argv[1:] if args is None else args))
    return {known[a] for a in given if a in known}


def _bare(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    if typing.get_origin(hint) is typing.Annotated:
        return typing.get_args(hint)[0], typing.get_args(hint)[1:]
    return hint, ()


def _unknown(word: str, cls: type) -> str:
    name = word.partition("=")[0]
    if not name.startswith("-"):
        return f"{word!r} does not belong to any flag; see --help"
    near = difflib.get_close_matches(name.replace("_", "-"), spellings(cls), 1, 0.6)
    return f"unknown flag {name}" + (f"; did you mean {near[0]}?" if near else "; see --help")


def _one_line(box: str) -> str:
    """tyro draws its errors as a box (of ASCII where the stream is not a terminal): title, rule, the error, rule, hints."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│ ") for line in box.splitlines()]
    parts: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch(r"[-─╭╰].*[-─╮╯]", line):
            parts.append([])
        else:
            parts[-1].append(line)
    said = [" ".join(" ".join(part).split()) for part in parts]
    return next((text for text in said[1:] if text), said[0]) + " (see --help)"
