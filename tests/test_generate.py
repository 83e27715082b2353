"""Generation and log-likelihoods of every InternLM version and layout, compared with Hugging Face token for
token."""

import math
import weakref
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import launch, oracle
from helpers.generate_worker import run_case
from helpers.generation import hf_generate, hf_logprobs, language_model, token_lists
from helpers.models import INTERNLM, ours, tensors_of
from helpers.quantization import with_int8_weights
from safetensors.torch import save_file

from ascendspeed.config.schema import ModelConfig
from ascendspeed.utils.errors import UserError

SHAPE: dict[str, Any] = {"num_attention_heads": 8, "max_position_embeddings": 64}
PLAIN: dict[str, Any] = {
    **SHAPE,
    "num_query_groups": 2,
    "add_qkv_bias": False,
    "add_dense_bias": False,
    "norm_epsilon": 1e-5,
}
MODELS: dict[str, ModelConfig] = {
    "v1": replace(INTERNLM, **SHAPE, rope_scaling_type="dynamic"),
    "v2": replace(
        INTERNLM,
        **PLAIN,
        family="internlm2",
        rotary_base=1e6,
        rope_scaling_type="dynamic",
        rope_scaling_factor=2.0,
    ),
    "v2.5": replace(INTERNLM, **PLAIN, family="internlm2", rotary_base=5e7),
    "v3": replace(
        INTERNLM,
        **PLAIN,
        family="internlm3",
        kv_channels=16,
        rotary_base=5e7,
        rope_scaling_type="dynamic",
        rope_scaling_factor=6.0,
    ),
}
PROMPTS = [[1, 5, 9, 33, 7, 2, 8], [1, 4], [1, *range(80, 101)], [1, 60, 61], [1, 60, 61]]
STOPS = (3, 50, 77)
BEAMS = {"max_new_tokens": 16, "num_beams": 3, "stop_ids": STOPS}
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 30},
    "greedy, stops": {"max_new_tokens": 30, "stop_ids": STOPS},
    "greedy, penalty": {"max_new_tokens": 20, "repetition_penalty": 1.3},
    "beams": {**BEAMS, "num_return_sequences": 3},
    "beams, shorter": {**BEAMS, "length_penalty": 0.2},
    "beams, longer": {**BEAMS, "length_penalty": 2.0, "repetition_penalty": 1.2},
}
DRAWS: dict[str, Any] = {"do_sample": True, "max_new_tokens": 20, "top_p": 0.9, "num_return_sequences": 2}
SHARED = [1, *range(2, 40)]
REQUESTS = [([*SHARED, i, 3], [x]) for i in range(6) for x in (5, 6)] + [
    (SHARED, [9, 8, 7]),
    ([4], [5, 6]),
    (SHARED[:20], [21]),
]


def model_and_reference(cpu, name: str):
    """The project's model and Hugging Face's, with the same random weights."""
    tensors = tensors_of(MODELS[name])
    return language_model(cpu, MODELS[name], tensors), hugging_face(
        MODELS[name], tensors, rope_of(MODELS[name])
    )


def hugging_face(model: ModelConfig, tensors, rope: dict[str, Any] | None):
    """Hugging Face's model: every version of InternLM is a Llama with other parameter names."""
    return oracle.hugging_face(
        replace(model, family="internlm" if model.add_qkv_bias else "llama"), tensors, rope
    ).eval()


def rope_of(model: ModelConfig) -> dict[str, Any] | None:
    if model.rope_scaling_type == "none":
        return None
    return {
        "rope_type": model.rope_scaling_type,
        "rope_theta": model.rotary_base,
        "factor": model.rope_scaling_factor,
    }


@cache
def reference_of(name: str):
    """Hugging Face's model, once for all tests of this version."""
    return hugging_face(MODELS[name], tensors_of(MODELS[name]), rope_of(MODELS[name]))


@cache
def right_texts(name: str, params: str, prompt: tuple[int, ...]) -> list[list[int]]:
    return hf_generate(reference_of(name), list(prompt), **PARAMS[params])


