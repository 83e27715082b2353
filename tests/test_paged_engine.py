"""Continuous batching over the paged cache: the tokens of every request are those of `sample` with that
prompt alone, whatever shares its passes, its blocks or its preemptions."""

from dataclasses import dataclass, replace

import pytest
from helpers.generation import language_model
from helpers.internlm_versions import MODELS
from helpers.models import tensors_of
from helpers.paged_engine import HEAD, PROMPTS, run
from hypothesis import given, settings
from hypothesis import strategies as st

from ascendspeed.inference import continuous_batching
from ascendspeed.inference.engine import Completion, LanguageModel, SamplingParams, sample
from ascendspeed.inference.serving.block_pool import BlockPool
from ascendspeed.inference.serving.paged_engine import EngineSettings, PagedEngine
from ascendspeed.inference.serving.request import Events, Request, RequestParams, Submission
from ascendspeed.models.gpt.paged_kv_cache import PagedKVCache
from ascendspeed.utils.errors import UserError

GREEDY = SamplingParams(max_new_tokens=20)


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


def alone(model, params: SamplingParams) -> dict[int, list[int]]:
    results = {}
    for number, prompt in enumerate(PROMPTS):
        ((completion,),) = sample(model, [prompt], params, prompt_numbers=[number])
        results[number] = completion.tokens
    return results


@pytest.mark.breadth
@pytest.mark.parametrize(
    "sizes",
    [
        EngineSettings(80, 16),
        EngineSettings(80, 16, token_budget=7),
        EngineSettings(200, 4, token_budget=32, max_running=3),
        EngineSettings(40, 4, token_budget=64),  # the longest request alone needs 38 blocks
        EngineSettings(80, 16, share_prefixes=False),
    ],
    ids=["plain", "small chunks", "small blocks", "preemption", "no sharing"],
)
def test_tokens_are_those_of_each_prompt_alone(subject, sizes):
    engine = PagedEngine(subject.model, sizes)
    assert run(engine, Events(submissions(GREEDY))) == subject.expected
    assert engine.pool.available == sizes.num_blocks
    assert (engine.scheduler.preemptions > 0) == (sizes.num_blocks == 40)
    assert (engine.scheduler.prefix_hits > 0) == sizes.share_prefixes


def test_blocks_of_another_rope_base_must_not_be_shared(subject, monkeypatch):
    """The control: keys are rotated, so a prefix key without the base gives other tokens with dynamic NTK."""
    monkeypatch.setattr(Request, "root", property(lambda request: ("root",)))
    engine = PagedEngine(subject.model, EngineSettings(80, 16, token_budget=32))
    is_dynamic = subject.model.config.rope_scaling_type == "dynamic"
    assert (run(engine, Events(submissions(GREEDY))) != subject.expected) == is_dynamic


def test_every_request_has_its_own_parameters(subject):
    """Greedy, penalized and random requests in one batch, each as `sample` alone."""
    drawn = SamplingParams(max_new_tokens=12, do_sample=True, temperature=1.3, top_p=0.9, seed=11)
    several = [
        GREEDY,
        drawn,
        SamplingParams(max_new_tokens=12, repetition_penalty=1.4),
        SamplingParams(max_new_tokens=12, do_sample=True, top_k=5, seed=3, repetition_penalty=1.2),
        SamplingParams(max_new_tokens=5, vocab_size=40),
        SamplingParams(max_new_tokens=20, stop_ids=(3, 50, 66, 103, 64)),
    ]
    params = [several[number % len(several)] for number in range(len(PROMPTS))]
    wanted = tuple(
        Submission(number, prompt, RequestParams(params[number], number=number))
        for number, prompt in enumerate(PROMPTS)
    )
    outputs = run(PagedEngine(subject.model, EngineSettings(80, 16, token_budget=40)), Events(wanted))
    for number, prompt in enumerate(PROMPTS):
        ((completion,),) = sample(subject.model, [prompt], params[number], prompt_numbers=[number])
        assert outputs[number] == completion.tokens, number


