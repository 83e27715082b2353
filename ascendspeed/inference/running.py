"""A checked job -> answers: every task over all prompts, then the conversation where one is asked for."""

import time
from collections.abc import Sequence
from typing import Any

from ascendspeed import generate
from ascendspeed.device import Device
from ascendspeed.errors import UserError
from ascendspeed.generate import Params
from ascendspeed.inference import prompts as reading
from ascendspeed.inference.answers import Answer, answer, batches, params_of
from ascendspeed.inference.options import Job
from ascendspeed.inference.prompts import Prompt
from ascendspeed.inference.results import Results, block, write
from ascendspeed.inference.session import Session
from ascendspeed.inference.talk import Talk, converse, from_stdin

DEMONSTRATED = ("greedy", "sample", "beam", "beam-sample", "logprobs")


def run(job: Job, device: Device, notes: Sequence[str]) -> None:
    """Does all that the command asks for. Raises `UserError`."""
    asked, given = job.generation, _given(job)
    talks = "chat" in job.tasks and not given and asked.input_file is None
    session = Session.open(job.place, device, asked.chat_template, patient=talks)
    for note in notes:
        session.say(f"note: {note}")
    if asked.input_file == "-" or (not given and job.tasks != ("chat",)):
        given = _from_stdin(session, asked.input_file == "-")
    demonstration = not given
    work = [task for task in job.tasks if not (task == "chat" and talks)]
    if not job.tasks:
        work = list(DEMONSTRATED if demonstration else ("greedy",))
    # Everything is encoded and judged before the weights are read.
    prompts = given or [Prompt(f"demonstration {i}", text) for i, text in enumerate(reading.DEMONSTRATION, 1)]
    plans = [_plan(session, job, task, prompts, demonstration) for task in work]
    talk = Talk(session.chat, asked.system, asked.history_turns, asked.max_input_length) if talks else None
    params = params_of("chat", asked, job.typed, session.stops(True), _tokens(session)) if talks else None
    results = Results(asked.output_file, session.grid.rank == 0)
    for number, plan in enumerate(plans):
        _do(session, job, number, plan, results)
    results.finish()
    if talk and params:
        converse(session, talk, params, asked.stop, from_stdin)


def _given(job: Job) -> list[Prompt]:
    file = job.generation.input_file
    return reading.typed(job.generation) + (reading.from_file(file) if file not in (None, "-") else [])


def _from_stdin(session: Session, lines_are_json: bool) -> list[Prompt]:
    data = session.share(reading.stdin) or b""
    if not lines_are_json:
        return reading.from_text(data, "stdin")
    return reading.from_lines(data, "stdin")


def _tokens(session: Session) -> int:
    return min(session.tokenizer.vocab_size, session.config.vocab_size)


class Plan:
    """A task with its prompts, encoded."""

    def __init__(self, task: str, prompts: list[Prompt], ids: list[list[int]], params: Params | None) -> None:
        self.task, self.prompts, self.ids, self.params = task, prompts, ids, params


def _plan(session: Session, job: Job, task: str, prompts: list[Prompt], demonstration: bool) -> Plan:
    asked = job.generation
    if task == "chat":
        prompts = [reading.conversation(prompt, asked.system) for prompt in prompts]
    talks = any(prompt.messages for prompt in prompts)
    chat = session.chat if talks else None
    ids = [reading.encode(prompt, session.tokenizer, chat, session.add_bos) for prompt in prompts]
    reading.check_lengths(prompts, ids, asked.max_input_length)
    if task == "logprobs":
        for prompt, tokens in zip(prompts, ids, strict=True):
            if len(tokens) < 2:
                raise UserError(f"{prompt.where} has {len(tokens)} token: there is none to follow it")
        return Plan(task, prompts, ids, None)
    params = params_of(task, asked, job.typed, session.stops(talks), _tokens(session), demonstration)
    return Plan(task, prompts, ids, params)


