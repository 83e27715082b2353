"""Batches of prompts -> answers as text: by length, with stop strings, each (in fp32) as if it were alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ascendspeed.inference import engine
from ascendspeed.inference.args import GenerationArgs
from ascendspeed.inference.engine import SamplingParams
from ascendspeed.inference.session import Session
from ascendspeed.tokenization.detokenizer import TextStream, decode_until_stop

DEMONSTRATED = {"temperature": 0.7, "top_k": 50, "top_p": 0.95}
"""How the published script drew its demonstration."""
DRAWING = ("sample", "beam-sample")


@dataclass(frozen=True)
class Answer:
    """One answer to one prompt."""

    text: str
    """Up to a stop string."""
    tokens: list[int]
    """All that were generated, those of a stop string too."""
    reason: str
    """"stop", "length" or "end"."""
    score: float
    """Sum of log-probabilities; of a beam: / length ** penalty."""


def sampling_params_of(
    task: str,
    asked: GenerationArgs,
    typed: frozenset[str],
    stops: tuple[int, ...],
    tokens: int,
    show: bool = False,
) -> SamplingParams:
    """How a task chooses tokens. `tokens`: ids that the tokenizer has; `show`: the demonstration. Raises `UserError`."""
    draws = task in DRAWING or (task == "chat" and bool({"temperature", "top_k", "top_p"} & typed))
    names = ("temperature", "top_k", "top_p") if draws else ()
    chosen = {
        name: DEMONSTRATED[name] if show and name not in typed else getattr(asked, name) for name in names
    }
    beams = task in ("beam", "beam-sample")
    params = SamplingParams(
        max_new_tokens=asked.max_new_tokens,
        do_sample=draws,
        repetition_penalty=asked.repetition_penalty,
        num_beams=asked.num_beams if beams else 1,
        length_penalty=asked.length_penalty if beams else 1.0,
        num_return_sequences=1 if task in ("greedy", "chat") else asked.num_return_sequences,
        seed=asked.seed,
        stop_ids=stops,
        vocab_size=tokens,
        **chosen,
    )
    params.check()
    return params


def length_sorted_batches(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Numbers of the prompts, longest first: equal lengths lie together, and what does not fit into memory shows at once."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def generate_answers(
    session: Session,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    params: SamplingParams,
    stops: Sequence[str] = (),
    show: Callable[[str], None] | None = None,
    end: Callable[[], bool] | None = None,
) -> list[list[Answer]]:
    """`num_return_sequences` answers to each prompt of a batch; `numbers`: theirs among all. Collective.

    `show` gets the text of the only prompt's answer as it comes, on every rank. `end`: see `generate.sample`.
    """
    streams: dict[int, TextStream] = {}

    def watch(row: int, token: int) -> bool:
        stream = streams.setdefault(row, TextStream(session.tokenizer, stops))
        piece = stream.push(token)
        if show and piece:
            show(piece)
        return stream.stopped

    watching = params.num_beams == 1 and bool(stops or show)
    found = engine.sample(session.model, prompts, params, watch if watching else None, numbers, end)
    if show and streams and (rest := streams[0].finish()):
        show(rest)
    return [[_answer(session, one, stops) for one in several] for several in found]


def _answer(session: Session, found: engine.Completion, stops: Sequence[str]) -> Answer:
    text, stopped = decode_until_stop(session.tokenizer, found.tokens, stops)
    return Answer(text, found.tokens, "stop" if stopped else found.reason, found.score)