def test_penalties_and_biases(subject):
    """`frequency_penalty` counts, `presence_penalty` does not, `logit_bias` adds, stop ids wait."""
    prompt = PROMPTS[0]

    def tokens(more_stops=(), **settings):
        params = RequestParams(SamplingParams(max_new_tokens=6, stop_ids=(9, *more_stops)), **settings)
        return run(
            PagedEngine(subject.model, EngineSettings(16, 16)), Events((Submission(0, prompt, params),))
        )[0]

    assert tokens(logit_bias=((9, 1000.0),)) == []
    assert 9 not in tokens(logit_bias=((9, 1000.0),), min_new_tokens=3)
    assert len(tokens(logit_bias=((9, 1000.0),), min_new_tokens=3)) == 3
    assert tokens(logit_bias=((7, 1000.0),)) == [7] * 6
    assert len(tokens(logit_bias=((7, 1000.0),), min_new_tokens=3, more_stops=(1_000_000,))) == 6
    assert tokens(logit_bias=((7, 1000.0),), presence_penalty=600.0) == [7] * 6
    assert tokens(logit_bias=((7, 1000.0),), frequency_penalty=600.0).count(7) == 1 + 1


@pytest.mark.breadth
def test_prompts_of_an_evaluation(subject, monkeypatch):
    """`continuous_batching.generate`: tokens and scores are those of each prompt alone, up to its stop;
    common tokens pass through the model once."""
    sizes, forward = [], subject.model.forward_paged
    monkeypatch.setattr(
        subject.model, "forward_paged", lambda tokens: sizes.append(len(tokens)) or forward(tokens)
    )
    completions: dict[int, Completion] = {}
    stop = subject.expected[0][5]
    for limit, params in ((1, replace(GREEDY, stop_ids=(stop,))), (3, GREEDY)):
        continuous_batching.generate(
            subject.model, PROMPTS, params, limit, lambda number, token: False, completions.__setitem__
        )
        for number, prompt in enumerate(PROMPTS):
            ((expected,),) = sample(subject.model, [prompt], params)
            assert completions[number].tokens == expected.tokens
            assert completions[number].reason == expected.reason
            assert completions[number].score == pytest.approx(expected.score, abs=1e-4)
    assert subject.model.cache is None
    heads = [[*HEAD, number] for number in range(60, 64)]
    del sizes[:]
    continuous_batching.generate(
        subject.model, heads, GREEDY, 4, lambda number, token: True, completions.__setitem__
    )
    assert sizes == [33, 3]  # the first one, then the last token of each other one
    assert [(completions[i].reason, len(completions[i].tokens)) for i in range(4)] == [("stop", 1)] * 4


def test_common_blocks_are_read_once(subject, monkeypatch):
    """Decoding of prompts that begin with the same blocks; control: the blocks of another prompt."""
    rows, attend = [], PagedKVCache._attend_prefix
    prompts = [[*HEAD, *HEAD[:8], number] for number in range(60, 64)]

    def generated() -> list[list[int]]:
        engine = PagedEngine(subject.model, EngineSettings(40, 8))
        engine.apply(Events((Submission(0, prompts[0], RequestParams(GREEDY)),)))
        engine.step()
        further = (Submission(i, prompts[i], RequestParams(GREEDY)) for i in (1, 2, 3))
        outputs = run(engine, Events(tuple(further)))
        return [outputs[i] for i in range(4)]

    def spy(cache, prefix, *arguments):
        rows.append(len(prefix.tokens))
        return attend(cache, prefix, *arguments)

    monkeypatch.setattr(PagedKVCache, "_attend_prefix", spy)
    expected = [sample(subject.model, [prompt], GREEDY)[0][0].tokens for prompt in prompts]
    assert generated() == expected
    assert max(rows) == 4

    def damaged(cache, prefix, *arguments):
        return attend(cache, replace(prefix, blocks=slice(39, 40)), *arguments)

    monkeypatch.setattr(PagedKVCache, "_attend_prefix", damaged)
    assert generated() != expected


