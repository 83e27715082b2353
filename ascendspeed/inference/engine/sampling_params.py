"""How text is to be generated, and what comes out."""

import math
from dataclasses import dataclass, fields

from ascendspeed.utils.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. The defaults are greedy."""

    max_new_tokens: int = 64
    """Tokens at most, for each sequence."""
    do_sample: bool = False
    """Draw tokens (with several beams: their continuations) instead of taking the most likely ones."""
    temperature: float = 1.0
    """Logits are divided by it before drawing."""
    top_k: int = 0
    """Draw among so many of the most likely tokens; 0: all."""
    top_p: float = 1.0
    """Draw among the most likely tokens that make up this probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were there, in the prompt too, become less likely."""
    num_beams: int = 1
    """Continuations that are followed at the same time; 1: no beam search."""
    length_penalty: float = 1.0
    """Beams are compared by their sum of log-probabilities / length to this power."""
    num_return_sequences: int = 1
    """Sequences for each prompt."""
    seed: int = 42
    """Of what is drawn: each sequence has a stream of its own, whatever else is in the batch."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a sequence; they do not belong to it."""
    vocab_size: int | None = None
    """Ids from here on are never chosen: rows that the tokenizer has no token for; None: all of the model's are."""

    def check(self) -> None:
        """Raises `UserError` for values that mean nothing."""
        at_least_1 = ("max_new_tokens", "num_beams", "num_return_sequences")
        rules = {
            "must be at least 1": [n for n in at_least_1 if getattr(self, n) < 1],
            "must be above 0": [] if 0 < self.repetition_penalty < math.inf else ["repetition_penalty"],
            "must be at least 0.0001 (the most likely token alone: draw nothing)": []
            if 1e-4 <= self.temperature < math.inf
            else ["temperature"],
            "must be above 0 and at most 1": [] if 0 < self.top_p <= 1 else ["top_p"],
            "must be 0 or more": [] if self.top_k >= 0 else ["top_k"],
            "must be between -32 and 32": [] if -32 <= self.length_penalty <= 32 else ["length_penalty"],
        }
        for rule, names in rules.items():
            for name in names:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: {rule}")
        plain = {f.name: f.default for f in fields(self)}
        for name in ("temperature", "top_k", "top_p"):
            if not self.do_sample and getattr(self, name) != plain[name]:
                raise UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} is of use only where tokens are drawn"
                )
        most = self.num_beams if self.num_beams > 1 else 1
        if self.num_return_sequences > most and not (self.do_sample and self.num_beams == 1):
            raise UserError(
                f"--num-return-sequences {self.num_return_sequences}: there are {most}; draw them, or take more --num-beams"
            )


@dataclass(frozen=True)
class Completion:
    """One generated sequence."""

    tokens: list[int]
    """The new ones; not the one that ended them."""
    reason: str
    """"stop", "length", or "end" where the caller has ended it."""
    score: float
    """Sum of the log-probabilities of the tokens and of what ended them, by the model itself; of a beam: / length ** penalty."""
