"""Parser of console logs: Megatron's format (this project, Megatron-LM, AscendSpeed, MindSpeed, GPT-NeoX),
InternEvo, DeepSpeed.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from ascendspeed.loss_compare.curve import (
    LoggedStep,
    LossCurve,
    SignificantDigits,
    drop_replaced_steps,
    parse_step,
)
from ascendspeed.training import metrics_log

_PAIR = re.compile(r"(?<![\w/])([A-Za-z][\w/]*(?: \([^)=]*\))?)=(\{[^}]*\}|[^\s,{][^\s,]*)(?=[\s,])")
_PIPELINE = re.compile(r"\bsteps: (\d+) (loss: .*samples/sec: \S+)\s*\n")
_RUN = re.compile(r"(?:^|\s)run: (\{.*\})\s*$")
_DEVICE = re.compile(r"(?:^|\s)device: (\w.*\d+ processes.*)$")
_ARGUMENT = re.compile(r"^\s*(?:\S+:\s+)?(\w+) \.{3,} (.*?)\s*$")

Fields = dict[str, str]
"""Label -> text of one log line."""


def internevo_fields(line: str) -> Fields | None:
    """Splits `step=17,loss=9.81,grad_norm=4.17,...`, separated by commas or blanks.

    Norms of parameter groups are combined into the norm of the whole.
    """
    if "loss=" not in line:
        return None
    fields = dict(_PAIR.findall(line))
    if "loss" not in fields or not fields.keys() & {"step", "global_step", "iteration"}:
        return None
    if fields.get("grad_norm", "").startswith("{"):
        norms = re.findall(r":\s*([-+.\deE]+|nan|inf)", fields["grad_norm"])
        fields["grad_norm"] = str(math.hypot(*map(float, norms)))
    return fields


def deepspeed_pipeline_fields(line: str) -> Fields | None:
    """Splits `steps: 200 loss: 5.5508 iter time (s): 0.936 samples/sec: 136.706` of DeepSpeed's pipeline
    engine.
    """
    match = _PIPELINE.search(line) if "samples/sec" in line else None
    return match and {"step": match[1], **dict(re.findall(r"([a-z][a-z/ ()]*?): (\S+)", match[2]))}


LINE_FORMATS: tuple[tuple[str, Callable[[str], Fields | None]], ...] = (
    ("console log, iteration N/M | ...", metrics_log.split_fields),
    ("console log, step=N loss=X", internevo_fields),
    ("console log of DeepSpeed's pipeline engine", deepspeed_pipeline_fields),
)
"""(description, function that splits a line or returns None)."""


def parse_console_log(path: str, lines: Iterable[str]) -> LossCurve:
    """Parses a console log in the first format that has a loss; the curve has no steps if none has."""
    steps: dict[str, list[LoggedStep]] = {kind: [] for kind, _ in LINE_FORMATS}
    digits = {kind: SignificantDigits() for kind in steps}
    config: dict[str, Any] | None = None
    arguments: dict[str, str] = {}
    device = None
    for line in lines:
        for kind, split in LINE_FORMATS:
            fields = split(line)
            step = parse_step(fields) if fields else None
            if step:
                steps[kind].append(step)
                digits[kind].count(fields)
                break
        else:
            if match := _RUN.search(line):
                config = _json_object(match[1]) or config
            elif match := _DEVICE.search(line):
                device = match[1].strip()
            elif match := _ARGUMENT.match(line):
                arguments[match[1]] = match[2]
    kind = next((kind for kind in steps if any(step.loss is not None for step in steps[kind])), "console log")
    run_steps, replaced = drop_replaced_steps(steps.get(kind, ()))
    return LossCurve(
        path,
        kind,
        run_steps,
        config or arguments or None,
        device,
        digits[kind].by_field if run_steps else {},
        replaced,
    )


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
