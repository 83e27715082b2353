"""Interactive conversation at a terminal or through a pipe: rank 0 reads and writes, all ranks generate."""

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
HELP_WORD = "help"
HELP = (
    f"{', '.join(QUIT_WORDS)}: leave; {' or '.join(RESET_WORDS)}: start a new conversation; "
    f"{HELP_WORD}: show this line; "
    f"put a message of several lines between two lines of {QUOTES}; Ctrl-C: end the answer, or leave"
)


@dataclass
class Conversation:
    """Messages so far, and the limits of the history that stays in the prompt."""

    chat_format: ChatFormat
    system: str | None = None
    max_turns: int | None = None
    """Earlier questions with their answers that stay in the prompt; None: all."""
    max_tokens: int | None = None
    """Maximum length of a prompt; the oldest turns are dropped."""
    history: list[Message] = field(default_factory=list)
    question_count: int = 0
    """Questions so far, dropped ones included; the number of a question selects its random stream."""

    def add_question(self, text: str) -> list[int]:
        """Adds a question; returns the ids of the prompt.

        Raises `UserError` if the question alone is too long.
        """
        remembered = len(self.history)
        if self.max_turns is not None:
            remembered = min(2 * self.max_turns, remembered)
        while True:
            history = [*self.history[len(self.history) - remembered :], Message("user", text)]
            system = [Message("system", self.system)] if self.system is not None else []
            ids = self.chat_format.prompt_ids([*system, *history])
            if self.max_tokens is None or len(ids) <= self.max_tokens:
                break
            if not remembered:
                raise UserError(
                    f"the question has {len(ids)} tokens with its template; "
                    f"--max-input-length is {self.max_tokens}"
                )
            remembered -= 2
        self.history = history
        self.question_count += 1
        return ids

    def add_answer(self, tokens: list[int]) -> None:
        """Adds the answer to the last question."""
        self.history.append(self.chat_format.parse_answer(tokens))

    def clear(self) -> None:
        """Removes all messages."""
        self.history = []


def run_chat(
    session: Session,
    conversation: Conversation,
    params: SamplingParams,
    stops: tuple[str, ...],
    read: Callable[[], UserMessage | None],
    lookup: int = 0,
) -> None:
    """Answers messages until the end of the input or a quit word.

    `read` returns the next message on rank 0. Collective.
    """
    is_terminal = session.broadcast_bytes(_stdin_is_terminal) == b"1"
    session.model  # noqa: B018 - loads the weights before the first question
    if is_terminal:
        logger.info(HELP)
    interrupt = InterruptHandler()
    with interrupt if is_terminal else nullcontext():
        while (message := _next_message(session, read, interrupt)) is not None:
            command = "" if message.quoted else message.text.strip()
            if command in QUIT_WORDS:
                return
            if command in RESET_WORDS:
                conversation.clear()
                logger.info("a new conversation: the earlier messages are forgotten")
            elif command == HELP_WORD:
                logger.info(HELP)
            elif message.text.strip():
                try:
                    ids = conversation.add_question(message.text)
                except UserError as error:
                    if not is_terminal:
                        raise
                    logger.info(f"error: {error}")
                    continue
                _answer(session, conversation, ids, params, stops, interrupt, lookup)


def _stdin_is_terminal() -> bytes:
    return b"1" if sys.stdin and sys.stdin.isatty() else b"0"


def _answer(
    session: Session,
    conversation: Conversation,
    ids: list[int],
    params: SamplingParams,
    stops: tuple[str, ...],
    interrupt: InterruptHandler,
    lookup: int,
) -> None:
    """Generates an answer, writes it on rank 0 as it is generated, and adds it to the conversation."""
    on_text = write_stdout if session.grid.rank == 0 else lambda text: None
    session.warn_if_too_long("the conversation", len(ids) + params.max_new_tokens)
    numbers = [conversation.question_count]
    ((answer,),) = generate_answers(
        session, [ids], numbers, params, stops, on_text, lambda: interrupt.requested, lookup
    )
    on_text("\n")
    tokens = answer.tokens
    if answer.text != session.tokenizer.decode(tokens):  # a stop string has cut it: remember what was shown
        tokens = session.tokenizer.encode(answer.text).tolist()
    conversation.add_answer(tokens)


def _next_message(
    session: Session, read: Callable[[], UserMessage | None], interrupt: InterruptHandler
) -> UserMessage | None:
    """Returns the next message on every rank, None at the end.

    Ctrl-C at the prompt raises KeyboardInterrupt on rank 0 after the other ranks have left.
    """
    interrupts: list[KeyboardInterrupt] = []

    def read_bytes() -> bytes | None:
        try:
            with interrupt.raising():
                return _to_bytes(read())
        except KeyboardInterrupt as error:
            interrupts.append(error)
            return None

    data = session.broadcast_bytes(read_bytes)
    if interrupts:
        raise interrupts[0]
    interrupt.requested = False
    return None if data is None else UserMessage(data[1:].decode(), quoted=data.startswith(b'"'))


def _to_bytes(message: UserMessage | None) -> bytes | None:
    """Encodes a message; the first byte tells whether it was quoted."""
    if message is None:
        return None
    return (b'"' if message.quoted else b" ") + message.text.encode("utf-8", "replace")
