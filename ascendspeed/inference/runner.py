"""Runs a generation job: every task over all prompts, then the conversation if there is one."""

import logging
import time
from collections.abc import Callable, Sequence

from ascendspeed.distributed.device import Device
from ascendspeed.inference import engine, records
from ascendspeed.inference.args import GenerationJob
from ascendspeed.inference.batching import generate_answers, length_sorted_batches, sampling_params
from ascendspeed.inference.chat import Conversation, run_chat
from ascendspeed.inference.output import AnswerWriter, write_stdout
from ascendspeed.inference.prompts import (
    InputPrompt,
    demonstration_prompts,
    further_keys,
    prompts_from_file,
    prompts_from_flags,
    prompts_from_json_lines,
    prompts_from_text,
    read_stdin,
)
from ascendspeed.inference.records import Record
from ascendspeed.inference.session import Session
from ascendspeed.inference.stdin import read_stdin_message
from ascendspeed.inference.task_plan import TaskPlan, plan_task

logger = logging.getLogger(__name__)

DEMONSTRATED_TASKS = ("greedy", "sample", "beam", "beam-sample", "logprobs")


def run(job: GenerationJob, device: Device, notes: Sequence[str]) -> None:
    """Runs all tasks of a job. Raises `UserError`."""
    args = job.generation
    prompts = _explicit_prompts(job)
    is_interactive = "chat" in job.tasks and not prompts and args.input_file is None
    session = Session.open(job.spec, device, args.chat_template, is_interactive, args.parse_special_tokens)
    for note in notes:
        logger.info(f"note: {note}")
    if args.input_file == "-" or (not prompts and not is_interactive):
        prompts = _stdin_prompts(session, is_json=args.input_file == "-")
    if note := further_keys(prompts):
        logger.info(f"note: {note}")
    is_demonstration = not prompts
    if is_demonstration:
        prompts = demonstration_prompts()
    tasks = _batch_tasks(job, is_interactive, is_demonstration)
    # All prompts are encoded and checked before the weights are read.
    plans = [plan_task(session, job, task, prompts, is_demonstration) for task in tasks]
    if is_interactive:
        conversation = Conversation(
            session.chat_format, args.system, args.history_turns, args.max_input_length
        )
        chat_params = sampling_params(session, job, "chat", in_chat=True)
    writer = AnswerWriter(args.output_file, session.grid.rank == 0)
    for number, plan in enumerate(plans):
        _run_task(session, job, number, plan, writer)
    writer.finish()
    if is_interactive:
        run_chat(session, conversation, chat_params, args.stop, read_stdin_message, args.lookup)


def _batch_tasks(job: GenerationJob, is_interactive: bool, is_demonstration: bool) -> list[str]:
    """Returns the tasks that run over prompts."""
    if not job.tasks:
        return list(DEMONSTRATED_TASKS if is_demonstration else ("greedy",))
    return [task for task in job.tasks if not (task == "chat" and is_interactive)]


def _explicit_prompts(job: GenerationJob) -> list[InputPrompt]:
    """Returns the prompts of flags and of --input-file, stdin excepted."""
    path = job.generation.input_file
    from_file = [] if path in (None, "-") else prompts_from_file(path)
    return prompts_from_flags(job.generation) + from_file


def _stdin_prompts(session: Session, is_json: bool) -> list[InputPrompt]:
    data = session.broadcast_bytes(read_stdin) or b""
    return prompts_from_json_lines(data, "stdin") if is_json else prompts_from_text(data, "stdin")


def _run_task(
    session: Session, job: GenerationJob, number: int, plan: TaskPlan, writer: AnswerWriter
) -> None:
    total = len(plan.prompts)
    is_streamed = job.generation.stream and plan.params is not None
    batch_size = 1 if is_streamed else job.generation.batch_size
    session.model  # noqa: B018 - loads the weights before the time is taken
    done, new_tokens, start = 0, 0, time.monotonic()
    for batch in length_sorted_batches(plan.ids, batch_size):
        on_text = _stream_writer(session, plan, batch[0]) if is_streamed else None
        for i, (record, text) in zip(batch, _run_batch(session, job, plan, batch, on_text), strict=True):
            new_tokens += record["new_tokens"]
            shown = None if is_streamed else records.heading(plan, i, record) + text
            writer.add((number, i), record, shown)
        done += len(batch)
        if total > batch_size and not is_streamed:
            seconds = max(time.monotonic() - start, 1e-9)
            speed = f", {new_tokens / seconds:.1f} tokens/s" if new_tokens else ""
            logger.info(f"{plan.task}: {done}/{total} prompts{speed}")
    writer.task_done(number)


def _run_batch(
    session: Session,
    job: GenerationJob,
    plan: TaskPlan,
    batch: list[int],
    on_text: Callable[[str], None] | None,
) -> list[tuple[Record, str]]:
    """Returns (record, text for stdout) of every prompt of a batch."""
    ids = [plan.ids[i] for i in batch]
    if plan.params is None:
        logprobs = engine.token_logprobs(session.model, ids, len(batch))
        return [
            records.logprobs_record(session, plan, i, values)
            for i, values in zip(batch, logprobs, strict=True)
        ]
    lookup = 0 if plan.params.is_random or plan.params.num_beams > 1 else job.generation.lookup
    answers = generate_answers(session, ids, batch, plan.params, job.generation.stop, on_text, lookup=lookup)
    if on_text:
        on_text("\n")
    return [records.answers_record(session, plan, i, group) for i, group in zip(batch, answers, strict=True)]


def _stream_writer(session: Session, plan: TaskPlan, index: int) -> Callable[[str], None]:
    """Writes a prompt's heading; returns a function that writes its answer as it is generated, on rank 0."""
    if session.grid.rank:
        return lambda text: None
    write_stdout(records.heading(plan, index) + "-> ")
    return write_stdout
