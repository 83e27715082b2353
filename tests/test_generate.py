"""Generated text and log-probabilities against Hugging Face's `generate` and forward pass, token for token."""

from dataclasses import replace

import oracle
import pytest
import torch
from test_model import GROUPED, INTERNLM, ours, tensors_of

from ascendspeed.config import ModelConfig, ParallelConfig

SMALL = replace(GROUPED, max_position_embeddings=128)
PROMPTS = [[1, 5, 9, 33, 7, 2, 8], [1, 4], [1, 90, 91, 92, 93, 94, 95, 96, 97, 98, 99], [1, 60, 61]]


def language_model(cpu, model: ModelConfig, tensors):
    from ascendspeed import parallel
    from ascendspeed.generate import LanguageModel

    grid = parallel.initialize(cpu, ParallelConfig(), 1)
    return LanguageModel(ours(cpu, model, tensors), model, grid, cpu)


def theirs(reference, prompt: list[int], **more) -> list[list[int]]:
    """What Hugging Face adds to one prompt."""
    pad = {"pad_token_id": 0, "eos_token_id": more.pop("eos_token_id", None)}
    with torch.no_grad():
        out = reference.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), **pad, **more)
    return [row[len(prompt) :].tolist() for row in out]


@pytest.mark.parametrize("model", [replace(INTERNLM, max_position_embeddings=128), SMALL], ids=["internlm", "gqa"])
def test_greedy(cpu, model):
    from ascendspeed.generate import Params, sample

    tensors = tensors_of(model)
    reference = oracle.hugging_face(model, tensors).eval()
    asked = language_model(cpu, model, tensors)
    found = sample(asked, PROMPTS, Params(max_new_tokens=20))
    for prompt, (one,) in zip(PROMPTS, found, strict=True):
        assert one.tokens == theirs(reference, prompt, max_new_tokens=20, do_sample=False)[0]


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("penalty", [1.0, 0.4])
def test_beams(cpu, each, penalty):
    from ascendspeed.generate import Params, sample

    tensors = tensors_of(SMALL)
    reference = oracle.hugging_face(SMALL, tensors).eval()
    asked = language_model(cpu, SMALL, tensors)
    stops = (3, 50, 77)
    params = Params(max_new_tokens=16, num_beams=3, num_return_sequences=each, length_penalty=penalty, stop_ids=stops)
    found = sample(asked, PROMPTS, params)
    for prompt, mine in zip(PROMPTS, found, strict=True):
        out = theirs(
            reference,
            prompt,
            max_new_tokens=16,
            num_beams=3,
            num_return_sequences=each,
            length_penalty=penalty,
            do_sample=False,
            eos_token_id=list(stops),
        )
        for one, expected in zip(mine, out, strict=True):
            cut = next((i for i, t in enumerate(expected) if t in stops), len(expected))
            assert one.tokens == expected[:cut]


def test_scores(cpu):
    from ascendspeed.generate import logprobs, score

    tensors = tensors_of(SMALL)
    reference = oracle.hugging_face(SMALL, tensors).eval()
    asked = language_model(cpu, SMALL, tensors)
    shared = list(range(1, 40))
    requests = [([*shared, i, 3], [x]) for i in range(6) for x in (5, 6)] + [(shared, [9, 8, 7]), ([4], [5, 6])]
    for batch in (1, 3, 16):
        for (context, continuation), one in zip(requests, score(asked, requests, batch), strict=True):
            with torch.no_grad():
                logs = reference(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
            wanted = sum(float(logs[len(context) - 1 + i, token]) for i, token in enumerate(continuation))
            assert one.logprob == pytest.approx(wanted, abs=1e-5)
    for text, mine in zip(PROMPTS, logprobs(asked, PROMPTS, 2), strict=True):
        with torch.no_grad():
            logs = reference(torch.tensor([text])).logits[0].log_softmax(-1)
        assert (mine - logs[:-1].gather(1, torch.tensor(text[1:])[:, None])[:, 0]).abs().max() < 1e-5
