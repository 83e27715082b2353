"""Heartbeats between the ranks: if one dies, hangs or exits, the others name it and exit too.

A thread of every rank regularly sends a UDP datagram to rank 0, which answers with the lost ranks.
Collectives and stores are not used, because they hang when a rank is lost. If UDP is blocked, the monitor is
inactive.
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
"""Seconds between the heartbeats of a rank; a tenth of the timeout if that is less."""
NAMED = 8
"""Largest number of lost ranks that are named; for a lost node some of its ranks suffice."""
SILENT = 3
"""Intervals without a heartbeat after which a rank is named if a collective fails; the timeout ends a run by
itself.
"""


@dataclass(frozen=True)
class LostRank:
    """A rank that has exited or does not respond."""

    seconds: float
    """Time since its last heartbeat, or since its exit message arrived."""
    message: str | None = None
    """Its exit message; None if it just stopped responding."""
    code: int = errors.EXIT_RANK_LOST
    """Its exit code."""


class Heartbeat:
    """Context manager that sends this rank's heartbeats from a thread and tracks the other ranks."""

    def __init__(
        self, grid: ProcessGrid, timeout_minutes: float, before_exit: Callable[[], None] = lambda: None
    ) -> None:
        """Collective. After `timeout_minutes` without a heartbeat a rank counts as dead, and all others exit.

        `before_exit` is called before the thread ends this process.
        """
        self._rank, self._world = grid.rank, grid.world
        self._timeout = timeout_minutes * 60
        self._interval = min(INTERVAL, self._timeout / 10)
        self._before_exit = before_exit
        # Rank -> time of its last heartbeat. On other ranks than 0: only rank 0 and the ranks that it misses.
        self._last_heard: dict[int, float] = {}
        # Rank -> (time of arrival, exit code, exit message).
        self._exited: dict[int, tuple[float, int, str]] = {}
        self._addresses: dict[int, Any] = {}  # of the other ranks; on rank 0 only
        self._last_check = time.monotonic()
        self._exit_message: tuple[int, str] | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if grid.world > 1:
            self._socket, self._rank0_address, self._token = _open_socket(grid)

    def __enter__(self) -> "Heartbeat":
        if self._world > 1:
            self._socket.settimeout(self._interval / 2)
            work = self._serve if self._rank == 0 else self._send_heartbeats
            self._thread = threading.Thread(target=work, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Ends the thread. Raises `RankLost`, naming the rank, if a lost rank made a collective fail."""
        if self._thread is None:
            return
        try:
            if isinstance(error, RuntimeError) and (lost := self.lost(wait=True)):
                raise lost from error
            if error is not None:
                code = error.code if isinstance(error, UserError) else 1
                self._exit_message = (code, (str(error) or repr(error))[:500])
        finally:
            self._ended.set()
            self._thread.join()
            self._socket.close()

    def lost(self, wait: bool = False) -> RankLost | None:
        """The lost ranks as one error; with `wait`, after the time in which their silence becomes known."""
        until = time.monotonic() + (2 * SILENT * self._interval if wait else 0)
        while not (ranks := self._lost_ranks()) and time.monotonic() < until:
            time.sleep(self._interval / 4)
        return _rank_lost(ranks, self._world) if ranks else None

    def _lost_ranks(self) -> dict[int, LostRank]:
        now = time.monotonic()
        exited = {
            rank: LostRank(now - at, message, code)
            for rank, (at, code, message) in list(self._exited.items())
        }
        limit = SILENT * self._interval
        silent = {rank: now - at for rank, at in list(self._last_heard.items()) if now - at > limit}
        if self._rank and 0 in silent:
            silent = {0: silent[0]}  # what rank 0 reported of the other ranks is out of date
        return {rank: LostRank(seconds) for rank, seconds in silent.items()} | exited

    # ---------------------------------------------------------------- the thread

    def _serve(self) -> None:
        """Loop of rank 0: receives heartbeats and answers each with the lost ranks."""
        checked_at, report = 0.0, self._report()
        while not self._ended.is_set():
            # Not at every message: there may be thousands of ranks.
            if time.monotonic() > checked_at + self._interval / 2:
                self._exit_if_lost()
                checked_at, report = time.monotonic(), self._report()
            if received := self._receive():
                message, address = received
                rank = message["rank"]
                self._last_heard[rank] = time.monotonic()
                if message["left"]:
                    self._exited.setdefault(rank, (time.monotonic(), *message["left"]))
                self._addresses[rank] = address
                self._send(report, address)
        self._broadcast_report()

    def _send_heartbeats(self) -> None:
        """Loop of the other ranks: sends heartbeats and receives the lost ranks."""
        while not self._ended.is_set():
            self._exit_if_lost()
            self._send({"rank": self._rank, "left": self._exit_message}, self._rank0_address)
            if received := self._receive():
                now, report = time.monotonic(), received[0]
                silent = {int(rank): now - seconds for rank, seconds in report["silent"].items()}
                self._last_heard = {0: now} | silent
                for rank, message in report["left"].items():
                    self._exited.setdefault(int(rank), (now, *message))
            self._ended.wait(self._interval)
        if self._exit_message:
            self._send({"rank": self._rank, "left": self._exit_message}, self._rank0_address)

    def _broadcast_report(self) -> None:
        """Sends the lost ranks to all before rank 0 exits: else they would name rank 0, which falls silent,
        as the cause.
        """
        if self._exit_message or self._lost_ranks():
            for address in self._addresses.values():
                self._send(self._report(), address)

    def _report(self) -> dict[str, Any]:
        lost = sorted(self._lost_ranks().items())[:NAMED]
        exited = {rank: (state.code, state.message) for rank, state in lost if state.message}
        if self._exit_message:
            exited[0] = self._exit_message
        return {"silent": {rank: state.seconds for rank, state in lost if not state.message}, "left": exited}

    def _exit_if_lost(self) -> None:
        """Ends this process if a rank is certainly lost: the main thread may hang in a collective, where no
        exception reaches it.
        """
        now = time.monotonic()
        if now - self._last_check > SILENT * self._interval:
            # This process itself was suspended (Ctrl-Z): the other ranks get their full time again.
            self._last_heard = dict.fromkeys(self._last_heard, now)
        self._last_check = now
        lost = self._lost_ranks()
        # After an exit the other ranks usually fail with the same error, and report it themselves.
        grace = errors.LAUNCHER_GRACE_SECONDS
        if any(state.seconds > (grace if state.message else self._timeout) for state in lost.values()):
            self._exit(_rank_lost(lost, self._world))

    def _exit(self, lost: RankLost) -> None:
        if self._rank == 0:
            self._broadcast_report()
        self._before_exit()
        errors.report_error(lost)
        os._exit(lost.code)

    def _send(self, message: dict[str, Any], address: Any) -> None:
        with contextlib.suppress(OSError):  # a lost datagram is like a missing heartbeat
            self._socket.sendto(json.dumps({"token": self._token, **message}).encode(), address)

    def _receive(self) -> tuple[dict[str, Any], Any] | None:
        """(message, sender's address); None without one, or for a datagram of another program."""
        try:
            data, address = self._socket.recvfrom(65536)
            message = json.loads(data)
            return (message, address) if message["token"] == self._token else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None


def _open_socket(grid: ProcessGrid) -> tuple[socket.socket, Any, str]:
    """(this rank's socket, address of rank 0, token that marks the messages of this run); collective."""
    host = os.environ["MASTER_ADDR"]
    family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
    own_socket = socket.socket(family, kind)
    own_socket.bind(("", 0))
    port, token = grid.all_gather_object((own_socket.getsockname()[1], secrets.token_hex(8)))[0]
    return own_socket, (address[0], port, *address[2:]), token


def _rank_lost(lost: dict[int, LostRank], world: int) -> RankLost:
    texts = [
        f"rank {rank} left: {state.message}"
        if state.message
        else f"rank {rank} gave no sign of life for {state.seconds:.0f} s"
        for rank, state in sorted(lost.items())[:NAMED]
    ]
    error = RankLost(f"{'; '.join(texts)} (of {world} ranks); all leave")
    error.code = next((state.code for state in lost.values() if state.message), RankLost.code)
    return error
