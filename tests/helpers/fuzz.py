"""Seeded mutations of files, and the judge of what a reader makes of them: it accepts an input, or refuses it
with one clear line."""

import copy
import json
import random
import resource
import signal
import struct
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ascendspeed.utils.errors import as_user_error

HANG_SECONDS = 60
"""A case that takes longer hangs; cases need milliseconds."""
MEMORY = 1 << 30
"""Bytes that a case may allocate; small files must not ask for more."""
MAX_MESSAGE = 2000
PACKAGE = Path(__file__).resolve().parents[2] / "ascendspeed"

HOSTILE_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 10**6, 2**31, 2**31 - 1, -(2**31), 2**32, 2**63, 2**63 - 1, 10**30),
    *(1.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "a" * 3000, "\0", "../../evil", "/etc/passwd"),
    *("/dev/zero", "..", ".", "é", "\ud800", "<script>", "1", "-1", "nan", "True", [], {}, [[]], [{}]),
    *({"a": 1}, {"": ""}, [1, 2, 3], ["a"], [None], [0], [-1], [10**12], [10**12, 10**12]),
)
"""Values in the place of any value of a JSON file."""
EDGES = (0, -1, 1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 2**40)

JsonPath = tuple[Any, ...]


def _paths(value: Any, path: JsonPath = ()) -> Iterator[JsonPath]:
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from _paths(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 40)):
            yield from _paths(value[index], (*path, index))


def _get(value: Any, path: JsonPath) -> Any:
    for key in path:
        value = value[key]
    return value


def _set(value: Any, path: JsonPath, new: Any) -> Any:
    if not path:
        return new
    value = copy.deepcopy(value)
    _get(value, path[:-1])[path[-1]] = new
    return value


def _delete(value: Any, path: JsonPath) -> Any:
    value = copy.deepcopy(value)
    del _get(value, path[:-1])[path[-1]]
    return value


def _variant(value: Any, generator: random.Random) -> Any:
    """Returns a value of the same type that is nearly `value`."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return generator.choice([value + 1, value - 1, -value, value * 2, str(value), float(value)])
    if isinstance(value, str):
        return generator.choice(
            [value + "x", value[:-1], value.upper(), "../" + value, value + "\0", [value]]
        )
    if isinstance(value, list):
        return generator.choice([value + value[:1], value[:-1], value[::-1], value * 3])
    return value | {"x": 1}


def mutate_json(value: Any, generator: random.Random, extra: tuple[Any, ...] = ()) -> Any:
    """Returns a JSON value with one to three changes; `extra`: values to insert beside `HOSTILE_VALUES`."""
    for _ in range(generator.choice([1, 1, 1, 2, 3])):
        paths = list(_paths(value))
        path = generator.choice(paths)
        kind = generator.random()
        if kind < 0.55:
            value = _set(value, path, generator.choice([*HOSTILE_VALUES, *extra]))
        elif kind < 0.7:
            value = _delete(value, path) if path else value
        elif kind < 0.85:
            value = _set(value, path, _variant(_get(value, path), generator))
        else:
            value = _set(value, path, copy.deepcopy(_get(value, generator.choice(paths))))
    return value


def dump(value: Any) -> bytes:
    """Returns a value as JSON, lone surrogates and NaN included."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def mutate_bytes(content: bytes, generator: random.Random) -> bytes:
    """Returns bytes with one to sixteen changes: flipped, cut, deleted, inserted, moved, or a number at its
    edge."""
    changed = bytearray(content)
    for _ in range(generator.choice([1, 1, 1, 2, 4, 16])):
        size = len(changed)
        if not size:
            changed = bytearray(generator.randbytes(8))
            continue
        at = generator.randrange(size)
        kind = generator.random()
        if kind < 0.3:
            changed[at] ^= 1 << generator.randrange(8)
        elif kind < 0.45:
            changed[at] = generator.choice([0, 255, 127, 128, generator.randrange(256)])
        elif kind < 0.6:
            del changed[at:]
        elif kind < 0.7:
            del changed[at : at + generator.choice([1, 2, 4, 8, 100])]
        elif kind < 0.8:
            changed[at:at] = generator.choice([b"\0", b"\xff" * 8, b"[", b"{", b'"', generator.randbytes(5)])
        elif kind < 0.9:
            edge = generator.choice(EDGES)
            at = generator.choice([at, at // 8 * 8, at % 64])
            number = struct.pack("<q", edge)
            changed[at : at + 8] = number if generator.random() < 0.5 else number[:4]
        else:
            source = generator.randrange(size)
            length = generator.choice([1, 4, 8, 64])
            changed[at : at + length] = changed[source : source + length]
    return bytes(changed)


class Findings:
    """Runs cases and collects those that end in anything but success or a `UserError` of one line."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.found: dict[str, str] = {}
        """Finding -> the first case that has it."""

    def case(self, label: str, action: Callable[[], str | None]) -> None:
        """Runs `action`, which returns None, or what is wrong about an accepted input."""
        try:
            with _limits():
                wrong = action()
            self.outcomes["accepted"] += 1
            if wrong:
                self._add(f"accepted: {wrong}", label)
        except _Hang:
            self._add("hangs", label)
        except Exception as error:
            if (refusal := as_user_error(error)) and not isinstance(error, MemoryError | RuntimeError):
                self._check_message(str(refusal), label)
                return
            frames = [f for f in traceback.extract_tb(error.__traceback__) if str(PACKAGE) in f.filename]
            where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
            self._add(f"{type(error).__name__} in {where}: {str(error)[:150]}", label)

    def _check_message(self, message: str, label: str) -> None:
        self.outcomes["refused"] += 1
        if not message.strip() or "\n" in message or len(message) > MAX_MESSAGE:
            self._add(f"message: {message[:200]!r}", label)

    def _add(self, finding: str, label: str) -> None:
        self.outcomes["found"] += 1
        self.found.setdefault(finding, label)

    def check(self, accepted: int = 1, refused: int = 1) -> None:
        """Fails if there is a finding, or if fewer cases than this were accepted or refused."""
        assert not self.found, "\n".join(f"{label}: {finding}" for finding, label in self.found.items())
        assert self.outcomes["accepted"] >= accepted, self.outcomes
        assert self.outcomes["refused"] >= refused, self.outcomes


class _Hang(BaseException):
    """Raised by the alarm."""


def _raise_hang(number: int, frame: Any) -> None:
    raise _Hang


@contextmanager
def _limits() -> Iterator[None]:
    """Bounds time and address space of a block."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, _raise_hang)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
