"""Runs the engine: on rank 0 in a thread beside the HTTP server, on the other ranks in step with it."""

import logging
import queue
import threading
from collections.abc import Callable, Sequence

from ascendspeed.inference.serving.event_channel import IDLE_SECONDS, EventChannel
from ascendspeed.inference.serving.paged_engine import GeneratedToken, PagedEngine
from ascendspeed.inference.serving.request import Events, Submission

logger = logging.getLogger(__name__)


class EngineLoop(threading.Thread):
    """Engine thread of rank 0.

    `submit`, `cancel` and `stop` may be called from any thread; they take effect before the next step.
    """

    def __init__(self, engine: PagedEngine, channel: EventChannel) -> None:
        super().__init__(name="engine", daemon=True)
        self.engine = engine
        self.error: str | None = None
        """Cause if the engine has failed: no request is answered any more."""
        self.deliver: Callable[[list[GeneratedToken]], object] = lambda results: None
        """Receives the tokens of every step, on the engine thread."""
        self.report_failure: Callable[[str], object] = lambda cause: None
        """Receives the cause when the engine fails, on the engine thread."""
        self._channel = channel
        self._inbox: queue.SimpleQueue[Submission | int | None] = queue.SimpleQueue()

    def submit(self, submissions: Sequence[Submission]) -> None:
        """Adds requests."""
        for submission in submissions:
            self._inbox.put(submission)

    def cancel(self, request_id: int) -> None:
        """Removes a request; its blocks are free before the next step."""
        self._inbox.put(request_id)

    def stop(self) -> None:
        """Ends the loop on every rank."""
        self._inbox.put(None)

    def run(self) -> None:
        """Steps until `stop`; an exception ends the loop and is reported."""
        try:
            while True:
                events = self._collect()
                self._channel.send(events)
                self.engine.apply(events)
                if events.shutdown:
                    return
                if results := self.engine.step():
                    self.deliver(results)
                    self._check_numbers(results)
        except Exception as error:
            logger.exception("the engine has failed; no request is answered any more")
            self.error = f"{type(error).__name__}: {error}"
            self.report_failure(self.error)

    def _check_numbers(self, results: Sequence[GeneratedToken]) -> None:
        """Marks the engine as damaged if the model's output is NaN; healthy rows go on."""
        if any(result.reason == "error" for result in results) and self.error is None:
            self.error = "the model's output is NaN: its weights are damaged, or the precision is too low"
            logger.error(self.error)

    def _collect(self) -> Events:
        """Returns everything that has arrived; waits if there is nothing to do."""
        submissions: list[Submission] = []
        cancellations: list[int] = []
        shutdown = False
        wait = self.engine.scheduler.is_idle
        while True:
            try:
                item = self._inbox.get(wait, IDLE_SECONDS if self._channel.has_peers else None)
            except queue.Empty:
                break
            wait = False
            if item is None:
                shutdown = True
            elif isinstance(item, Submission):
                submissions.append(item)
            else:
                cancellations.append(item)
        return Events(tuple(submissions), tuple(cancellations), shutdown)


def follow(engine: PagedEngine, channel: EventChannel) -> None:
    """Runs the engine of another rank until rank 0 ends it."""
    while True:
        events = channel.receive()
        engine.apply(events)
        if events.shutdown:
            return
        engine.step()