def check(version: str, results: dict[str, Any]) -> None:
    """Compares answers with Hugging Face's, and scores with the sums of its log-probabilities."""
    reference = reference_of(version)
    for name, answers_of_prompts in results["texts"].items():
        for prompt, group in zip(PROMPTS, answers_of_prompts, strict=True):
            right = right_texts(version, name, tuple(prompt))
            assert [tokens for tokens, _, _ in group] == right, (name, prompt)
            for tokens, reason, total in group:
                if (
                    PARAMS[name].get("repetition_penalty", 1) == 1
                ):  # the beams of a penalty are compared by penalized scores
                    assert total == pytest.approx(
                        score_of(reference, prompt, tokens, reason, PARAMS[name]), abs=2e-5
                    ), name
    ends = [reason for texts in results["texts"].values() for group in texts for _, reason, _ in group]
    assert {"stop", "length"} == set(ends)
    for (context, continuation), (total, greedy, count) in zip(REQUESTS, results["scores"], strict=True):
        logs = hf_logprobs(reference, [*context, *continuation])[len(context) - 1 : -1]
        assert total == pytest.approx(
            float(logs.gather(1, torch.tensor(continuation)[:, None]).sum()), abs=1e-5
        )
        assert (greedy, count) == (logs.argmax(-1).tolist() == continuation, len(continuation))
    for text, actual in zip(PROMPTS, results["logprobs"], strict=True):
        expected = hf_logprobs(reference, text)[:-1].gather(1, torch.tensor(text[1:])[:, None])[:, 0]
        assert (torch.tensor(actual) - expected).abs().max() < 1e-5


def score_of(reference, prompt: list[int], tokens: list[int], reason: str, params: dict[str, Any]) -> float:
    """Score of a text that ended with the most likely stop token."""
    logs = hf_logprobs(reference, [*prompt, *tokens])[len(prompt) - 1 :]
    total = float(logs[: len(tokens)].gather(1, torch.tensor(tokens, dtype=torch.long)[:, None]).sum())
    size = len(tokens) + (reason == "stop")
    total += float(logs[-1, list(params["stop_ids"])].max()) if reason == "stop" else 0.0
    return total / size ** params.get("length_penalty", 1.0) if params.get("num_beams", 1) > 1 else total


@pytest.mark.breadth
@pytest.mark.parametrize("name", MODELS)
def test_equals_hugging_face(cpu, name):
    """A batch of prompts of different lengths gives the answers of each prompt alone."""
    lm = language_model(cpu, MODELS[name], tensors_of(MODELS[name]))
    check(name, run_case(lm, {"prompts": PROMPTS, "params": PARAMS, "requests": REQUESTS}))


def on_layouts(cpu, layouts: list[tuple[int, int]], names: list[str], folder: Path) -> None:
    from ascendspeed.inference.engine import SamplingParams, sample

    cases = {}
    for name in names:
        save_file(
            {n: t.contiguous() for n, t in tensors_of(MODELS[name]).items()}, folder / f"{name}.safetensors"
        )
        for tp, pp in layouts:
            case = {
                "model": asdict(MODELS[name]),
                "weights": str(folder / f"{name}.safetensors"),
                "tp": tp,
                "pp": pp,
            }
            cases[f"{name} tp{tp} pp{pp}"] = {
                **case,
                "prompts": PROMPTS,
                "params": PARAMS | {"drawn": DRAWS},
                "requests": REQUESTS,
            }
            if tp > 1 and name in ("v1", "v2"):
                params = {key: PARAMS[key] for key in ("greedy", "greedy, stops")} | {"drawn": DRAWS}
                int8 = {"quantize": "w8a16", "params": params}
                cases[f"{name} tp{tp} pp{pp} int8"] = cases[f"{name} tp{tp} pp{pp}"] | int8
    results = launch.ranks(
        math.prod(layouts[0]), "generate_worker.py", {"cases": cases}, folder / "run", timeout=1200
    )
    for case, answer in results.items():
        name = case.split()[0]
        tensors = tensors_of(MODELS[name])
        if case.endswith("int8"):
            tensors = with_int8_weights(tensors)
        drawn = [[tokens for tokens, _, _ in group] for group in answer["texts"].pop("drawn")]
        model = language_model(cpu, MODELS[name], tensors)
        alone = sample(model, PROMPTS, SamplingParams(**DRAWS))
        assert drawn == token_lists(alone), case  # the same seed, the same text
        if not case.endswith("int8"):
            check(name, answer)
            continue
        for key, groups in answer["texts"].items():  # of rounded weights, in one process
            expected = token_lists(sample(model, PROMPTS, SamplingParams(**PARAMS[key])))
            assert [[tokens for tokens, _, _ in group] for group in groups] == expected, (case, key)


