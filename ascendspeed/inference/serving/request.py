"""A request of the engine: one sequence to generate, its parameters and its position in the cache."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from numpy.random import Generator
from torch import Tensor

from ascendspeed.inference.engine import SamplingParams
from ascendspeed.inference.engine.logits_processors import random_stream
from ascendspeed.inference.serving.prompt_lookup import PromptLookup


@dataclass(frozen=True)
class RequestParams:
    """Sampling parameters of a request."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    """`num_beams` and `num_return_sequences` are 1: a request is one sequence."""
    number: int = 0
    """Number of the random stream under the seed."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that the output contains."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token, times its occurrences in the output."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, number added to its logit)."""
    min_new_tokens: int = 0
    """Stop tokens are not chosen before the output has this length."""
    top_logprobs: int = 0
    """Number of most likely tokens whose log-probabilities are returned with each token."""
    salt: str = ""
    """Prefixes are shared only between requests with equal salts."""
    scores_prompt: bool = False
    """Compute the log-probabilities of the prompt's tokens; its blocks are not shared."""

    @property
    def changes_scores(self) -> bool:
        """True if a row's tokens depend on more than its logits and random stream."""
        return bool(
            self.sampling.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.min_new_tokens
        )


@dataclass(frozen=True)
class TokenChoice:
    """A generated token with log-probabilities from the model's own distribution, before any penalty."""

    token: int
    logprob: float | None
    """None for the first token of a prompt, which nothing predicts."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens with their log-probabilities, best first."""


@dataclass(eq=False)
class Request:
    """A sequence that is being generated. Every rank holds an equal one."""

    id: int
    prompt: list[int]
    params: RequestParams
    rope_length: int = 0
    """Length that fixes the RoPE base; 0: the model's own base. It never changes."""
    follows: int | None = None
    """Id of a request with the same prompt; this one waits until that prompt is in the cache."""
    output: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    cached: int = 0
    """Tokens whose keys and values are in the cache."""
    registered: int = 0
    """Full blocks that are registered in the pool."""
    parent: Any = None
    """Id of the last registered block, or the root."""
    shared_tokens: int = 0
    """Tokens of the prompt that were in the cache when the request was first admitted."""
    was_admitted: bool = False
    frequencies: Tensor | None = None
    """Inverse rotary frequencies, fp32 [d/2]."""
    random: Generator = None  # type: ignore[assignment]
    counts: Counter = field(default_factory=Counter)
    """Occurrences of each token in the output."""
    prompt_choices: list[TokenChoice] = field(default_factory=list)
    """Log-probabilities of the prompt's tokens from the second one on, if `scores_prompt`."""
    ngrams: PromptLookup = field(default_factory=PromptLookup)

    def __post_init__(self) -> None:
        self.random = random_stream(self.params.sampling.seed, self.params.number)

    @property
    def tokens(self) -> list[int]:
        """Prompt and output."""
        return self.prompt + self.output

    @property
    def length(self) -> int:
        """Number of tokens of prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def root(self) -> tuple[Any, ...]:
        """Root of the prefix keys: everything but tokens that keys and values depend on."""
        own = ("own", self.id) if self.params.scores_prompt else ()
        return ("rope", self.rope_length, "salt", self.params.salt, *own)

    def propose(self, most: int) -> tuple[int, ...]:
        """Returns up to `most` likely next tokens by prompt lookup, for plain greedy decoding only."""
        params = self.params
        most = min(most, params.sampling.max_new_tokens - len(self.output) - 1)
        if most < 1 or params.sampling.is_random or params.changes_scores:
            return ()
        known = len(self.ngrams)
        self.ngrams.extend(self.tokens if not known else self.output[known - len(self.prompt) :])
        return self.ngrams.propose(most)

    def append(self, token: int) -> str | None:
        """Adds a token unless it is a stop token; returns the reason if the sequence ends."""
        sampling = self.params.sampling
        if token in sampling.stop_ids:
            return "stop"
        self.output.append(token)
        self.counts[token] += 1
        return "length" if len(self.output) >= sampling.max_new_tokens else None


@dataclass(frozen=True)
class Submission:
    """A new request as it is sent to every rank."""

    id: int
    prompt: Sequence[int]
    params: RequestParams
    follows: int | None = None


@dataclass(frozen=True)
class Events:
    """Changes between two steps, the same on every rank."""

    submissions: tuple[Submission, ...] = ()
    cancellations: tuple[int, ...] = ()
    """Ids of requests whose clients have left or whose text is complete."""
    shutdown: bool = False

    def to_bytes(self) -> bytes:
        """Encodes the events as JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Events":
        """Decodes `to_bytes`."""
        values = json.loads(data)
        submissions = tuple(_decode_submission(item) for item in values["submissions"])
        return cls(submissions, tuple(values["cancellations"]), values["shutdown"])


def _decode_submission(values: dict[str, Any]) -> Submission:
    params = RequestParams(**values["params"])
    sampling = SamplingParams(**values["params"]["sampling"])
    params = replace(
        params,
        sampling=replace(sampling, stop_ids=tuple(sampling.stop_ids)),
        logit_bias=tuple((token, bias) for token, bias in params.logit_bias),
    )
    return Submission(values["id"], values["prompt"], params, values["follows"])
