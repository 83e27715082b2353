"""Console logs: lines of Megatron's look (ours, Megatron-LM, AscendSpeed, MindSpeed, GPT-NeoX), InternEvo's and DeepSpeed's."""

import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from ascendspeed.loss_compare.curve import Curve, Digits, Step, continuous, step_of
from ascendspeed.training import metrics_log

_PAIR = re.compile(r"(?<![\w/])([A-Za-z][\w/]*(?: \([^)=]*\))?)=(\{[^}]*\}|[^\s,{][^\s,]*)(?=[\s,])")
_PIPELINE = re.compile(r"\bsteps: (\d+) (loss: .*samples/sec: \S+)\s*\n")
_RUN = re.compile(r"(?:^|\s)run: (\{.*\})\s*$")
_DEVICE = re.compile(r"(?:^|\s)device: (\w.*\d+ processes.*)$")
_ARGUMENT = re.compile(r"^\s*(?:\S+:\s+)?(\w+) \.{3,} (.*?)\s*$")

Said = dict[str, str]


def pairs(line: str) -> Said | None:
    """`step=17,loss=9.81,grad_norm=4.17,...`, with commas or blanks: InternEvo's line. Norms of parts become that of the whole."""
    if "loss=" not in line:
        return None
    said = dict(_PAIR.findall(line))
    if "loss" not in said or not said.keys() & {"step", "global_step", "iteration"}:
        return None
    if said.get("grad_norm", "").startswith("{"):
        norms = re.findall(r":\s*([-+.\deE]+|nan|inf)", said["grad_norm"])
        said["grad_norm"] = str(math.hypot(*map(float, norms)))
    return said


def pipeline(line: str) -> Said | None:
    """`steps: 200 loss: 5.5508 iter time (s): 0.936 samples/sec: 136.706`: DeepSpeed's pipeline engine."""
    match = _PIPELINE.search(line) if "samples/sec" in line else None
    return match and {"step": match[1], **dict(re.findall(r"([a-z][a-z/ ()]*?): (\S+)", match[2]))}


DIALECTS: tuple[tuple[str, Callable[[str], Said | None]], ...] = (
    ("console log, iteration N/M | ...", metrics_log.split_fields),
    ("console log, step=N loss=X", pairs),
    ("console log of DeepSpeed's pipeline engine", pipeline),
)


def read(path: str, lines: Iterable[str]) -> Curve:
    """The curve in the lines of a console log, in the first dialect that says a loss; without steps when none does."""
    steps: dict[str, list[Step]] = {kind: [] for kind, _ in DIALECTS}
    digits = {kind: Digits() for kind in steps}
    config, arguments, device = None, {}, None
    for line in lines:
        for kind, dialect in DIALECTS:
            said = dialect(line)
            step = step_of(said) if said else None
            if step:
                steps[kind].append(step)
                digits[kind].count(said)
                break
        else:
            if match := _RUN.search(line):
                config = _json(match[1]) or config
            elif match := _DEVICE.search(line):
                device = match[1].strip()
            elif match := _ARGUMENT.match(line):
                arguments[match[1]] = match[2]
    kind = next((kind for kind in steps if any(step.loss is not None for step in steps[kind])), "console log")
    kept, replaced = continuous(steps.get(kind, ()))
    return Curve(
        path, kind, kept, config or arguments or None, device, digits[kind].found if kept else {}, replaced
    )


def _json(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