@pytest.mark.parametrize("name", ["v2", pytest.param("v1", marks=pytest.mark.slow)])
def test_two_ranks_equal_hugging_face(cpu, tmp_path, name):
    on_layouts(cpu, [(2, 1), (1, 2)], [name], tmp_path)


@pytest.mark.slow
def test_four_ranks_equal_hugging_face(cpu, tmp_path):
    """Includes fewer key/value heads than ranks."""
    on_layouts(cpu, [(4, 1), (2, 2)], list(MODELS), tmp_path)


@pytest.mark.slow
def test_other_models_on_two_ranks_equal_one(cpu, tmp_path):
    """Experts, embeddings tied across stages, and a NormHead.

    Control: one changed matrix gives other tokens.
    """
    from helpers.family_models import MODELS as FAMILIES

    cases, expected = {}, {}
    for name in ("mixtral", "qwen2_moe", "qwen2-tied", "baichuan"):
        model, tensors = FAMILIES[name], tensors_of(FAMILIES[name])
        save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / f"{name}.safetensors")
        asks = {
            "prompts": PROMPTS,
            "params": {k: PARAMS[k] for k in ("greedy", "beams")},
            "requests": REQUESTS,
        }
        expected[name] = run_case(language_model(cpu, model, tensors), asks)
        for tp, pp in ((2, 1), (1, 2)):
            cases[f"{name} tp{tp} pp{pp}"] = {
                "model": asdict(model),
                "weights": str(tmp_path / f"{name}.safetensors"),
                "tp": tp,
                "pp": pp,
                **asks,
            }
    last = "decoder.layers.0.self_attention.linear_proj.weight"
    other = run_case(language_model(cpu, model, {**tensors, last: -tensors[last]}), asks)
    assert tokens_in(other) != tokens_in(expected[name])
    results = launch.ranks(2, "generate_worker.py", {"cases": cases}, tmp_path / "run", timeout=600)
    for case, answer in results.items():
        alone = expected[case.split()[0]]
        assert tokens_in(answer) == tokens_in(alone), case
        for ranks_logprobs, single_logprobs in zip(answer["logprobs"], alone["logprobs"], strict=True):
            assert ranks_logprobs == pytest.approx(single_logprobs, abs=1e-5), case


def tokens_in(answer: dict[str, Any]) -> list:
    return [
        [[completion[:2] for completion in group] for group in results]
        for results in answer["texts"].values()
    ]


# ---------------------------------------------------------------- beyond the trained length


def pinned(name: str, length: int):
    """Hugging Face's model with the RoPE base of one prompt length, computed here."""
    model = MODELS[name]
    d, trained, factor = model.head_dim, model.max_position_embeddings, model.rope_scaling_factor
    base = model.rotary_base
    if length > trained:
        base *= (factor * length / trained - (factor - 1)) ** (d / (d - 2))
    return hugging_face(model, tensors_of(model), {"rope_type": "default", "rope_theta": base})


