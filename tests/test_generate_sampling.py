"""Sampling: draws from the probabilities, random streams, and the ends and limits of generation."""

import math
import weakref
from dataclasses import replace

import pytest
import torch
from helpers.generation import hf_generate, token_lists
from helpers.internlm_versions import PROMPTS, REQUESTS, model_and_reference

from ascendspeed.utils.errors import UserError

# ---------------------------------------------------------------- drawing


def test_warping_is_hugging_faces():
    from transformers.generation import logits_process as hf

    from ascendspeed.inference.engine.logits_processors import apply_repetition_penalty, warp_logits
    from ascendspeed.inference.engine.sampling_params import SamplingParams

    scores = torch.randn(5, 200, generator=torch.Generator().manual_seed(1)) * 3
    seen = torch.tensor([[1, 2, 3], [4, 4, 4], [0, 9, 199], [7, 8, 9], [50, 60, 70]])
    for temperature, k, p, penalty in [
        (0.7, 50, 0.95, 1.0),
        (1.5, 0, 0.3, 1.2),
        (1.0, 1, 1.0, 0.8),
        (1.0, 500, 0.01, 1.0),
    ]:
        expected = (
            hf.RepetitionPenaltyLogitsProcessor(penalty)(seen, scores.clone()) if penalty != 1 else scores
        )
        expected = hf.TemperatureLogitsWarper(temperature)(seen, expected)
        expected = hf.TopKLogitsWarper(k)(seen, expected) if k else expected
        expected = hf.TopPLogitsWarper(p)(seen, expected) if p < 1 else expected
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter(1, seen, True) if penalty != 1 else None
        results = warp_logits(
            apply_repetition_penalty(scores, mask, penalty),
            SamplingParams(do_sample=True, temperature=temperature, top_k=k, top_p=p),
        )
        assert torch.equal(results, expected)


def test_draws_follow_the_probabilities():
    """Chi-square test of 20,000 draws, single and several at once; -inf is never drawn.

    A control is far off.
    """
    from ascendspeed.inference.engine.logits_processors import sample_from_logits, sample_without_replacement

    scores, n = torch.tensor([[0.0, 1.0, float("-inf"), 2.0, -1.0, float("-inf")]]), 20_000
    generator = torch.Generator().manual_seed(2)
    expected = scores.softmax(-1)[0].double() * n

    def far(counts: torch.Tensor, expected: torch.Tensor) -> float:
        possible = expected > 0
        assert counts[~possible].sum() == 0
        return float(((counts - expected)[possible] ** 2 / expected[possible]).sum())

    uniforms = torch.rand(n, generator=generator, dtype=torch.float64)
    counts = sample_from_logits(scores.expand(n, -1), uniforms).bincount(minlength=6).double()
    assert far(counts, expected) < 16.3  # 3 degrees of freedom: 0.1 %
    assert far(counts, (scores * 1.1).softmax(-1)[0].double() * n) > 16.3
    noise = torch.rand(n, 6, generator=generator, dtype=torch.float64)
    values, at = sample_without_replacement(scores.expand(n, -1), noise, 2)
    assert far(at[:, 0].bincount(minlength=6).double(), expected) < 16.3
    assert (at[:, 0] != at[:, 1]).all()
    assert torch.equal(values, scores[0][at])
    assert sample_from_logits(scores, torch.tensor([1.0 - 2**-53], dtype=torch.float64)).item() == 4


def test_a_row_draws_the_same_whatever_is_beside_it(cpu):
    from ascendspeed.inference.engine import SamplingParams, sample

    lm, _ = model_and_reference(cpu, "v2")
    params = SamplingParams(do_sample=True, max_new_tokens=20, temperature=1.5, top_k=40, seed=7)
    together = sample(lm, PROMPTS, params)
    assert token_lists(sample(lm, PROMPTS[:1], params)) == token_lists(together[:1])
    assert together[3][0].tokens != together[4][0].tokens  # equal prompts have streams of their own
    assert token_lists(sample(lm, PROMPTS, replace(params, seed=8))) != token_lists(together)
    four = sample(lm, PROMPTS[:1], replace(params, num_return_sequences=4))[0]
    assert len({tuple(completion.tokens) for completion in four}) == 4
    beams = replace(params, num_beams=4, num_return_sequences=2)
    assert sample(lm, PROMPTS, beams) == sample(lm, PROMPTS, beams)
    assert token_lists(sample(lm, PROMPTS[2:3], beams, prompt_numbers=[2])) == token_lists(
        sample(lm, PROMPTS, beams)[2:3]
    )
    assert token_lists(sample(lm, PROMPTS, beams)) != token_lists(sample(lm, PROMPTS, replace(beams, seed=8)))


@pytest.mark.parametrize("seed", [-1, -2, 2**63, 2**63 + 1, 2**64 - 3])
def test_seeds_have_streams_of_their_own(seed):
    from ascendspeed.inference.engine.logits_processors import random_stream

    others = [
        random_stream(other, 0).random()
        for other in (-1, -2, -1000, 0, 1, 2**63, 2**63 + 1, 2**64 - 3)
        if other != seed
    ]
    assert random_stream(seed, 0).random() not in others
    assert (
        random_stream(seed, 0).random() == random_stream(seed, 0).random() != random_stream(seed, 1).random()
    )


# ---------------------------------------------------------------- ends and limits


