"""Plans the tasks of a generation job: prompts are encoded and checked before the weights are read."""

from dataclasses import dataclass

from ascendspeed.inference.args import GenerationJob
from ascendspeed.inference.batching import sampling_params
from ascendspeed.inference.engine import SamplingParams
from ascendspeed.inference.prompts import InputPrompt, as_conversation, check_lengths, encode_prompt
from ascendspeed.inference.session import Session
from ascendspeed.utils.errors import UserError


@dataclass(frozen=True)
class TaskPlan:
    """A task with its encoded prompts."""

    task: str
    prompts: list[InputPrompt]
    ids: list[list[int]]
    params: SamplingParams | None
    """None for log-probabilities."""


def plan_task(
    session: Session, job: GenerationJob, task: str, prompts: list[InputPrompt], demonstration: bool
) -> TaskPlan:
    """Encodes the prompts and checks their lengths. Raises `UserError`."""
    args = job.generation
    if task == "chat":
        prompts = [as_conversation(prompt, args.system) for prompt in prompts]
    in_chat = any(prompt.messages for prompt in prompts)
    chat_format = session.chat_format if in_chat else None
    ids = [encode_prompt(prompt, session.tokenizer, chat_format, session.adds_bos) for prompt in prompts]
    check_lengths(prompts, ids, args.max_input_length)
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    new_tokens = 0 if task == "logprobs" else args.max_new_tokens
    session.warn_if_too_long(prompts[longest].where, len(ids[longest]) + new_tokens)
    if task == "logprobs":
        for prompt, tokens in zip(prompts, ids, strict=True):
            if len(tokens) < 2:
                raise UserError(f"{prompt.where} has {len(tokens)} token; log-probabilities need at least 2")
        return TaskPlan(task, prompts, ids, None)
    return TaskPlan(task, prompts, ids, sampling_params(session, job, task, in_chat, demonstration))
