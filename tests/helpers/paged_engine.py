"""Prompts with a common prefix, and a run of the paged engine until its requests have ended."""

from ascendspeed.inference.serving.paged_engine import PagedEngine
from ascendspeed.inference.serving.request import Events

HEAD = list(range(2, 34))
"""Two blocks of 16: a prefix that prompts share."""
PROMPTS = [
    [1, 5, 9, 33, 7, 2, 8],
    [1, 4],
    [1, *range(80, 101)],
    [*HEAD, 60, 61],
    HEAD,
    [*HEAD, 7],
    [*HEAD * 3, 9],  # 97 and 130 tokens: beyond the trained length of 64
    [*HEAD * 4, 9, 8],
    [*HEAD * 3, 9],
]


def run(engine: PagedEngine, events: Events) -> dict[int, list[int]]:
    """Runs all requests to their end; events travel as bytes, as they do between ranks."""
    engine.apply(Events.from_bytes(events.to_bytes()))
    outputs = {}
    while not engine.scheduler.is_idle:
        for result in engine.step():
            if result.reason:
                outputs[result.request.id] = result.request.output
    return outputs
