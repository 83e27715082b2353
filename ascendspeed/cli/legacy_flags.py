"""Kinds of legacy flags, and their translation into current flags; `compat` has the tables of the
commands."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ascendspeed.cli.parser import normalized, stray
from ascendspeed.utils.errors import UserError

WORDS = list
"""`value` of a flag that takes any number of words."""
ValueType = Callable[[str], Any] | tuple[str, ...] | None
"""Value of a legacy flag: None (a switch), the legal choices, `WORDS`, or a function that parses a word."""


@dataclass(frozen=True)
class Ignored:
    """A flag without effect."""

    reason: str
    value: ValueType = None
    note: bool = True
    """Tell the user; False for flags of published commands that state the default."""

    @property
    def effect(self) -> str:
        """Text of the documentation."""
        return f"ignored: {self.reason}"


@dataclass(frozen=True)
class Renamed:
    """Another spelling of `flag`, which takes the value."""

    flag: str

    @property
    def effect(self) -> str:
        """Text of the documentation."""
        return f"same as `{self.flag}`"


@dataclass(frozen=True)
class Alias:
    """A flag that stands for other flags with fixed values."""

    flags: str
    value: ValueType = None
    """Value of the legacy flag itself, which has no effect."""
    yields_to: tuple[str, ...] = ()
    """Values of the current flag that win over the alias where they are given."""
    exclusive: bool = False
    """Another value of the current flag is an error."""
    note: bool = False

    @property
    def effect(self) -> str:
        """Text of the documentation."""
        return f"same as `{self.flags}`"


@dataclass(frozen=True)
class Converted:
    """A flag whose value the command converts into that of a current flag."""

    meaning: str
    value: ValueType

    @property
    def effect(self) -> str:
        """Text of the documentation."""
        return f"same as {self.meaning}"


@dataclass(frozen=True)
class MustAgree:
    """A flag that names a known property; a value that differs is an error."""

    what: str
    """Property that is checked."""
    value: ValueType = None
    mismatches: Callable[[Any, Any], Iterable[str]] | None = None
    """(subject of the command, value) -> mismatches; None: the legal values are the whole check."""

    @property
    def effect(self) -> str:
        """Text of the documentation."""
        return f"checked{self.what if self.what.startswith(' ') else f': {self.what}'}"


LegacyFlag = Ignored | Renamed | Alias | Converted | MustAgree
Table = Mapping[str, LegacyFlag]


@dataclass(frozen=True)
class Translation:
    """A command line without legacy flags."""

    args: tuple[str, ...]
    notes: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    """Values of the legacy flags that were given; True for switches."""
    table: Table = field(default_factory=dict)

    def mismatches(self, subject: Any) -> list[str]:
        """Returns what the given `MustAgree` flags contradict in `subject`."""
        texts: list[str] = []
        for flag, value in self.values.items():
            entry = self.table[flag]
            if isinstance(entry, MustAgree) and entry.mismatches:
                texts += entry.mismatches(subject, value)
        return texts

    def check(self, subject: Any) -> None:
        """Raises UserError if a given `MustAgree` flag contradicts `subject`."""
        for text in self.mismatches(subject):
            raise UserError(text)


def translate(args: Sequence[str], table: Table) -> Translation:
    """Replaces or removes the flags of `table` in `args`.

    Raises UserError for a malformed value, and for an exclusive alias whose current flag has another value.
    """
    words = list(args)
    current: list[str] = []
    given: dict[str, Any] = {}
    while words:
        word = words.pop(0)
        name, equals, attached = word.partition("=")
        flag = normalized(name)
        entry = table.get(flag)
        if entry is None:
            current.append(word)
        elif isinstance(entry, Renamed):
            current.append(entry.flag + equals + attached)
        else:
            if equals:
                words.insert(0, attached)
            given[flag] = _take_value(flag, entry.value, words)
            if words and not _is_flag(words[0]):
                raise stray(words[0])
    values = {flag: given[flag] for flag in table if flag in given}  # in the order of the table
    notes: list[str] = []
    for flag in values:
        notes += _apply(flag, table[flag], current)
    return Translation(tuple(current), tuple(dict.fromkeys(notes)), values, table)


def _apply(flag: str, entry: LegacyFlag, current: list[str]) -> list[str]:
    """Adds the flags that an alias stands for to `current`; returns the notes for the user."""
    if isinstance(entry, Ignored) and entry.note:
        return [f"{flag} is accepted and ignored: {entry.reason.replace('`', '')}"]
    if not isinstance(entry, Alias):
        return []
    if entry.exclusive or entry.yields_to:
        target, value = entry.flags.split()
        explicit = _last_value(current, target)
        if entry.exclusive and explicit not in (None, value):
            raise UserError(f"{flag} and {target} {explicit} contradict each other; drop one of them")
        if explicit in (*entry.yields_to, value):
            return []
    current += entry.flags.split()
    return [f"{flag} is accepted as {entry.flags}"] if entry.note else []


def _take_value(flag: str, kind: ValueType, words: list[str]) -> Any:
    """Removes the value of `flag` from the front of `words`, and returns it; True for a switch."""
    if kind is None:
        return True
    if kind is WORDS:
        taken = []
        while words and not _is_flag(words[0]):
            taken.append(words.pop(0))
        return taken
    if not words or _is_flag(words[0]):
        raise UserError(f"{flag} needs a value (see --help)")
    word = words.pop(0)
    if isinstance(kind, tuple):
        if word not in kind:
            raise UserError(f"{flag} {word}: must be {' or '.join(kind)}")
        return word
    try:
        return kind(word)
    except ValueError:
        raise UserError(f"{flag} {word} is not a whole number") from None


def _is_flag(word: str) -> bool:
    """True for a flag, False for a value; negative numbers are values."""
    return word.startswith("-") and not word.lstrip("-").replace(".", "", 1).isdigit()


def _last_value(args: Sequence[str], flag: str) -> str | None:
    """Returns the value of a flag as the command line gives it last, None if it does not."""
    value = None
    for index, word in enumerate(args):
        name, equals, attached = word.partition("=")
        if normalized(name) == flag:
            value = attached if equals else next(iter(args[index + 1 : index + 2]), "")
    return value


def documentation(table: Table, base: Table | None = None) -> list[str]:
    """Renders the rows of a Markdown table for flags that `base` lacks; flags with one effect share a row."""
    rows: dict[str, list[str]] = {}
    for flag, entry in table.items():
        negation = flag.startswith("--no-") and f"--{flag.removeprefix('--no-')}" in table
        if not negation and flag not in (base or {}):
            rows.setdefault(entry.effect, []).append(f"`{flag}`")
    return [f"| {', '.join(flags)} | {effect} |" for effect, flags in rows.items()]
