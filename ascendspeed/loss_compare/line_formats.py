"""Formats of one line of a console log: functions that split it into labelled fields, or return None."""

import math
import re
from collections.abc import Callable, Mapping

from ascendspeed.training import metric_lines

Fields = dict[str, str]
"""Label -> text of one log line."""

_COLOR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_PAIR = re.compile(r"(?<![\w/])([A-Za-z][\w/]*(?: \([^)=]*\))?)=(\{[^}]*\}|[^\s,{][^\s,]*)(?=[\s,])")
_PIPELINE = re.compile(r"\bsteps: (\d+) (loss: .*samples/sec: \S+)\s*\n")
_NEMO = re.compile(r"\bTraining epoch (\d+), iteration \d+/\d+ \| (.+\S)\s*\n")
_DICT = re.compile(r"(>> )?\{('loss': .*)\}")
_DICT_PAIR = re.compile(r"'([^']+)': '?([^,'{}]+)'?")
_MINDFORMERS = re.compile(r"\{ (?:Epoch:\[\s*(\d+)/\s*\d+\], )?step:\[\s*(\d+)/\s*(\d+)\], (loss: ?.*)\n")
_MINDFORMERS_PAIR = re.compile(r"([a-z_ ]+): ?\[?\s*([^\s,\]}]+)\]?(?=[,\s])")
_MMENGINE = re.compile(r"\b(?:Iter\(train\) |Epoch\(train\) \[(\d+)\]) ?\[ *(\d+)/ *(\d+)\] +(.*)\n")
_XTUNER = re.compile(r"\[Train\] (?:\(Epoch \d+\) )?Step (\d+)/(\d+) +(.*)\n")
_TITAN = re.compile(r"(?<!validate )\bstep: +(\d+) +(loss: .*)\n")
_COLON_PAIR = re.compile(r"([A-Za-z_]\w*(?:\(\w+\))?): +(\S+)(?=\s|$)")


def without_colors(line: str) -> str:
    """Removes the terminal's color codes."""
    return _COLOR.sub("", line) if "\x1b" in line else line


def megatron_fields(line: str) -> Fields | None:
    """Splits `iteration 10/ 100 | consumed samples: 640 | ... |`, but not NeMo's lines, whose iteration is
    that of the epoch.
    """
    return None if "Training epoch " in line else metric_lines.split_fields(line)


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


def nemo_fields(line: str) -> Fields | None:
    """Splits `Training epoch 0, iteration 3/99 | global_step: 3 | reduced_train_loss: 8.1 | ...` of NeMo.

    `iteration` begins anew in every epoch, so `global_step` is the position. It counts from 0; consumed
    samples show whether this step is included.
    """
    match = _NEMO.search(line) if "reduced_train_loss" in line else None
    if not match:
        return None
    fields = {name: value for name, _, value in (part.partition(": ") for part in match[2].split(" | "))}
    if "global_step" not in fields:
        return None
    step, consumed, batch = (
        int(fields[name]) if fields.get(name, "").isdigit() else None
        for name in ("global_step", "consumed_samples", "global_batch_size")
    )
    if None not in (step, consumed, batch) and consumed == (step + 1) * batch:
        fields["global_step"] = str(step + 1)
    return fields


def _dict_fields(line: str, is_logger: bool) -> Fields | None:
    match = _DICT.search(line) if "'loss'" in line else None
    return dict(_DICT_PAIR.findall(match[2])) if match and bool(match[1]) == is_logger else None


def trainer_fields(line: str) -> Fields | None:
    """Splits `{'loss': 9.5, 'grad_norm': 1.2, 'epoch': 0.12}` of Hugging Face's Trainer (TRL, swift ...)."""
    return _dict_fields(line, is_logger=False)


def llamafactory_fields(line: str) -> Fields | None:
    """Splits `[INFO|...] >> {'loss': 9.5, 'epoch': 0.12}`, which LLaMA-Factory logs next to the Trainer's
    line.
    """
    return _dict_fields(line, is_logger=True)


def mindformers_fields(line: str) -> Fields | None:
    """Splits `{ Epoch:[  1/  2], step:[    2/   19], loss: 10.633, per_step_time: 1752ms, ...` of
    MindFormers; older releases write `loss:[10.633/10.641]`, the loss of the step and a mean.
    """
    match = _MINDFORMERS.search(line) if "step:[" in line else None
    if not match:
        return None
    fields = {name.strip(): value for name, value in _MINDFORMERS_PAIR.findall(f"{match[4]} ")}
    epoch, step, steps_per_epoch = int(match[1] or 1), int(match[2]), match[3]
    fields["step"] = str((epoch - 1) * int(steps_per_epoch) + step)
    if fields.get("per_step_time", "").endswith("ms"):
        fields["ms per iteration"] = fields["per_step_time"].removesuffix("ms")
    if "overflow cond" in fields:
        fields["skipped"] = str(int(fields["overflow cond"] == "True"))
    if "global_norm" in fields:
        fields["grad_norm"] = fields["global_norm"]
    return fields


def _seconds_per_iteration(fields: Fields) -> Fields:
    """Renames `time`, which XTuner gives in seconds."""
    seconds = fields.pop("time", "").removesuffix("s")
    return fields | ({"iter time (s)": seconds} if seconds else {})


def mmengine_fields(line: str) -> Fields | None:
    """Splits `Iter(train) [ 10/720]  lr: 9.0e-05  time: 2.68  loss: 2.69` of MMEngine, which XTuner uses."""
    match = _MMENGINE.search(line) if "(train)" in line else None
    if not match:
        return None
    before = (int(match[1]) - 1) * int(match[3]) if match[1] else 0
    return _seconds_per_iteration(
        {**dict(_COLON_PAIR.findall(match[4])), "step": str(before + int(match[2]))}
    )


def xtuner_fields(line: str) -> Fields | None:
    """Splits `[Train] (Epoch 1) Step 1/8  loss: 9.545  loss(reduced): 9.545  ...` of XTuner.

    `loss` is that of one rank, `loss(reduced)` that of all.
    """
    match = _XTUNER.search(line) if "[Train]" in line else None
    if not match:
        return None
    fields = dict(_COLON_PAIR.findall(match[3]))
    fields["loss"] = fields.get("loss(reduced)", fields.get("loss", ""))
    return _seconds_per_iteration(fields | {"step": match[1], "total steps": match[2]})


def torchtitan_fields(line: str) -> Fields | None:
    """Splits `step:  1  loss:  9.5455  grad_norm:  1.2340  memory:  1.00GiB(1.0%)  tps: 1,234` of
    torchtitan.
    """
    match = _TITAN.search(line) if "tps:" in line else None
    if not match:
        return None
    fields = dict(_COLON_PAIR.findall(match[2]))
    return fields | {"step": match[1], "tps": fields.get("tps", "").replace(",", "")}


LINE_FORMATS: Mapping[str, Callable[[str], Fields | None]] = {
    "console log, iteration N/M | ...": megatron_fields,
    "NeMo's console log": nemo_fields,
    "console log, step=N loss=X": internevo_fields,
    "console log of DeepSpeed's pipeline engine": deepspeed_pipeline_fields,
    "MindFormers' console log": mindformers_fields,
    "XTuner's console log (MMEngine)": mmengine_fields,
    "XTuner's console log": xtuner_fields,
    "torchtitan's console log": torchtitan_fields,
    "console log of Hugging Face's Trainer": trainer_fields,
    "LLaMA-Factory's console log": llamafactory_fields,
}
"""Description -> function that splits a line or returns None."""
