"""Log-likelihoods along a tree of common prefixes: the tree, its attention, and scores of whole inputs."""

import random
from dataclasses import replace

import pytest
import torch
from helpers.family_models import MODELS
from helpers.generation import language_model
from helpers.models import tensors_of
from hypothesis import given, settings
from hypothesis import strategies as st

from ascendspeed.inference.engine import loglikelihood, prefix_tree, score_continuations, token_logprobs
from ascendspeed.inference.engine.prefix_tree import PrefixTree, passes
from ascendspeed.models.gpt.attention import attend_by_scores, attend_with_normalizer

SUBJECTS = [[1, *range(10, 40)], [1, *range(40, 70)]]
"""Examples of two subjects, of equal length."""


@settings(max_examples=60, deadline=None)
@given(
    st.sets(st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), min_size=1), st.integers(1, 5)
)
def test_paths_are_the_rows(rows, max_segment):
    """Every row is the path to its last token, and a subtree is a range of numbers."""
    ordered = sorted(rows)
    tree = PrefixTree(ordered, max_segment)
    for number, row in enumerate(ordered):
        assert [_token(tree, number, position) for position in range(len(row))] == list(row)
    for number, segment in enumerate(tree.segments):
        assert segment.number == number
        assert 1 <= len(segment.tokens) <= max_segment
        below = [other.number for other in tree.segments if segment in other.ancestors]
        assert below == list(range(number + 1, segment.subtree_end))
    batches = list(passes(tree.segments, 7))
    assert [segment for batch in batches for segment in batch] == tree.segments
    assert all(sum(len(segment.tokens) for segment in batch) <= 7 for batch in batches)


def _token(tree: PrefixTree, row: int, position: int) -> int:
    segment, token = tree.locate(row, position)
    return segment.tokens[token]


def test_segments_save_more_than_they_cost():
    few = list(range(50))
    rows = sorted([(*few, 60, 61), (*few, 60, 62), (*few, 70, 71), (*few[:10], 99), (7, 8)])
    tree = PrefixTree(rows, 2048)
    assert [(s.first, len(s.tokens), s.parent and s.parent.number) for s in tree.segments] == [
        (0, 10, None),  # common to four rows
        (10, 40, 0),
        (50, 2, 1),  # token 60 is not worth a segment
        (50, 2, 1),
        (50, 2, 1),
        (10, 1, 0),
        (0, 2, None),
    ]


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_attention_over_parts_is_attention_over_all(groups):
    """Both implementations, joined over two parts of the keys, against torch's SDPA over all keys."""
    torch.manual_seed(3)
    q, (k, v) = torch.randn(6, 300, 8), torch.randn(2, groups, 340, 8)
    mask = torch.zeros(300, 340).masked_fill_(torch.ones(300, 340, dtype=torch.bool).triu(41), float("-inf"))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x[None] for x in (q, k, v)), mask, enable_gqa=True
    )[0]
    for attend in (attend_with_normalizer, attend_by_scores):
        out, total = attend(q, k[:, 40:], v[:, 40:], is_causal=True)
        masked, _ = attend(q, k[:, 40:], v[:, 40:], mask[:, 40:])
        assert (masked - out).abs().max() < 1e-6
        first, first_total = attend(q, k[:, :40], v[:, :40])
        joined = torch.lerp(out, first, (first_total - total).sigmoid()[..., None])
        assert (joined - expected).abs().max() < 1e-6
        assert (out - expected).abs().max() > 0.1  # control: without the prefix


def _requests() -> list[tuple[list[int], list[int]]]:
    """Questions of two subjects: letters, longer answers of which one begins another, a bare prefix."""
    draw = random.Random(4)
    requests = []
    for subject in SUBJECTS:
        for length in (3, 9, 9, 20):
            question = [*subject, *(draw.randrange(2, 100) for _ in range(length))]
            requests += [(question, [letter]) for letter in (5, 6)]
            requests += [(question, [8, 9]), (question, [8, 9, 10, 11]), (question, [7] * 5)]
        requests.append((subject[:20], [3]))
    return requests


@pytest.mark.parametrize(
    "name",
    ["baichuan", "mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(MODELS))],
)
def test_scores_are_those_of_whole_inputs(cpu, name, monkeypatch):
    """Against the log-probabilities of every input by itself, for small and large passes."""
    monkeypatch.setattr(prefix_tree, "MIN_SHARED_TOKENS", 4)
    model = replace(MODELS[name], max_position_embeddings=128)  # all requests have one RoPE base
    requests, lm = _requests(), language_model(cpu, model, tensors_of(model))
    whole = token_logprobs(lm, [[*context, *continuation] for context, continuation in requests])
    expected = [
        float(values[-len(continuation) :].double().sum())
        for values, (_, continuation) in zip(whole, requests, strict=True)
    ]
    for budget in (10, 64, 2048):
        scores = score_continuations(lm, requests, budget)
        assert [score.logprob for score in scores] == pytest.approx(expected, abs=1e-5)
        assert score_continuations(lm, requests, budget) == scores
    swap = _swap_subjects(passes)
    monkeypatch.setattr(loglikelihood, "passes", swap)  # control: the examples of the other subject
    wrong = score_continuations(lm, requests, 2048)
    assert max(abs(a.logprob - b) for a, b in zip(wrong, expected, strict=True)) > 1e-3


def _swap_subjects(divide):
    def swapped(segments, budget):
        first, second = (s for s in segments if s.first == 1 and s.subtree_end > s.number + 1)
        first.tokens, second.tokens = second.tokens, first.tokens
        return divide(segments, budget)

    return swapped


def test_common_tokens_are_read_once(cpu, monkeypatch):
    lm = language_model(cpu, MODELS["baichuan"], tensors_of(MODELS["baichuan"]))
    sizes, run = [], lm._forward
    monkeypatch.setattr(lm, "_forward", lambda tokens: sizes.append(tokens.numel()) or run(tokens))
    score_continuations(lm, [([*SUBJECTS[0], i, 3], [x]) for i in range(6) for x in (5, 6)])
    assert sizes == [31 + 6 * 2]
