"""Generation and log-likelihoods of every InternLM version and layout, compared with Hugging Face token for
token."""

import math
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import launch
from helpers.generate_worker import run_case
from helpers.generation import hf_generate, hf_logprobs, language_model, token_lists
from helpers.internlm_versions import MODELS, PROMPTS, REQUESTS, hugging_face, model_and_reference, rope_of
from helpers.models import ours, tensors_of
from helpers.quantization import with_int8_weights
from safetensors.torch import save_file

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


@pytest.mark.parametrize(("dtype", "least", "most"), [("bf16", 1e-5, 0.05), ("fp16", 1e-6, 0.006)])
def test_half_precision_follows_hugging_face(cpu, dtype, least, most):
    """Log-probabilities are within its rounding of the fp32 ones."""
    from ascendspeed.inference.engine import LanguageModel, token_logprobs

    tensors = tensors_of(MODELS["v2"])
    fp32 = hugging_face(MODELS["v2"], tensors, rope_of(MODELS["v2"]))
    grid = language_model(cpu, MODELS["v2"], tensors).grid
    lm = LanguageModel(ours(cpu, MODELS["v2"], tensors, dtype), MODELS["v2"], grid, cpu)
    for text, actual in zip(PROMPTS, token_logprobs(lm, PROMPTS), strict=True):
        expected = hf_logprobs(fp32, text)[:-1].gather(1, torch.tensor(text[1:])[:, None])[:, 0]
        assert least < (actual - expected).abs().max() < most
