"""Prompt-lookup decoding: the tokens of greedy decoding in fewer forward passes."""

from dataclasses import replace

import pytest
import torch
from helpers.generate_command import folder, run
from helpers.generation import language_model
from helpers.internlm_versions import MODELS
from helpers.models import tensors_of
from helpers.paged_engine import HEAD, PROMPTS

from ascendspeed.inference.engine import SamplingParams, sample
from ascendspeed.inference.serving.lookup_sampling import sample_with_lookup
from ascendspeed.inference.serving.paged_engine import EngineSettings, PagedEngine
from ascendspeed.inference.serving.prompt_lookup import PromptLookup
from ascendspeed.inference.serving.request import Events, RequestParams, Submission
from ascendspeed.utils.errors import UserError

__all__ = ["folder", "run"]

GREEDY = SamplingParams(max_new_tokens=30)
CYCLE = [int(token) for token in torch.randperm(60, generator=torch.Generator().manual_seed(1)) + 2]


def test_proposals():
    lookup = PromptLookup()
    lookup.extend([1, 2, 3, 4, 5, 2, 3])
    assert lookup.propose(2) == (4, 5)  # after the last occurrence of 2, 3
    lookup.extend([4, 9, 1])
    assert lookup.propose(4) == ()  # 9, 1 and 4, 9, 1 are new
    lookup.extend([2, 3])
    assert lookup.propose(9) == (4, 5, 2, 3, 4, 9, 1, 2, 3)  # three tokens decide before two


@pytest.fixture(scope="module")
def cyclic(cpu):
    """A model that continues every token of `CYCLE` with the next one."""
    config = replace(MODELS["v2.5"], vocab_size=64, num_layers=1)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(config).items()}
    tensors["embedding.word_embeddings.weight"] = torch.eye(64)
    tensors["decoder.final_layernorm.weight"] = torch.ones(64)
    for token, following in zip(CYCLE, CYCLE[1:] + CYCLE[:1], strict=True):
        tensors["output_layer.weight"][following, token] = 9.0
    return language_model(cpu, config, tensors)


def steps(model, prompt, lookup: int, params=GREEDY) -> tuple[list[int], int]:
    """Tokens after one prompt, and the forward passes."""
    engine = PagedEngine(model, EngineSettings(16, 16, token_budget=64, lookup=lookup))
    engine.apply(Events((Submission(0, prompt, RequestParams(params)),)))
    request = engine.requests[0]
    while not engine.scheduler.is_idle:
        engine.step()
    assert engine.pool.available == 16
    return request.output, engine.steps


def test_a_text_that_repeats_its_prompt_takes_few_passes(cyclic):
    prompt = [*CYCLE, *CYCLE[:3]]
    tokens, passes = steps(cyclic, prompt, 0)
    assert (tokens, passes) == (CYCLE[3:33], 30)
    assert steps(cyclic, prompt, 8) == (tokens, 5)  # the prompt; then 9, 9, 9 and 2 tokens
    assert steps(cyclic, CYCLE[:5], 8) == (CYCLE[5:35], 30)  # nothing repeats
    stopping = replace(GREEDY, stop_ids=(CYCLE[20],))
    assert steps(cyclic, prompt, 8, stopping) == (CYCLE[3:20], 3)


@pytest.mark.parametrize("name", ["v1", pytest.param("v3", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("blocks", "size"), [(80, 16), (44, 4)], ids=["plain", "few blocks"])
def test_tokens_are_those_of_greedy_decoding(cpu, name, blocks, size):
    """Wrong proposals change nothing; rows that draw or have penalties keep their tokens."""
    model = language_model(cpu, MODELS[name], tensors_of(MODELS[name]))
    others = [
        replace(GREEDY, do_sample=True, temperature=1.2, seed=4),
        replace(GREEDY, repetition_penalty=1.3),
        replace(GREEDY, stop_ids=(3, 50, 66)),
    ]
    params = [GREEDY if i % 2 else others[i // 2 % 3] for i in range(len(PROMPTS))]
    engine = PagedEngine(model, EngineSettings(blocks, size, token_budget=64, lookup=5))
    engine.apply(
        Events(
            tuple(
                Submission(i, prompt, RequestParams(params[i], number=i)) for i, prompt in enumerate(PROMPTS)
            )
        )
    )
    outputs = {}
    while not engine.scheduler.is_idle:
        outputs |= {item.request.id: item.request.output for item in engine.step() if item.reason}
    for i, prompt in enumerate(PROMPTS):
        ((expected,),) = sample(model, [prompt], params[i], prompt_numbers=[i])
        assert outputs[i] == expected.tokens, i
    assert engine.pool.available == blocks
    results = sample_with_lookup(model, PROMPTS[:5], others[2], 5, lambda row, token: token == 7)
    expected = sample(model, PROMPTS[:5], others[2], lambda row, token: token == 7)
    for (found,), (wanted,) in zip(results, expected, strict=True):
        assert (found.tokens, found.reason) == (wanted.tokens, wanted.reason)
        assert found.score == pytest.approx(wanted.score, abs=1e-4)


def test_a_wrong_acceptance_shows(cyclic, monkeypatch):
    """The control: tokens after a draft that is accepted unchecked are other ones."""
    monkeypatch.setattr(PromptLookup, "propose", lambda self, most: (HEAD[0],) * most)
    prompt = [*CYCLE, *CYCLE[:3]]
    assert steps(cyclic, prompt, 8)[0] == CYCLE[3:33]
    finish = PagedEngine._finish_step

    def accept_all(engine, ending, choices):
        for item in ending:
            item.request.cached += len(item.draft)
        return finish(engine, ending, choices)

    monkeypatch.setattr(PagedEngine, "_finish_step", accept_all)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        assert steps(cyclic, prompt, 8)[0] == CYCLE[3:33]


def test_the_command(run):
    flags = ["--prompt", "one two one two one", "--max-new-tokens", "12"]
    assert run(*flags, "--lookup", 4) == run(*flags)
    assert run(*flags, "--task", "chat", "--lookup", 4) == run(*flags, "--task", "chat")
    with pytest.raises(UserError, match="--lookup is for --task greedy or chat, not for beam"):
        run(*flags, "--task", "beam", "--lookup", 4)
    with pytest.raises(UserError, match="has no effect with --top-k"):
        run(*flags, "--task", "chat", "--lookup", 4, "--top-k", 3)
