"""Losses over preference pairs: DPO (arXiv 2305.18290), IPO (2310.12036), ORPO (2403.07691), SimPO
(2405.14734) and KTO (2402.01306); the mean over the pairs of the global batch.

An answer is scored by the sum of the log-probabilities of its tokens. Its reward, which the log shows, is
beta x what the loss compares: the log-ratio to the reference, or the mean log-probability of a loss without
a reference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ascendspeed.config.schema import PreferenceConfig
from ascendspeed.data.batch import Batch
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.training.objectives import LossSums, Scorer
from ascendspeed.training.objectives.answers import PAIR_METRICS, answer_logprobs, pair_report


@dataclass(frozen=True)
class Answers:
    """All chosen answers of a micro-batch, or all rejected ones: tensors [pairs]."""

    logprob: Tensor
    """Sum over the tokens of an answer."""
    tokens: Tensor
    reference: Tensor | None
    """`logprob` under the reference weights, for the losses that need it."""
    baseline: float = 0.0
    """KTO: estimated divergence from the reference, which the log-ratio of these answers is compared with."""

    @property
    def log_ratio(self) -> Tensor:
        """log (probability / probability under the reference)."""
        assert self.reference is not None
        return self.logprob - self.reference

    @property
    def mean(self) -> Tensor:
        """Mean log-probability of a token."""
        return self.logprob / self.tokens


PairLoss = Callable[[PreferenceConfig, Answers, Answers], tuple[Tensor, Tensor, Tensor]]
"""(settings, chosen, rejected) -> loss, reward of the chosen and of the rejected answer of each pair."""


def dpo(settings: PreferenceConfig, chosen: Answers, rejected: Answers) -> tuple[Tensor, Tensor, Tensor]:
    """Logistic loss of the difference of the log-ratios; label smoothing as in conservative DPO."""
    rewards = settings.beta * chosen.log_ratio, settings.beta * rejected.log_ratio
    return _smoothed(settings, rewards[0] - rewards[1]), *rewards


def ipo(settings: PreferenceConfig, chosen: Answers, rejected: Answers) -> tuple[Tensor, Tensor, Tensor]:
    """Square of the distance from 1 / (2 beta), with log-ratios per token."""
    difference = chosen.log_ratio / chosen.tokens - rejected.log_ratio / rejected.tokens
    loss = (difference - 1 / (2 * settings.beta)).square()
    return loss, settings.beta * chosen.log_ratio, settings.beta * rejected.log_ratio


def orpo(settings: PreferenceConfig, chosen: Answers, rejected: Answers) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy of the chosen answer, and lambda x the logistic loss of the log odds ratio."""
    log_odds = (chosen.mean - rejected.mean) - (_log1mexp(chosen.mean) - _log1mexp(rejected.mean))
    loss = -chosen.mean - settings.orpo_lambda * logsigmoid(log_odds)
    return loss, settings.beta * chosen.mean, settings.beta * rejected.mean


def simpo(settings: PreferenceConfig, chosen: Answers, rejected: Answers) -> tuple[Tensor, Tensor, Tensor]:
    """Logistic loss of the difference of the mean log-probabilities beyond the margin gamma."""
    rewards = settings.beta * chosen.mean, settings.beta * rejected.mean
    return _smoothed(settings, rewards[0] - rewards[1] - settings.simpo_gamma), *rewards


def kto(settings: PreferenceConfig, chosen: Answers, rejected: Answers) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of both answers' losses by prospect theory, each against the divergence that the other answers of
    the global batch estimate."""
    rewards = settings.beta * chosen.log_ratio, settings.beta * rejected.log_ratio
    desirable = 1 - torch.sigmoid(rewards[0] - settings.beta * chosen.baseline)
    undesirable = 1 - torch.sigmoid(settings.beta * rejected.baseline - rewards[1])
    weighted = settings.kto_desirable_weight * desirable + settings.kto_undesirable_weight * undesirable
    return weighted / 2, *rewards


LOSSES: dict[str, PairLoss] = {"dpo": dpo, "ipo": ipo, "orpo": orpo, "simpo": simpo, "kto": kto}
"""The values of `--loss`."""


def _smoothed(settings: PreferenceConfig, margin: Tensor) -> Tensor:
    """Logistic loss of a margin if the labels of a share of the pairs are swapped."""
    share = settings.dpo_label_smoothing
    return -(1 - share) * logsigmoid(margin) - share * logsigmoid(-margin)


def _log1mexp(x: Tensor) -> Tensor:
    """log (1 - exp x) for x < 0, exact near 0 too."""
    near = x > -0.6931472
    return torch.where(near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.exp(x)))


class PreferenceObjective:
    """Implements `objectives.Objective` for --stage dpo."""

    metrics = PAIR_METRICS

    def __init__(self, settings: PreferenceConfig, has_adapters: bool) -> None:
        self._settings = settings
        self._loss = LOSSES[settings.loss]
        self._needs_reference = settings.needs_reference
        self._adapters_have_reference = has_adapters
        self._baselines = (0.0, 0.0)

    def count(self, batch: Batch) -> float:
        """Pairs of a micro-batch."""
        return float(batch.pairs)

    def prepare(self, batches: Sequence[Batch], scorer: Scorer) -> list[Batch]:
        """Adds the log-probabilities under the weights without adapters, if they are the reference; KTO
        estimates its baselines."""
        prepared = list(batches)
        if self._needs_reference and self._adapters_have_reference:
            scores = scorer.score(prepared, adapters=False)
            prepared = [
                replace(batch, reference=score)
                for batch, score in zip(prepared, scores or [None] * len(prepared), strict=True)
            ]
        if self._settings.loss == "kto":
            self._baselines = self._estimate_baselines(prepared, scorer)
        return prepared

    def _estimate_baselines(self, batches: Sequence[Batch], scorer: Scorer) -> tuple[float, float]:
        """Divergence that the rejected answers of the global batch estimate for the chosen ones, and the
        reverse; at least 0."""
        sums = torch.zeros(2, dtype=torch.float64)
        for batch, score in zip(batches, scorer.score(batches), strict=False):
            assert batch.reference is not None
            sums += (score.cpu() - batch.reference.cpu()).double().view(-1, 2).sum(0)
        *totals, pairs = scorer.sum_over_batch([*sums.tolist(), sum(batch.pairs for batch in batches)])
        chosen, rejected = (max(0.0, total / pairs) if pairs else 0.0 for total in totals)
        return rejected, chosen

    def sums(self, losses: Tensor, batch: Batch, grid: ProcessGrid) -> LossSums:
        """Sums over the pairs of a micro-batch."""
        logprobs, tokens = answer_logprobs(losses, batch, grid)
        reference = None if batch.reference is None else batch.reference.to(losses.device)
        chosen, rejected = (
            Answers(
                logprobs[which::2],
                tokens[which::2],
                None if reference is None else reference[which::2],
                self._baselines[which],
            )
            for which in (0, 1)
        )
        loss, *rewards = self._loss(self._settings, chosen, rejected)
        return pair_report(loss, *rewards, grid)
