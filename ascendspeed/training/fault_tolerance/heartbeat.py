"""Signs of life between the ranks: one that died, hangs or left is named by the others, which leave too.

A thread of every rank sends rank 0 a small datagram again and again, and rank 0 answers with who is gone. No collective and no
store: these are what hangs when a rank is gone. Where datagrams do not get through, nobody is ever heard, and nobody is judged.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.utils import errors
from ascendspeed.utils.errors import RankLost, UserError

INTERVAL = 2.0
"""Seconds between the signs of life of a rank; a tenth of the timeout where that is less."""
NAMED = 8
"""Ranks that are named; when a whole node is gone, some of them say it."""
SILENT = 3
"""Intervals without a sign after which a rank is named when a collective fails; to end a run by itself it takes the timeout."""


@dataclass(frozen=True)
class LostRank:
    """What is known of a rank that is gone."""

    seconds: float
    """Since its last sign of life, or its last words."""
    left: str | None = None
    """Its last words, if it had any."""
    code: int = errors.EXIT_RANK_LOST
    """The exit code it left with."""


class Heartbeat:
    """The signs of life of this rank, and what it knows of the others. Inside `with`, from a thread of its own."""

    def __init__(
        self, grid: ProcessGrid, timeout_minutes: float, farewell: Callable[[], None] = lambda: None
    ) -> None:
        """Collective. After `timeout_minutes` without a sign of life a rank is taken for dead, and all others leave.

        `farewell` is called before they do, when it is the thread that ends them.
        """
        self._rank, self._world = grid.rank, grid.world
        self._timeout = timeout_minutes * 60
        self._interval = min(INTERVAL, self._timeout / 10)
        self._farewell = farewell
        self._heard: dict[
            int, float
        ] = {}  # rank -> when it last was; on other ranks only those that rank 0 misses, and rank 0
        self._left: dict[
            int, tuple[float, int, str]
        ] = {}  # rank -> when we heard of it, its exit code, its last words
        self._where: dict[int, Any] = {}  # on rank 0: the others' addresses
        self._looked = time.monotonic()
        self._last_words: tuple[int, str] | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if grid.world > 1:
            self._socket, self._hub, self._token = _meet(grid)

    def __enter__(self) -> "Heartbeat":
        if self._world > 1:
            self._socket.settimeout(self._interval / 2)
            self._thread = threading.Thread(
                target=self._answer if self._rank == 0 else self._ask, daemon=True
            )
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Stops. When a collective failed because a rank is gone, that is what is raised: `RankLost`, with its number."""
        if self._thread is None:
            return
        try:
            if isinstance(error, RuntimeError) and (lost := self.lost(wait=True)):
                raise lost from error
            if error is not None:
                self._last_words = (
                    error.code if isinstance(error, UserError) else 1,
                    (str(error) or repr(error))[:500],
                )
        finally:
            self._ended.set()
            self._thread.join()
            self._socket.close()

    def lost(self, wait: bool = False) -> RankLost | None:
        """The ranks that are gone as one error; with `wait`, after they had the time to be missed."""
        until = time.monotonic() + (2 * SILENT * self._interval if wait else 0)
        while not (gone := self._gone()) and time.monotonic() < until:
            time.sleep(self._interval / 4)
        return _name(gone, self._world) if gone else None

    def _gone(self) -> dict[int, LostRank]:
        now = time.monotonic()
        gone = {r: LostRank(now - at, words, code) for r, (at, code, words) in list(self._left.items())}
        silent = {r: now - at for r, at in list(self._heard.items()) if now - at > SILENT * self._interval}
        if self._rank and 0 in silent:
            silent = {0: silent[0]}  # what rank 0 once said of the others no longer counts
        return {r: LostRank(seconds) for r, seconds in silent.items()} | gone

    # ---------------------------------------------------------------- the thread

    def _answer(self) -> None:
        """Rank 0: hears the others, answers each."""
        looked, news = 0.0, self._news()
        while not self._ended.is_set():
            if (
                time.monotonic() > looked + self._interval / 2
            ):  # not at every message: there may be thousands of ranks
                self._judge()
                looked, news = time.monotonic(), self._news()
            if message := self._receive():
                said, who = message
                self._heard[said["rank"]] = time.monotonic()
                if said["left"]:
                    self._left.setdefault(said["rank"], (time.monotonic(), *said["left"]))
                self._where[said["rank"]] = who
                self._send(news, who)
        self._tell_all()

    def _ask(self) -> None:
        """The others: say that they are there, hear who is not."""
        while not self._ended.is_set():
            self._judge()
            self._send({"rank": self._rank, "left": self._last_words}, self._hub)
            if message := self._receive():
                now, news = time.monotonic(), message[0]
                self._heard = {0: now} | {int(r): now - seconds for r, seconds in news["silent"].items()}
                for r, words in news["left"].items():
                    self._left.setdefault(int(r), (now, *words))
            self._ended.wait(self._interval)
        if self._last_words:
            self._send({"rank": self._rank, "left": self._last_words}, self._hub)

    def _tell_all(self) -> None:
        """Rank 0 leaves: who does not hear of its reason now would take it, gone silent, for the reason."""
        if self._last_words or self._gone():
            for who in self._where.values():
                self._send(self._news(), who)

    def _news(self) -> dict[str, Any]:
        gone = sorted(self._gone().items())[:NAMED]
        left = {r: (g.code, g.left) for r, g in gone if g.left} | (
            {0: self._last_words} if self._last_words else {}
        )
        return {"silent": {r: g.seconds for r, g in gone if not g.left}, "left": left}

    def _judge(self) -> None:
        """Ends this process when a rank is surely gone: the main thread may hang in a collective, where no exception reaches it."""
        now = time.monotonic()
        if (
            now - self._looked > SILENT * self._interval
        ):  # it was this process that stood still (Ctrl-Z): the others get their time anew
            self._heard = dict.fromkeys(self._heard, now)
        self._looked, gone = now, self._gone()
        # Of one that left, the others usually meet the same error, and say so themselves.
        if any(
            g.seconds > (errors.LAUNCHER_GRACE_SECONDS if g.left else self._timeout) for g in gone.values()
        ):
            self._leave(_name(gone, self._world))

    def _leave(self, lost: RankLost) -> None:
        if self._rank == 0:
            self._tell_all()
        self._farewell()
        errors.report_error(lost)
        os._exit(lost.code)

    def _send(self, message: dict[str, Any], to: Any) -> None:
        with contextlib.suppress(OSError):  # what does not arrive is missed by who waits for it
            self._socket.sendto(json.dumps({"token": self._token, **message}).encode(), to)

    def _receive(self) -> tuple[dict[str, Any], Any] | None:
        try:
            data, who = self._socket.recvfrom(65536)
            message = json.loads(data)
            return (message, who) if message["token"] == self._token else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _meet(grid: ProcessGrid) -> tuple[socket.socket, Any, str]:
    """This rank's socket, rank 0's address, and the word by which the ranks of this run know each other."""
    host = os.environ["MASTER_ADDR"]
    family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
    own = socket.socket(family, kind)
    own.bind(("", 0))
    port, token = grid.all_gather_object((own.getsockname()[1], secrets.token_hex(8)))[0]
    return own, (address[0], port, *address[2:]), token


def _name(gone: dict[int, LostRank], world: int) -> RankLost:
    words = [
        f"rank {rank} left: {one.left}"
        if one.left
        else f"rank {rank} gave no sign of life for {one.seconds:.0f} s"
        for rank, one in sorted(gone.items())[:NAMED]
    ]
    error = RankLost(f"{'; '.join(words)} (of {world} ranks); all leave")
    error.code = next((one.code for one in gone.values() if one.left), RankLost.code)
    return error
