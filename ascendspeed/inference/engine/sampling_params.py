"""`SamplingParams`: settings of generation; `Completion`: a generated sequence."""

from dataclasses import dataclass, fields

from ascendspeed.inference.sampling_ranges import check_sampling_ranges
from ascendspeed.utils.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """Settings of generation. The defaults are greedy decoding."""

    max_new_tokens: int = 64
    """Maximum number of new tokens per sequence."""
    do_sample: bool = False
    """Sample tokens (with beams: their continuations) instead of choosing the most likely ones."""
    temperature: float = 1.0
    """Divisor of the logits before sampling; 0: the most likely token."""
    top_k: int = 0
    """Sample among this many most likely tokens; 0 or -1: all."""
    top_p: float = 1.0
    """Sample among the most likely tokens whose probabilities add up to this; 0: the most likely token."""
    repetition_penalty: float = 1.0
    """Above 1: tokens of the prompt and of the answer become less likely."""
    num_beams: int = 1
    """Beams of beam search; 1: no beam search."""
    length_penalty: float = 1.0
    """Exponent: beams are ranked by their sum of log-probabilities / length ** length_penalty."""
    num_return_sequences: int = 1
    """Sequences per prompt."""
    seed: int = 42
    """Random seed. Each sequence has its own random stream, independent of the rest of the batch."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a sequence; they are not part of it."""
    vocab_size: int | None = None
    """Ids from here on are never chosen, as the tokenizer has no token for them; None: all rows of the
    model."""

    @property
    def is_random(self) -> bool:
        """True if tokens are drawn: sampling at temperature 0 or with top_p 0 chooses the most likely one."""
        return self.do_sample and self.temperature > 0 and self.top_p > 0

    def check(self) -> None:
        """Raises `UserError` for a value out of range or a setting that has no effect."""
        check_sampling_ranges(self)
        defaults = {f.name: f.default for f in fields(self)}
        for name in ("temperature", "top_k", "top_p"):
            if not self.do_sample and getattr(self, name) != defaults[name]:
                raise UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} has an effect only with sampling"
                )
        most = max(self.num_beams, 1)
        independent_samples = self.is_random and self.num_beams == 1
        if self.num_return_sequences > most and not independent_samples:
            raise UserError(
                f"--num-return-sequences {self.num_return_sequences}: only {most} available; "
                "sample, or increase --num-beams"
            )


@dataclass(frozen=True)
class Completion:
    """A generated sequence."""

    tokens: list[int]
    """New tokens, without the stop token."""
    reason: str
    """"stop", "length", or "end" if the caller ended it."""
    score: float
    """Sum of the model's log-probabilities of the tokens and of the stop token; for beams / length **
    length_penalty."""
