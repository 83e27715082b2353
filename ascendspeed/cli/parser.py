"""Command-line parser: turns dataclasses into flags (tyro), and answers unknown flags with the nearest
ones."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import shutil
import sys
import typing
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import tyro

import ascendspeed
from ascendspeed.cli.foreign_flags import find_answer
from ascendspeed.utils.errors import UserError

T = TypeVar("T")
NEAR = 0.85
"""Least similarity of the flag that an error proposes."""
LONG_FLAG = re.compile(r"--[A-Za-z][\w-]*(=.*)?", re.DOTALL)
LONGEST = 500
"""Characters of a message that may quote a value of any length."""
UNION_ERROR = re.compile(
    r"Error parsing (--[\w-]+): no type matching (.*?) could be instantiated from \[(.*?)]"
)
"""Message of tyro for a value of several words: flag, types, words."""
LEAST_WIDTH = 40
"""Columns of the narrowest `--help`: with fewer than 6, tyro does not end."""


def output_flag(*older: str) -> Any:
    """Annotation of the field for what a command writes: `--output`, and the older names of the flag."""
    return tyro.conf.arg(name="output", aliases=[f"--{name}" for name in older])


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
    help, and `--version` the version, and exits with code 0. Raises UserError for unknown flags, all of which
    it names, or a malformed value.
    """
    args = list(sys.argv[1:] if args is None else args)
    _check_words(args)
    own = spellings(cls)
    if "--version" in args and ("--version" not in own or len(args) == 1):
        print(f"ascendspeed {ascendspeed.__version__}")
        raise SystemExit(0)
    known = {*own, *other_flags}
    try:
        parsed, unknown = _parse(cls, args, default, description)
    except UserError:  # may be about what is missing: an unknown flag is the likelier cause
        unknown = [word for word in args if LONG_FLAG.fullmatch(word)]
        unknown = [word for word in unknown if normalized(word.partition("=")[0]) not in known]
        if not unknown:
            raise
    if unknown:
        raise UserError(_unknown(unknown, known))
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
            if helping:
                stack.enter_context(_readable_width())
            else:
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


@contextlib.contextmanager
def _readable_width() -> Iterator[None]:
    """Inside the block a terminal of a few columns counts as one of `LEAST_WIDTH`."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(max(LEAST_WIDTH, shutil.get_terminal_size().columns))
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _check_words(args: Sequence[str]) -> None:
    """Raises UserError for a word that is not text: it could not be printed, logged or written to a file."""
    for word in args:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(f"{word!r} is not UTF-8: rename the file, or correct the value") from None
        if "\0" in word:
            raise UserError(f"{word!r} contains a NUL character")


def spellings(cls: type, pairs: bool = True) -> dict[str, str]:
    """Returns the field of every flag of a (nested) dataclass; with `pairs`, also of `--no-x` of booleans."""
    fields: dict[str, str] = {}
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint, extras = _split_annotation(hints[field.name])
        if dataclasses.is_dataclass(hint):
            fields |= spellings(hint, pairs and tyro.conf.FlagCreatePairsOff not in extras)
        elif tyro.conf.Suppress not in extras:
            flag = next((f"--{extra.name}" for extra in extras if getattr(extra, "name", None)), None)
            flag = flag or flag_of(field.name)
            flags = [flag]
            for extra in extras:
                flags += getattr(extra, "aliases", None) or ()
            if pairs and hint is bool:
                flags.append(f"--no-{flag[2:]}")
            fields |= dict.fromkeys(flags, field.name)
    return fields


def typed_fields(cls: type, args: Sequence[str] | None = None) -> set[str]:
    """Returns the names of the fields that the command line sets, as opposed to those that keep a default."""
    return set(typed_words(cls, sys.argv[1:] if args is None else args))


def typed_words(cls: type, args: Sequence[str]) -> dict[str, str]:
    """Returns the fields that the command line sets, with the first word of each one's last value."""
    known = spellings(cls)
    fields = {}
    for word, following in zip(args, (*args, "")[1:], strict=True):
        flag, equals, value = word.partition("=")
        if field := known.get(normalized(flag)):
            fields[field] = value if equals else following
    return fields


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


def _unknown(words: Sequence[str], known: Collection[str]) -> str:
    """Returns the error text for words that no flag takes: unknown flags with their values, or stray ones."""
    names = list(dict.fromkeys(word.partition("=")[0] for word in words if word.startswith("-")))
    if not names:
        return str(stray(words[0]))
    answers = {name: find_answer(normalized(name), known) for name in names}
    texts = [answer.replace(normalized(name), name, 1) for name, answer in answers.items() if answer]
    unknown = [name for name, answer in answers.items() if not answer]
    if len(unknown) == 1:
        near = nearest(unknown[0], known)
        texts.insert(0, f"unknown flag {unknown[0]}; " + (f"did you mean {near}?" if near else "see --help"))
    elif unknown:
        hints = {name: nearest(name, known) for name in unknown}
        proposals = [f"{name} (did you mean {near}?)" if near else name for name, near in hints.items()]
        texts.insert(0, f"unknown flags {', '.join(proposals)}; see --help")
    return "; ".join(texts)


def nearest(name: str, known: Collection[str]) -> str | None:
    """Returns the flag that `name` was probably meant to be: a near spelling, or one with a word more or
    less.
    """
    flag = normalized(name)
    near = difflib.get_close_matches(flag, known, 1, NEAR)
    if near:
        return near[0]
    parts = flag[2:].split("-")
    for other in sorted(known, key=len):
        others = other[2:].split("-")
        short, long = sorted((parts, others), key=len)
        if len(short) > 1 and len(long) == len(short) + 1 and _is_subsequence(short, long):
            return other
    return None


def _is_subsequence(short: Sequence[str], long: Sequence[str]) -> bool:
    words = iter(long)
    return all(word in words for word in short)


def _one_line(box: str) -> str:
    """Extracts the message of a tyro error, which is a box: title, rule, message, rule, hints."""
    parts: list[list[str]] = [[]]
    for line in box.splitlines():
        text = re.sub(r"\x1b\[[0-9;]*m|\[/?bold\]", "", line).strip("│ ")
        if re.fullmatch(r"[-─╭╰].*[-─╮╯]", text):
            parts.append([])
        else:
            parts[-1].append(text)
    texts = [" ".join(" ".join(part).split()) for part in parts]
    text = next((text for text in texts[1:] if text), texts[0])
    if union := UNION_ERROR.match(text):
        flag, types, words = union.groups()
        typed = " ".join(re.findall("'([^']*)'", words))
        text = f"{flag} {typed}: expected {re.sub('[{}|]|None', '', types)}"
    return (text if len(text) <= LONGEST else f"{text[:LONGEST]}...") + " (see --help)"