def uncached(reference, prompt: list[int], steps: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(hf_logprobs(reference, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


LONG = [[1, *range(2, 100)], [1, *range(30, 60)], [1, *range(5, 79)], [1, 7, 7, *range(60, 120)]]
"""Lengths above, below, above and just below the 64 trained positions; the last one exceeds them during
generation."""


def test_rows_that_finish_leave_the_others_their_rope(cpu):
    """With stop tokens, samples, beams and a penalty, beyond the trained length: same as each prompt
    alone."""
    from ascendspeed.inference.engine import SamplingParams, sample

    lm, _ = model_and_reference(cpu, "v3")
    for settings in (
        {"stop_ids": tuple(range(0, 125, 3))},
        {"stop_ids": tuple(range(0, 125, 9)), "repetition_penalty": 1.5},
        {
            "do_sample": True,
            "num_return_sequences": 3,
            "stop_ids": tuple(range(0, 125, 9)),
            "repetition_penalty": 1.3,
        },
        {"num_beams": 3, "stop_ids": STOPS},
    ):
        params = SamplingParams(max_new_tokens=16, **settings)
        together = token_lists(sample(lm, LONG, params))
        assert together == [
            token_lists(sample(lm, [prompt], params, prompt_numbers=[i]))[0] for i, prompt in enumerate(LONG)
        ], settings
        assert len({len(tokens) for group in together for tokens in group}) > 1 or "num_beams" in settings


@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_each_row_keeps_the_rope_of_its_prompt(cpu, name, monkeypatch):
    from ascendspeed.inference.engine import SamplingParams, sample
    from ascendspeed.inference.engine import language_model as model

    monkeypatch.setattr(model, "PREFILL_CHUNK", 40)  # several chunks
    lm, dynamic = model_and_reference(cpu, name)
    results = [completion.tokens for (completion,) in sample(lm, LONG, SamplingParams(max_new_tokens=24))]
    for prompt, actual in zip(LONG, results, strict=True):
        assert actual == uncached(pinned(name, len(prompt)), prompt, 24)
    # Control: the base of every length anew, as without a cache, is another function.
    assert results[0] != uncached(dynamic, LONG[0], 24) or results[2] != uncached(dynamic, LONG[2], 24)
    assert results[0] != uncached(pinned(name, 1), LONG[0], 24)


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_long_texts_are_scored_as_hugging_face_does(cpu, name):
    """Each long row has the RoPE base of its own length (Hugging Face keeps the longest so far); short rows
    share a prefix."""
    from ascendspeed.inference.engine import score_continuations

    lm, _ = model_and_reference(cpu, name)
    requests = [(LONG[0][:n], [7, 8]) for n in (30, 31, 70, 80, 90)] + [(LONG[0][:90], [9]), (LONG[0], [3])]
    for (context, continuation), completion in zip(requests, score_continuations(lm, requests), strict=True):
        text = [*context, *continuation[:-1]]
        logs = hf_logprobs(pinned(name, len(text)), text)[len(context) - 1 :]
        assert completion.logprob == pytest.approx(
            float(logs.gather(1, torch.tensor(continuation)[:, None]).sum()), abs=1e-5
        )


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


def test_bf16_follows_hugging_face(cpu):
    """Log-probabilities are within bf16's rounding of the fp32 ones."""
    from ascendspeed.inference.engine import LanguageModel, token_logprobs

    tensors = tensors_of(MODELS["v2"])
    fp32 = hugging_face(MODELS["v2"], tensors, rope_of(MODELS["v2"]))
    grid = language_model(cpu, MODELS["v2"], tensors).grid
    lm = LanguageModel(ours(cpu, MODELS["v2"], tensors, "bf16"), MODELS["v2"], grid, cpu)
    for text, actual in zip(PROMPTS, token_logprobs(lm, PROMPTS), strict=True):
        expected = hf_logprobs(fp32, text)[:-1].gather(1, torch.tensor(text[1:])[:, None])[:, 0]
        assert 1e-5 < (actual - expected).abs().max() < 0.05


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