def _do(session: Session, job: Job, number: int, plan: Plan, results: Results) -> None:
    asked, total = job.generation, len(plan.prompts)
    show = write if asked.stream and session.grid.rank == 0 else (lambda text: None) if asked.stream else None
    done = tokens = 0
    session.model  # noqa: B018 - its loading is no part of the speed
    begin = time.monotonic()
    for batch in batches(plan.ids, 1 if asked.stream else asked.batch_size):
        for i, record, shown in _batch(session, asked.stop, plan, batch, show):
            results.add((number, i), record, "" if show and plan.params else shown)
            tokens += record["new_tokens"]
        done += len(batch)
        if total > asked.batch_size and not asked.stream:
            speed = tokens / max(time.monotonic() - begin, 1e-9)
            session.say(f"{plan.task}: {done}/{total} prompts, {speed:.1f} tokens/s")
    results.task_done(number)


def _batch(
    session: Session, stops: Sequence[str], plan: Plan, batch: list[int], show: Any
) -> list[tuple[int, dict[str, Any], str]]:
    """(number, record, how it is shown) of every prompt."""
    ids = [plan.ids[i] for i in batch]
    if plan.params is None:
        found = generate.logprobs(session.model, ids, len(ids))
        return [(i, *_likely(session, plan, i, values.tolist())) for i, values in zip(batch, found, strict=True)]
    if show:
        show(_title(plan, batch[0], "") + "\n")
    answers = answer(session, ids, batch, plan.params, stops, show)
    if show:
        show("\n")
    return [(i, *_answered(session, plan, i, several)) for i, several in zip(batch, answers, strict=True)]


def _title(plan: Plan, i: int, more: str) -> str:
    return block(f"{plan.task} {i + 1}/{len(plan.prompts)}{more}", _asked(plan.prompts[i]), [])


def _asked(prompt: Prompt) -> str:
    return prompt.text if prompt.text is not None else "\n".join(f"{m.role}: {m.content}" for m in prompt.messages)


def _answered(session: Session, plan: Plan, i: int, answers: list[Answer]) -> tuple[dict[str, Any], str]:
    prompt = plan.prompts[i]
    record: dict[str, Any] = {
        "task": plan.task,
        "number": i + 1,
        "prompt": reading.shown(prompt),
        "prompt_tokens": len(plan.ids[i]),
    }
    record["new_tokens"] = sum(len(one.tokens) for one in answers)
    record["answers"] = [{"text": a.text, "reason": a.reason, "score": a.score, "tokens": len(a.tokens)} for a in answers]
    if prompt.messages:
        for entry, one in zip(record["answers"], answers, strict=True):
            message = session.chat.message(one.tokens)
            if set(message) > {"role", "content"}:
                entry["message"] = message
    ended = ", ".join(f"{one.reason} after {len(one.tokens)} tokens" for one in answers)
    return record, block(f"{plan.task} {i + 1}/{len(plan.prompts)}: {ended}", _asked(prompt), [one.text for one in answers])


def _likely(session: Session, plan: Plan, i: int, values: list[float]) -> tuple[dict[str, Any], str]:
    ids, total = plan.ids[i], sum(values)
    pieces = [session.tokenizer.decode([token]) for token in ids[1:]]
    record = {
        "task": plan.task,
        "number": i + 1,
        "prompt": reading.shown(plan.prompts[i]),
        "prompt_tokens": len(ids),
        "new_tokens": 0,
    }
    record |= {"tokens": ids[1:], "pieces": pieces, "logprobs": values, "logprob": total}
    listed = [f"{value:10.4f}  {token:7}  {piece!r}" for value, token, piece in zip(values, ids[1:], pieces, strict=True)]
    mean = f"log-probability {total:.4f}, {total / len(values):.4f} per token"
    return record, "\n".join([f"== logprobs {i + 1}/{len(plan.prompts)}: {mean}", _asked(plan.prompts[i]), *listed])
