"""Continuous batching over the paged cache: the tokens of every request are those of `sample` with that
prompt alone, whatever shares its passes, its blocks or its preemptions."""

from dataclasses import dataclass

import pytest
from helpers.generation import language_model
from helpers.models import tensors_of
from test_generate import MODELS

from ascendspeed.inference.engine import LanguageModel, SamplingParams, sample
from ascendspeed.inference.serving.paged_engine import EngineSettings, PagedEngine
from ascendspeed.inference.serving.request import Events, RequestParams, Submission

HEAD = list(range(2, 34))
"""Two blocks of 16: a prefix that prompts share."""
PROMPTS = [
    [1, 5, 9, 33, 7, 2, 8],
    [1, 4],
    [1, *range(80, 101)],
    [*HEAD, 60, 61],
    HEAD,
    [*HEAD, 7],
    [*HEAD, *HEAD[::-1], 9],  # 65 tokens: beyond the trained length of 64
    [*HEAD, *HEAD[::-1], 9, 8],
    [*HEAD, *HEAD[::-1], 9],
]
GREEDY = SamplingParams(max_new_tokens=20, stop_ids=(3, 50))


@dataclass(frozen=True)
class Subject:
    """A model, and the tokens that it generates for every prompt alone."""

    model: LanguageModel
    expected: dict[int, list[int]]


@pytest.fixture(scope="module", params=sorted(MODELS))
def subject(request, cpu):
    model = language_model(cpu, MODELS[request.param], tensors_of(MODELS[request.param]))
    return Subject(model, alone(model, GREEDY))


def submissions(params: SamplingParams) -> tuple[Submission, ...]:
    return tuple(
        Submission(number, prompt, RequestParams(params, number=number))
        for number, prompt in enumerate(PROMPTS)
    )


def run(engine: PagedEngine, events: Events) -> dict[int, list[int]]:
    """Runs all requests to their end; events travel as bytes, as they do between ranks."""
    engine.apply(Events.from_bytes(events.to_bytes()))
    outputs = {}
    while not engine.scheduler.is_idle:
        for result in engine.step():
            if result.reason:
                outputs[result.request.id] = result.request.output
    return outputs


def alone(model, params: SamplingParams) -> dict[int, list[int]]:
    results = {}
    for number, prompt in enumerate(PROMPTS):
        ((completion,),) = sample(model, [prompt], params, prompt_numbers=[number])
        results[number] = completion.tokens
    return results


@pytest.mark.parametrize(
    "settings",
    [
        EngineSettings(64, 16),
        EngineSettings(64, 16, token_budget=7),
        EngineSettings(64, 4, token_budget=32, max_running=3),
        EngineSettings(24, 4, token_budget=64),  # the longest request alone needs 22 blocks
        EngineSettings(64, 16, share_prefixes=False),
    ],
    ids=["plain", "small chunks", "small blocks", "preemption", "no sharing"],
)
def test_tokens_are_those_of_each_prompt_alone(subject, settings):
    engine = PagedEngine(subject.model, settings)
    assert run(engine, Events(submissions(GREEDY))) == subject.expected
    assert engine.pool.available == settings.num_blocks
    assert (engine.scheduler.preemptions > 0) == (settings.num_blocks == 24)
    assert (engine.scheduler.prefix_hits > 0) == settings.share_prefixes