def test_the_cache_is_gone_afterwards(cpu, monkeypatch):
    """The cache and the attention masks are freed after success and after an exception; the model then works
    as before."""
    from ascendspeed.inference.engine import SamplingParams, sample, score_continuations, token_logprobs
    from ascendspeed.inference.engine import language_model as model
    from ascendspeed.models.gpt.attention import _masks

    monkeypatch.setattr(model, "PREFILL_CHUNK", 4)
    lm, _ = model_and_reference(cpu, "v2")
    uncached_logits = lm.gpt(torch.tensor([PROMPTS[0]]), None, None)

    def fails(*_):
        raise KeyError

    for ask in (
        lambda: sample(lm, PROMPTS, SamplingParams(max_new_tokens=2), fails),
        lambda: score_continuations(lm, REQUESTS, on_score=fails),
    ):
        with pytest.raises(KeyError):
            ask()
        assert lm.cache is None
        assert torch.equal(lm.gpt(torch.tensor([PROMPTS[0]]), None, None), uncached_logits)
    cache = weakref.ref(lm.allocate_cache(2, 30, [3]))
    sample(lm, PROMPTS, SamplingParams(max_new_tokens=2))
    token_logprobs(lm, PROMPTS)
    assert cache() is None
    lm.allocate_cache(1, 30, [9])
    lm.prefill([list(range(9))])
    assert _masks
    lm.free_cache()
    assert not _masks
    assert torch.equal(lm.gpt(torch.tensor([PROMPTS[0]]), None, None), uncached_logits)


@pytest.mark.parametrize("settings", [{}, {"do_sample": True}, {"num_beams": 2}, None])
def test_nan_is_an_error(cpu, settings):
    from ascendspeed.inference.engine import SamplingParams, sample, score_continuations

    lm, _ = model_and_reference(cpu, "v2")
    with torch.no_grad():
        lm.gpt.decoder.final_layernorm.weight[0] = float("nan")
    with pytest.raises(UserError, match="the model's output is NaN"):
        score_continuations(lm, REQUESTS) if settings is None else sample(
            lm, PROMPTS, SamplingParams(max_new_tokens=3, **settings)
        )


def test_no_memory_is_an_error(cpu):
    from ascendspeed.inference.engine import SamplingParams, sample

    lm, reference = model_and_reference(cpu, "v2")
    with pytest.raises(
        UserError, match=r"no memory for the keys and values of 5 sequences of 2000000000021 tokens, .* GiB"
    ):
        sample(lm, PROMPTS, SamplingParams(max_new_tokens=2 * 10**12 - 1))
    assert token_lists(sample(lm, PROMPTS[:1], SamplingParams(max_new_tokens=5)))[0] == hf_generate(
        reference, PROMPTS[0], max_new_tokens=5
    )


def test_beams_that_never_were_are_no_answers(cpu):
    from ascendspeed.inference.engine import SamplingParams, sample

    lm, _ = model_and_reference(cpu, "v2")
    for group in sample(
        lm, PROMPTS, SamplingParams(num_beams=3, num_return_sequences=3, max_new_tokens=1, vocab_size=2)
    ):
        assert [completion.tokens for completion in group] in ([[0], [1]], [[1], [0]])
        assert all(completion.score > -100 for completion in group)


def test_more_stops_than_there_are_tokens(cpu):
    from ascendspeed.inference.engine import SamplingParams, sample

    lm, _ = model_and_reference(cpu, "v2")
    assert sample(lm, PROMPTS, SamplingParams(num_beams=2, stop_ids=tuple(range(124)), max_new_tokens=4))


def test_a_finished_row_costs_nothing_more(cpu, monkeypatch):
    """The stop callback ends rows one after the other: every step runs the remaining rows only, with
    unchanged tokens."""
    from ascendspeed.inference.engine import SamplingParams, sample

    lm, _ = model_and_reference(cpu, "v2")
    complete = sample(lm, PROMPTS, SamplingParams(max_new_tokens=12))
    sizes, step, calls = [], lm.decode_step, []
    monkeypatch.setattr(
        lm, "decode_step", lambda tokens, slots: sizes.append(len(tokens)) or step(tokens, slots)
    )

    def watch(row: int, token: int) -> bool:
        calls.append((row, token))
        return sum(r == row for r, _ in calls) == 2 * row + 1

    results = sample(lm, PROMPTS, SamplingParams(max_new_tokens=12), watch)
    for row, ((completion,), (full,)) in enumerate(zip(results, complete, strict=True)):
        assert completion.tokens == full.tokens[: 2 * row + 1] == [token for r, token in calls if r == row]
        assert completion.reason == "stop"
    assert sizes == [4, 4, 3, 3, 2, 2, 1, 1]


def test_ids_beyond_the_tokenizers_are_never_chosen(cpu):
    from ascendspeed.inference.engine import SamplingParams, sample

    lm, reference = model_and_reference(cpu, "v1")
    for settings in ({}, {"do_sample": True, "temperature": 5.0}, {"num_beams": 3}):
        for group in sample(lm, PROMPTS, SamplingParams(max_new_tokens=20, vocab_size=30, **settings)):
            assert max(group[0].tokens) < 30
    assert max(hf_generate(reference, PROMPTS[0], max_new_tokens=20)[0]) >= 30


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0: must be at least 1"),
        ({"do_sample": True, "temperature": 1e-5}, "--temperature 1e-05: must be 0"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty 0.0: must be above 0"),
        ({"do_sample": True, "top_p": 1.5}, "--top-p 1.5: must be between 0"),
        ({"top_k": 5}, "--top-k 5 has an effect only with sampling"),
        ({"num_return_sequences": 2}, "--num-return-sequences 2: only 1 available"),
        ({"num_beams": 2, "num_return_sequences": 3}, "--num-return-sequences 3: only 2 available"),
        ({"length_penalty": math.inf}, "--length-penalty inf: must be between"),
    ],
)
def test_params_that_mean_nothing(params, says):
    from ascendspeed.inference.engine.sampling_params import SamplingParams

    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        SamplingParams(**params).check()
