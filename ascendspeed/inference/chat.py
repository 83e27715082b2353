"""A conversation, at a terminal or through a pipe: rank 0 reads and writes, all ranks answer."""

import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

from ascendspeed.inference.batching import generate_answers
from ascendspeed.inference.engine import SamplingParams
from ascendspeed.inference.interrupt import InterruptHandler
from ascendspeed.inference.output import write_stdout
from ascendspeed.inference.session import Session
from ascendspeed.inference.stdin import QUOTES, UserMessage
from ascendspeed.tokenization.chat import ChatFormat, Message
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

QUIT_WORDS = ("q", "quit", "exit")
RESET_WORDS = ("clear", "new")
HELP = (
    f"{', '.join(QUIT_WORDS)}: leave; {' or '.join(RESET_WORDS)}: start anew; several lines stand between two lines of {QUOTES}; "
    "Ctrl-C: end the answer, or leave"
)


@dataclass
class Conversation:
    """What has been said, and how much of it is remembered."""

    chat_format: ChatFormat
    system: str | None = None
    turns: int | None = None
    """Questions with their answers, before the one that is asked; None: all."""
    longest: int | None = None
    """Tokens of a prompt; the oldest turns go for it."""
    history: list[Message] = field(default_factory=list)
    asked: int = 0
    """Questions so far, forgotten ones too: what is drawn for each goes by its number."""

    def ask(self, text: str) -> list[int]:
        """Ids of the conversation with a new question. Raises `UserError` when this alone is too long."""
        kept = len(self.history) if self.turns is None else min(2 * self.turns, len(self.history))
        system = [Message("system", self.system)] if self.system is not None else []
        while True:
            ids = self.chat_format.prompt_ids(
                [*system, *self.history[len(self.history) - kept :], Message("user", text)]
            )
            if self.longest is None or len(ids) <= self.longest:
                break
            if not kept:
                raise UserError(
                    f"the question has {len(ids)} tokens with its template; --max-input-length is {self.longest}"
                )
            kept -= 2
        self.history = [*self.history[len(self.history) - kept :], Message("user", text)]
        self.asked += 1
        return ids

    def answered(self, tokens: list[int]) -> None:
        """The answer to the last question."""
        self.history.append(self.chat_format.parse_answer(tokens))

    def clear(self) -> None:
        """Forgets all of it."""
        self.history = []


def run_chat(
    session: Session,
    talk: Conversation,
    params: SamplingParams,
    stops: tuple[str, ...],
    read: Callable[[], UserMessage | None],
) -> None:
    """Until the end of the input or a word to leave. `read` gives the next message on rank 0. Collective."""
    terminal = session.broadcast_bytes(lambda: b"1" if sys.stdin and sys.stdin.isatty() else b"0") == b"1"
    show = write_stdout if session.grid.rank == 0 else lambda text: None
    session.model  # noqa: B018 - is read before the first question
    if terminal:
        logger.info(HELP)
    interruption = InterruptHandler()
    with interruption if terminal else nullcontext():
        while (data := _next(session, read, interruption)) is not None:
            text = data[1:].decode()
            word = "" if data.startswith(b'"') else text.strip()
            if word in QUIT_WORDS:
                return
            if word in RESET_WORDS:
                talk.clear()
            elif text.strip():
                try:
                    ids = talk.ask(text)
                except UserError as error:
                    if not terminal:
                        raise
                    logger.info(f"error: {error}")
                    continue
                session.warn_if_too_long("the conversation", len(ids) + params.max_new_tokens)
                found = generate_answers(
                    session, [ids], [talk.asked], params, stops, show, lambda: interruption.asked
                )[0][0]
                show("\n")
                talk.answered(
                    found.tokens
                    if found.text == session.tokenizer.decode(found.tokens)
                    else _plain(session, found.text)
                )


def _next(
    session: Session, read: Callable[[], UserMessage | None], interruption: InterruptHandler
) -> bytes | None:
    """The next message, on every rank; None at the end. Who leaves by Ctrl-C lets the other ranks leave first."""
    left: list[KeyboardInterrupt] = []

    def get() -> bytes | None:
        try:
            with interruption.leaving():
                return _packed(read())
        except KeyboardInterrupt as leave:
            left.append(leave)
            return None

    data = session.broadcast_bytes(get)
    if left:
        raise left[0]
    interruption.asked = False
    return data


def _plain(session: Session, text: str) -> list[int]:
    """Of an answer that a stop string has cut: what is left of it."""
    return session.tokenizer.encode(text).tolist()


def _packed(said: UserMessage | None) -> bytes | None:
    return None if said is None else (b'"' if said.quoted else b" ") + said.text.encode("utf-8", "replace")
