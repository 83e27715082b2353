"""Saves the checkpoints of a run, in the training step or asynchronously behind the following iterations."""

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
    """A complete checkpoint on the disk."""

    path: Path
    seconds: float
    """Time from the start of copying to the end of writing."""
    stall: float
    """Time in which training was blocked."""


class CheckpointSaver:
    """Saves to --save, one checkpoint at a time.

    With --async-save the fragments are copied to host memory, and a thread of every rank writes and publishes
    the copies by the same steps as a synchronous save, with its own barrier: a crash at any moment leaves the
    last good checkpoint. An error in the thread is raised by the next `wait` (or `save`, which waits first).
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
        """`barrier`: of a process group that nothing else uses during a save.

        `last`: checkpoint that the run continues. `token`: of `ownership.claim_folder`, equal on all ranks.
        """
        self.last = last
        """Newest complete checkpoint of this run."""
        self._run, self._token = run, token
        self._rank, self._world, self._barrier = rank, world, barrier
        self._host_buffers: dict[str, Tensor] = {}  # reused: fresh pages cost more than the copy
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved: list[SavedCheckpoint] = []

    def save(self, state: TrainState, fragments: Iterable[Fragment], rng: Mapping[str, Tensor]) -> None:
        """Saves a checkpoint, or starts to; every rank calls this with its own fragments.

        Raises as `save_checkpoint` does, and the error of an earlier asynchronous save.
        """
        began = time.perf_counter()
        self.wait()
        if not self._run.train.async_save:
            self._write(state, fragments, rng, began, None)
            self._raise()
            return
        copies = self._copy_to_host(fragments)
        rng_copies = {name: t.clone() for name, t in rng.items()}
        stall = time.perf_counter() - began
        self._thread = threading.Thread(
            target=self._write, args=(state, copies, rng_copies, began, stall), daemon=True
        )
        self._thread.start()

    def take_finished(self) -> list[SavedCheckpoint]:
        """Checkpoints that were finished since the last call."""
        saved, self._saved = self._saved, []
        return saved

    @property
    def failed(self) -> bool:
        """True if an asynchronous save has failed, so that `wait` will raise."""
        return self._error is not None

    def wait(self) -> None:
        """Waits for a save in progress. Raises its error."""
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
        """`stall`: seconds in which training was blocked; None: all of them."""
        train = self._run.train
        try:
            self.last = save_checkpoint(
                train.save,
                state,
                self._run,
                fragments,
                rng,
                self._rank,
                self._world,
                self._barrier,
                keep=train.keep,
                token=self._token,
            )
        except BaseException as error:
            self._error = error
        else:
            seconds = time.perf_counter() - began
            self._saved.append(SavedCheckpoint(self.last, seconds, seconds if stall is None else stall))

    @torch.no_grad()
    def _copy_to_host(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """Copies of the slices that this rank writes, in (pinned) host memory."""
        copies = []
        for fragment in fragments:
            if (owned := owned_slice(fragment)) is None:
                continue
            address, view = owned
            buffer = self._host_buffers.get(str(address))
            if buffer is None or buffer.shape != view.shape:
                pinned = view.device.type != "cpu"
                buffer = torch.empty(view.shape, dtype=view.dtype, device="cpu", pin_memory=pinned)
                self._host_buffers[str(address)] = buffer
            copies.append(replace(fragment, start=address.start, tensor=buffer.copy_(view), holder=(0, 1)))
        return copies
