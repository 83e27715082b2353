"""Text generation and log-likelihoods under tensor and pipeline parallelism.

Every rank calls the same functions with the same arguments and gets the same results. One rank samples and
broadcasts, so ranks cannot diverge.
"""

from ascendspeed.inference.engine.language_model import CacheOutOfMemory, LanguageModel, load
from ascendspeed.inference.engine.loglikelihood import (
    ContinuationScore,
    score_continuations,
    token_logprobs,
)
from ascendspeed.inference.engine.sampling import sample
from ascendspeed.inference.engine.sampling_params import Completion, SamplingParams

__all__ = [
    "CacheOutOfMemory",
    "Completion",
    "ContinuationScore",
    "LanguageModel",
    "SamplingParams",
    "load",
    "sample",
    "score_continuations",
    "token_logprobs",
]