def test_the_cache_of_an_evaluation_fits_its_prompts(subject, monkeypatch):
    blocks, allocate = [], subject.model.allocate_paged_cache
    monkeypatch.setattr(
        subject.model, "allocate_paged_cache", lambda *sizes: blocks.append(sizes[0]) or allocate(*sizes)
    )
    for prompts in ([[1, 2]], []):
        continuous_batching.generate(subject.model, prompts, GREEDY, 1000, lambda *_: False, lambda *_: None)
    assert blocks == [2]  # 22 tokens and one block to spare


def test_nan_ends_an_evaluation(subject, monkeypatch):
    logits = subject.model.logits
    monkeypatch.setattr(subject.model, "logits", lambda hidden: _with_nan(logits(hidden), True))
    with pytest.raises(UserError, match="the model's output is NaN"):
        continuous_batching.generate(subject.model, [[1, 2]], GREEDY, 1, lambda *_: False, lambda *_: None)
    assert subject.model.cache is None


def test_a_row_of_nan_ends_alone(subject, monkeypatch):
    engine = PagedEngine(subject.model, EngineSettings(80, 16))
    logits = subject.model.logits
    monkeypatch.setattr(subject.model, "logits", lambda hidden: _with_nan(logits(hidden), len(hidden) > 1))
    engine.apply(Events(submissions(GREEDY)[:2]))
    reasons = {}
    while not engine.scheduler.is_idle:
        reasons |= {item.request.id: item.reason for item in engine.step() if item.reason}
    assert sorted(reasons.values()) == ["error", "length"]
    assert engine.pool.available == 80


def _with_nan(logits, damaged):
    if damaged:
        logits[0, 3] = float("nan")
    return logits


def test_one_base_for_all(subject):
    """With `rope_length`, prompts beyond the trained length share prefixes, and all have the base of that
    length."""
    longest = max(map(len, PROMPTS))
    engine = PagedEngine(subject.model, EngineSettings(80, 16, rope_length=longest))
    outputs = run(engine, Events(submissions(GREEDY)))
    same = [number for number, prompt in enumerate(PROMPTS) if len(prompt) == longest]
    assert all(outputs[number] == subject.expected[number] for number in same)
    assert len({request.root for request in requests_of(engine, PROMPTS)}) == 1


def requests_of(engine, prompts):
    engine.apply(Events(submissions(GREEDY)))
    return [engine.requests[number] for number in range(len(prompts))]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_pool_neither_loses_nor_shares_blocks_by_mistake(data):
    """Sequences of a small alphabet come and go; a block that is found again holds the tokens it was
    registered with."""
    pool = BlockPool(num_blocks=8, block_size=2)
    held, content = [], {}
    for _ in range(data.draw(st.integers(1, 30))):
        if held and data.draw(st.booleans()):
            pool.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
            continue
        tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=8))
        shared, parent = pool.find_prefix("root", tokens)
        assert [content[block] for block in shared] == [
            tuple(tokens[: 2 * (i + 1)]) for i in range(len(shared))
        ]
        missing = -(-len(tokens) // 2) - len(shared)
        if pool.available - pool.count_idle(shared) < missing:
            continue
        pool.share(shared)
        blocks = shared + [pool.allocate() for _ in range(missing)]
        assert len(set(blocks)) == len(blocks)
        for index in range(len(shared), len(tokens) // 2):
            content[blocks[index]] = tuple(tokens[: 2 * (index + 1)])
            parent = pool.register(blocks[index], parent, tokens[2 * index : 2 * (index + 1)])
        held.append(blocks)
    for blocks in held:
        pool.release(blocks)
    assert pool.available == 8
