"""Formats answers and log-probabilities as records of the output file and as text for stdout."""

from typing import Any

from torch import Tensor

from ascendspeed.inference.batching import Answer
from ascendspeed.inference.prompts import prompt_as_json
from ascendspeed.inference.session import Session
from ascendspeed.inference.task_plan import TaskPlan

Record = dict[str, Any]


def heading(plan: TaskPlan, index: int, record: Record | None = None) -> str:
    """Returns the lines before an answer on stdout; `record`: adds the reasons why the answers ended."""
    prompt = plan.prompts[index]
    answers = record.get("answers", []) if record else []
    reasons = ", ".join(f"{answer['reason']} after {answer['tokens']} tokens" for answer in answers)
    text = prompt.text
    if text is None:
        text = "\n".join(f"{message.role}: {message.content}" for message in prompt.messages)
    return f"== {plan.task} {index + 1}/{len(plan.prompts)}{': ' if reasons else ''}{reasons}\n{text}\n"


def answers_record(session: Session, plan: TaskPlan, index: int, answers: list[Answer]) -> tuple[Record, str]:
    """Returns the record of a prompt's answers and their text for stdout."""
    entries = []
    for answer in answers:
        entry = {
            "text": answer.text,
            "reason": answer.reason,
            "score": answer.score,
            "tokens": len(answer.tokens),
        }
        if plan.prompts[index].messages:
            message = session.chat_format.answer_message(answer.tokens)
            if len(message) > 2:  # more than role and content: the answer calls tools
                entry["message"] = message
        entries.append(entry)
    new_tokens = sum(len(answer.tokens) for answer in answers)
    record = _prompt_record(plan, index, new_tokens) | {"answers": entries}
    return record, "\n".join(f"-> {answer.text}" for answer in answers)


def logprobs_record(session: Session, plan: TaskPlan, index: int, logprobs: Tensor) -> tuple[Record, str]:
    """Returns the record of a prompt's log-probabilities [n - 1] and their table for stdout."""
    ids = plan.ids[index][1:]
    values = logprobs.tolist()
    total = sum(values)
    pieces = [session.tokenizer.decode([token]) for token in ids]
    record = _prompt_record(plan, index, 0) | {
        "tokens": ids,
        "pieces": pieces,
        "logprobs": values,
        "logprob": total,
    }
    lines = [
        f"{value:10.4f}  {token:7}  {piece!r}"
        for value, token, piece in zip(values, ids, pieces, strict=True)
    ]
    lines.append(f"{total:10.4f}  in all, {total / len(values):.4f} per token")
    return record, "\n".join(lines)


def _prompt_record(plan: TaskPlan, index: int, new_tokens: int) -> Record:
    prompt = plan.prompts[index]
    return {
        "task": plan.task,
        "number": index + 1,
        **prompt.further,
        "prompt": prompt_as_json(prompt),
        "prompt_tokens": len(plan.ids[index]),
        "new_tokens": new_tokens,
    }
