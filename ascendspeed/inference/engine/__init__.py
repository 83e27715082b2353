"""Text from a model, and what it thinks of text: `sample` and `logprobs`, over tensor-parallel ranks and pipeline stages.

Every rank calls the same functions with the same arguments, and gets the same results. What is drawn or compared is decided on one
rank and told to the others: so they cannot part.
"""

from ascendspeed.inference.engine.language_model import CacheOutOfMemory, LanguageModel, load
from ascendspeed.inference.engine.loglikelihood import ContinuationScore, score_continuations, token_logprobs
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
