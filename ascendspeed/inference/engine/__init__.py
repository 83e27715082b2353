"""Text from a model, and what it thinks of text: `sample` and `logprobs`, over tensor-parallel ranks and pipeline stages.

Every rank calls the same functions with the same arguments, and gets the same results. What is drawn or compared is decided on one
rank and told to the others: so they cannot part.
"""

from ascendspeed.inference.engine.language_model import LanguageModel, NoMemory, load
from ascendspeed.inference.engine.loglikelihood import Score, logprobs, score
from ascendspeed.inference.engine.sampling import sample
from ascendspeed.inference.engine.sampling_params import Completion, Params

__all__ = [
    "Completion",
    "LanguageModel",
    "NoMemory",
    "Params",
    "Score",
    "load",
    "logprobs",
    "sample",
    "score",
]
