"""Generates answers as text for batches of prompts, with stop strings and streaming."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ascendspeed.inference import engine
from ascendspeed.inference.args import GenerationJob
from ascendspeed.inference.engine import SamplingParams
from ascendspeed.inference.serving.lookup_sampling import sample_with_lookup
from ascendspeed.inference.session import Session
from ascendspeed.tokenization.chat import control_token_ids
from ascendspeed.tokenization.detokenizer import TextStream, decode_until_stop

SAMPLING_DEFAULTS = {"temperature": 0.7, "top_k": 50, "top_p": 0.95}
"""Sampling flags -> their values in the published script's demonstration."""
SAMPLING_TASKS = ("sample", "beam-sample")
BEAM_TASKS = ("beam", "beam-sample")


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt."""

    text: str
    """Text up to a stop string."""
    tokens: list[int]
    """All generated tokens, those of a stop string included."""
    reason: str
    """"stop", "length" or "end"."""
    score: float
    """Sum of log-probabilities; for beams / length ** length_penalty."""


def sampling_params(
    session: Session, job: GenerationJob, task: str, in_chat: bool, demonstration: bool = False
) -> SamplingParams:
    """Returns the settings of a task; sampling flags that a demonstration does not set have
    `SAMPLING_DEFAULTS`.

    `in_chat`: the stop tokens of the chat format end an answer. Raises `UserError`.
    """
    args = job.generation
    do_sample = task in SAMPLING_TASKS or (task == "chat" and bool(SAMPLING_DEFAULTS.keys() & job.typed))
    sampling: dict[str, Any] = {}
    if do_sample:
        for name, default in SAMPLING_DEFAULTS.items():
            use_default = demonstration and name not in job.typed
            sampling[name] = default if use_default else getattr(args, name)
    uses_beams = task in BEAM_TASKS
    params = SamplingParams(
        max_new_tokens=args.max_new_tokens,
        do_sample=do_sample,
        repetition_penalty=args.repetition_penalty,
        num_beams=args.num_beams if uses_beams else 1,
        length_penalty=args.length_penalty if uses_beams else 1.0,
        num_return_sequences=1 if task in ("greedy", "chat") else args.num_return_sequences,
        seed=args.seed,
        stop_ids=_stop_ids(session, args.stop, in_chat),
        vocab_size=session.usable_vocab_size,
        **sampling,
    )
    params.check()
    return params


def _stop_ids(session: Session, stops: Sequence[str], in_chat: bool) -> tuple[int, ...]:
    """Returns the ids that end an answer, with those of control tokens that stop strings name."""
    named = control_token_ids(session.tokenizer, stops)
    return tuple(sorted({*session.stop_ids(in_chat), *named}))


def length_sorted_batches(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Yields batches of prompt indices, longest first: similar lengths share a batch, and out of memory shows
    at once."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def generate_answers(
    session: Session,
    prompts: Sequence[Sequence[int]],
    prompt_numbers: Sequence[int],
    params: SamplingParams,
    stops: Sequence[str] = (),
    on_text: Callable[[str], None] | None = None,
    should_end: Callable[[], bool] | None = None,
    lookup: int = 0,
) -> list[list[Answer]]:
    """Generates `num_return_sequences` answers to each prompt of a batch. Collective.

    `on_text` receives the text of a single prompt's answer as it is generated, on every rank.
    `prompt_numbers`, `should_end`: see `engine.sample`. `lookup`: see `sample_with_lookup`; 0: none.
    """
    streams: dict[int, TextStream] = {}

    def stop_at_string(row: int, token: int) -> bool:
        stream = streams.setdefault(row, TextStream(session.tokenizer, stops))
        text = stream.push(token)
        if on_text and text:
            on_text(text)
        return stream.stopped

    needs_text = params.num_beams == 1 and bool(stops or on_text)
    stop = stop_at_string if needs_text else None
    if lookup:
        completions = sample_with_lookup(session.model, prompts, params, lookup, stop, should_end)
    else:
        completions = engine.sample(session.model, prompts, params, stop, prompt_numbers, should_end)
    if on_text and streams and (text := streams[0].finish()):
        on_text(text)
    return [[_answer(session, completion, stops) for completion in group] for group in completions]


def _answer(session: Session, completion: engine.Completion, stops: Sequence[str]) -> Answer:
    text, stopped = decode_until_stop(session.tokenizer, completion.tokens, stops)
    return Answer(text, completion.tokens, "stop" if stopped else completion.reason, completion.score)
