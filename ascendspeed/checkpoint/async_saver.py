"""Saves the checkpoints of a run, at once or behind the following iterations."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ascendspeed.checkpoint.fragment import Fragment, TrainState, owned_slice
from ascendspeed.checkpoint.save import save_checkpoint
from ascendspeed.config.schema import Run


class SavedCheckpoint(NamedTuple):
    """A checkpoint that is whole and on the disk."""

    path: Path
    seconds: float
    """From the start to the end of writing."""
    stall: float
    """Of these and of copying, seconds in which training stood still."""


class CheckpointSaver:
    """The run's `--save`, one checkpoint at a time.

    Behind the step: the pieces are copied to host memory, and a thread of every rank writes and publishes the copies by the same
    steps, with a barrier of its own, so a crash at any moment leaves the last good checkpoint. What goes wrong in the thread is
    raised by the next `wait` (or `save`, which waits first).
    """

    def __init__(
        self,
        run: Run,
        rank: int,
        world: int,
        barrier: Callable[[], None],
        last: Path | None = None,
        token: str = "",
    ) -> None:
        """`barrier`: used by nothing else while a save goes on; `last`: the checkpoint that the run continues;
        `token`: of `owner.claim`, the same on every rank.
        """
        self.last = last
        """The newest checkpoint of this run that is whole."""
        self._run, self._place, self._token = run, (rank, world, barrier), token
        self._host: dict[str, Tensor] = {}  # the copies' memory, kept: fresh pages cost more than the copy
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved: list[SavedCheckpoint] = []

    def save(self, state: TrainState, fragments: Iterable[Fragment], rng: Mapping[str, Tensor]) -> None:
        """Saves, or begins to; every rank calls this with its own. Raises as `save_checkpoint`, and what the last one met."""
        began = time.perf_counter()
        self.wait()
        if not self._run.train.async_save:
            self._write(state, fragments, rng, began, None)
            self._raise()
            return
        copies, rng = self._copy(fragments), {name: t.clone() for name, t in rng.items()}
        stall = time.perf_counter() - began
        self._thread = threading.Thread(
            target=self._write, args=(state, copies, rng, began, stall), daemon=True
        )
        self._thread.start()

    def news(self) -> list[SavedCheckpoint]:
        """The checkpoints that were finished since the last call."""
        saved, self._saved = self._saved, []
        return saved

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise, as far as is known now."""
        return self._error is not None

    def wait(self) -> None:
        """Returns when nothing is being saved. Raises what went wrong."""
        if self._thread:
            self._thread.join()
            self._thread = None
        self._raise()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error:
            raise error

    def _write(
        self,
        state: TrainState,
        fragments: Iterable[Fragment],
        rng: Mapping[str, Tensor],
        began: float,
        stall: float | None,
    ) -> None:
        try:
            train = self._run.train
            self.last = save_checkpoint(
                train.save,
                state,
                self._run,
                fragments,
                rng,
                *self._place,
                keep=train.keep,
                token=self._token,
            )
        except BaseException as error:
            self._error = error
        else:
            seconds = time.perf_counter() - began
            self._saved.append(SavedCheckpoint(self.last, seconds, seconds if stall is None else stall))

    @torch.no_grad()
    def _copy(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """What this rank writes of them, in host memory."""
        copies = []
        for fragment in fragments:
            if (piece := owned_slice(fragment)) is None:
                continue
            address, view = piece
            pinned = view.device.type != "cpu"
            if (host := self._host.get(str(address))) is None or host.shape != view.shape:
                host = self._host[str(address)] = torch.empty(
                    view.shape, dtype=view.dtype, device="cpu", pin_memory=pinned
                )
            copies.append(replace(fragment, start=address.start, tensor=host.copy_(view), holder=(0, 1)))
        return copies
