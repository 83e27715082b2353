"""A checked job -> answers: every task over all prompts, then the conversation where one is asked for."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ascendspeed.distributed.device import Device
from ascendspeed.inference import engine
from ascendspeed.inference import prompts as reading
from ascendspeed.inference.args import GenerationJob
from ascendspeed.inference.batching import Answer, generate_answers, length_sorted_batches, sampling_params_of
from ascendspeed.inference.chat import Conversation, run_chat
from ascendspeed.inference.engine import SamplingParams
from ascendspeed.inference.output import AnswerWriter, write_stdout
from ascendspeed.inference.prompts import InputPrompt
from ascendspeed.inference.session import Session
from ascendspeed.inference.stdin import read_stdin_message
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

DEMONSTRATED = ("greedy", "sample", "beam", "beam-sample", "logprobs")
Record = dict[str, Any]


@dataclass(frozen=True)
class TaskPlan:
    """A task with its prompts, encoded."""

    task: str
    prompts: list[InputPrompt]
    ids: list[list[int]]
    params: SamplingParams | None
    """None for log-probabilities."""


def run(job: GenerationJob, device: Device, notes: Sequence[str]) -> None:
    """Does all that the command asks for. Raises `UserError`."""
    asked, given = job.generation, _given(job)
    talks = "chat" in job.tasks and not given and asked.input_file is None
    session = Session.open(job.spec, device, asked.chat_template, patient=talks)
    for note in notes:
        logger.info(f"note: {note}")
    if asked.input_file == "-" or (not given and not talks):
        given = _from_stdin(session, asked.input_file == "-")
    demonstration = not given
    work = [task for task in job.tasks if not (task == "chat" and talks)]
    if not job.tasks:
        work = list(DEMONSTRATED if demonstration else ("greedy",))
    # Everything is encoded and judged before the weights are read.
    prompts = given or [
        InputPrompt(f"demonstration {i}", text) for i, text in enumerate(reading.DEMONSTRATION, 1)
    ]
    plans = [_plan(session, job, task, prompts, demonstration) for task in work]
    talk = (
        Conversation(session.chat_format, asked.system, asked.history_turns, asked.max_input_length)
        if talks
        else None
    )
    params = (
        sampling_params_of("chat", asked, job.typed, session.stop_ids(True), _tokens(session))
        if talks
        else None
    )
    results = AnswerWriter(asked.output_file, session.grid.rank == 0)
    for number, plan in enumerate(plans):
        _do(session, job, number, plan, results)
    results.finish()
    if talk and params:
        run_chat(session, talk, params, asked.stop, read_stdin_message)


def _given(job: GenerationJob) -> list[InputPrompt]:
    file = job.generation.input_file
    return reading.prompts_from_flags(job.generation) + (
        reading.prompts_from_file(file) if file not in (None, "-") else []
    )


def _from_stdin(session: Session, lines_are_json: bool) -> list[InputPrompt]:
    data = session.broadcast_bytes(reading.read_stdin) or b""
    if not lines_are_json:
        return reading.prompts_from_text(data, "stdin")
    return reading.prompts_from_json_lines(data, "stdin")


def _tokens(session: Session) -> int:
    return min(session.tokenizer.vocab_size, session.config.vocab_size)


def _plan(
    session: Session, job: GenerationJob, task: str, prompts: list[InputPrompt], demonstration: bool
) -> TaskPlan:
    asked = job.generation
    if task == "chat":
        prompts = [reading.as_conversation(prompt, asked.system) for prompt in prompts]
    talks = any(prompt.messages for prompt in prompts)
    chat = session.chat_format if talks else None
    ids = [reading.encode_prompt(prompt, session.tokenizer, chat, session.adds_bos) for prompt in prompts]
    reading.check_lengths(prompts, ids, asked.max_input_length)
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    session.warn_if_too_long(
        prompts[longest].where, len(ids[longest]) + (asked.max_new_tokens if task != "logprobs" else 0)
    )
    if task == "logprobs":
        for prompt, tokens in zip(prompts, ids, strict=True):
            if len(tokens) < 2:
                raise UserError(f"{prompt.where} has {len(tokens)} token: there is none to follow it")
        return TaskPlan(task, prompts, ids, None)
    params = sampling_params_of(
        task, asked, job.typed, session.stop_ids(talks), _tokens(session), demonstration
    )
    return TaskPlan(task, prompts, ids, params)


def _do(session: Session, job: GenerationJob, number: int, plan: TaskPlan, results: AnswerWriter) -> None:
    asked, total = job.generation, len(plan.prompts)
    streams = asked.stream and plan.params is not None
    size = 1 if streams else asked.batch_size
    session.model  # noqa: B018 - its loading is no part of the speed
    done, tokens, begin = 0, 0, time.monotonic()
    for batch in length_sorted_batches(plan.ids, size):
        if plan.params is None:
            records = _likely(session, plan, batch)
        else:
            show = _streaming(session, plan, batch[0]) if streams else None
            records = _answered(
                session,
                plan,
                batch,
                generate_answers(session, [plan.ids[i] for i in batch], batch, plan.params, asked.stop, show),
            )
            tokens += sum(record["new_tokens"] for record, _ in records)
            if show:
                show("\n")
        for i, (record, text) in zip(batch, records, strict=True):
            results.add((number, i), record, None if streams else _heading(plan, i, record) + text)
        done += len(batch)
        if total > size and not streams:
            speed = f", {tokens / max(time.monotonic() - begin, 1e-9):.1f} tokens/s" if tokens else ""
            logger.info(f"{plan.task}: {done}/{total} prompts{speed}")
    results.task_done(number)


def _streaming(session: Session, plan: TaskPlan, i: int) -> Callable[[str], None]:
    """Shows the answer to one prompt as it comes, on rank 0."""
    if session.grid.rank:
        return lambda text: None
    write_stdout(_heading(plan, i, {}) + "-> ")
    return write_stdout


def _heading(plan: TaskPlan, i: int, record: Record) -> str:
    prompt = plan.prompts[i]
    ended = ", ".join(f"{one['reason']} after {one['tokens']} tokens" for one in record.get("answers", []))
    asked = (
        prompt.text
        if prompt.text is not None
        else "\n".join(f"{m.role}: {m.content}" for m in prompt.messages)
    )
    return f"== {plan.task} {i + 1}/{len(plan.prompts)}{': ' if ended else ''}{ended}\n{asked}\n"


def _record(plan: TaskPlan, i: int, new_tokens: int) -> Record:
    prompt = reading.prompt_as_json(plan.prompts[i])
    return {
        "task": plan.task,
        "number": i + 1,
        "prompt": prompt,
        "prompt_tokens": len(plan.ids[i]),
        "new_tokens": new_tokens,
    }


def _answered(
    session: Session, plan: TaskPlan, batch: list[int], answers: list[list[Answer]]
) -> list[tuple[Record, str]]:
    """A record and how it is shown, for each prompt of a batch."""
    found = []
    for i, several in zip(batch, answers, strict=True):
        entries = [
            {"text": a.text, "reason": a.reason, "score": a.score, "tokens": len(a.tokens)} for a in several
        ]
        if plan.prompts[i].messages:
            for entry, one in zip(entries, several, strict=True):
                message = session.chat_format.answer_message(one.tokens)
                entry |= {"message": message} if len(message) > 2 else {}  # it calls tools
        record = _record(plan, i, sum(len(one.tokens) for one in several)) | {"answers": entries}
        found.append((record, "\n".join(f"-> {one.text}" for one in several)))
    return found


def _likely(session: Session, plan: TaskPlan, batch: list[int]) -> list[tuple[Record, str]]:
    """The same for log-probabilities."""
    found = []
    for i, values in zip(
        batch, engine.token_logprobs(session.model, [plan.ids[i] for i in batch], len(batch)), strict=True
    ):
        ids, each = plan.ids[i][1:], values.tolist()
        pieces = [session.tokenizer.decode([token]) for token in ids]
        record = _record(plan, i, 0) | {
            "tokens": ids,
            "pieces": pieces,
            "logprobs": each,
            "logprob": sum(each),
        }
        lines = [
            f"{value:10.4f}  {token:7}  {piece!r}"
            for value, token, piece in zip(each, ids, pieces, strict=True)
        ]
        found.append(
            (record, "\n".join([*lines, f"{sum(each):10.4f}  in all, {sum(each) / len(each):.4f} per token"]))
        )
    return found
