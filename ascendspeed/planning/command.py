"""Command line of tools/plan.py: the flags of training, and those of the plan."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from tyro.conf import FlagCreatePairsOff

from ascendspeed.cli import command, parser
from ascendspeed.cli.command import CommandLine
from ascendspeed.cli.compat import TRAIN
from ascendspeed.cli.default_model import note_of_default_model
from ascendspeed.cli.train_args import TrainCommand, find_model, resolve_line
from ascendspeed.config.schema import Run
from ascendspeed.planning.device_table import rates_of
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

MAX_DEVICES = 16384
"""Most devices of a plan: engines loop over the ranks that share optimizer states, and do so on fake tensors
too."""


@dataclass(frozen=True)
class PlanOptions:
    """The devices, and the form of the answer."""

    devices: int = 1
    """Devices (processes) of the run."""
    device_memory: float | None = None
    """Memory of one device in GiB; None: no limit is checked."""
    kernels: Literal["accelerator", "cpu"] = "accelerator"
    """Memory that kernels keep: those of torch on an accelerator, or those of a CPU."""
    device_type: str = "h200"
    """Device whose rates the estimate of the time uses."""
    save_gb_s: float = 1.0
    """GB/s at which all devices together write a checkpoint."""
    search: bool = False
    """Look for layouts: the fastest legal ones that fit into --device-memory, by estimated time."""
    top: int = 3
    """Layouts that a search returns."""
    json: bool = False
    """Print JSON instead of tables."""


@dataclass(frozen=True)
class PlanCommand(TrainCommand):
    """Plans a training run without starting it: memory of every rank that differs, and an estimate of the
    time.

    python tools/plan.py --model internlm2-7b --devices 8 --bf16 --deepspeed --zero-stage 2

    All flags of pretrain_intern.py are legal; --model may also be a folder. Nothing is allocated: the real
    engine runs on tensors without memory.
    """

    plan: FlagCreatePairsOff[PlanOptions] = field(default_factory=PlanOptions)


def resolve(args: Sequence[str]) -> tuple[PlanOptions, Run, list[str]]:
    """Returns the options of the plan, the run that `args` describe and notes for the user.

    Raises `UserError` for what training would refuse before it opens files.
    """
    line = _parse(args)
    plan = line.options.plan
    _check(plan)
    run, notes = resolve_line(line, plan.devices)
    check_supported(run)
    return plan, run, [*note_of_default_model(line), *_batch_note(line, run), *notes]


def resolve_base(args: Sequence[str]) -> tuple[Run, frozenset[str]]:
    """Returns the run that `args` describe for any number of devices, and the fields that they set."""
    line = _parse(args)
    for note in note_of_default_model(line):
        logger.info(f"note: {note}")
    run, _ = resolve_line(line, None)
    check_supported(run)
    return run, line.typed


def _parse(args: Sequence[str]) -> CommandLine[PlanCommand]:
    """Parses `args`; a --model that is a folder becomes --load."""
    line = command.parse(PlanCommand, args, TRAIN, PlanCommand.__doc__ or "")
    options = line.options
    if options.preset.model and Path(options.preset.model).is_dir():
        folder = replace(options.train, load=options.preset.model)
        options = replace(options, preset=replace(options.preset, model=None), train=folder)
    _check_load(options.preset.model, options.train.load)
    # A plan needs neither data nor a folder for checkpoints.
    if not options.data.data_path:
        options = replace(options, data=replace(options.data, data_path=("unused",)))
    if options.train.save is None and options.train.ema_decay is not None:
        options = replace(options, train=replace(options.train, save="unused"))
    return replace(line, options=options)


def _check_load(name: str | None, load: str | None) -> None:
    """Raises `UserError` if the architecture would be that of --load, which holds none: the default would be
    planned in its place."""
    if not name and load and find_model(load) is None:
        reason = (
            "no config.json or run.json of an intact checkpoint" if Path(load).is_dir() else "no such folder"
        )
        raise UserError(f"--load {load}: {reason}, so the architecture is unknown; give --model NAME")


def _batch_note(line: CommandLine[PlanCommand], run: Run) -> list[str]:
    """States the global batch if it follows from the devices, since longer steps need more memory."""
    if "global_batch_size" in line.typed:
        return []
    return [
        f"--global-batch-size is not given: a step has {run.train.global_batch_size} samples, one "
        "micro-batch per replica; with more, gradients are accumulated, which may need more memory"
    ]


def options_of(args: Sequence[str]) -> PlanOptions:
    """The options of the plan alone; the run may be incomplete."""
    plan = command.parse(PlanCommand, args, TRAIN, PlanCommand.__doc__ or "").options.plan
    _check(plan)
    return plan


def training_words(args: Sequence[str]) -> list[str]:
    """The words of `args` without the flags of the plan."""
    kinds = {parser.flag_of(f.name): f.type for f in fields(PlanOptions)}
    words, is_value = [], False
    for word in args:
        flag, has_value, _ = word.partition("=")
        name = flag.replace("_", "-")
        if name in kinds:
            is_value = not has_value and kinds[name] is not bool
        elif is_value:
            is_value = False
        else:
            words.append(word)
    return words


def _check(plan: PlanOptions) -> None:
    """Raises `UserError` for a number out of its range."""
    for name in ("devices", "top"):
        if getattr(plan, name) < 1:
            raise UserError(f"--{name} {getattr(plan, name)} must be at least 1")
    for name in ("device_memory", "save_gb_s"):
        value = getattr(plan, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{parser.flag_of(name)} {value:g} must be above 0")
    if plan.devices > MAX_DEVICES:
        raise UserError(f"--devices {plan.devices}: a plan counts at most {MAX_DEVICES:,}")
    rates_of(plan.device_type)
    if plan.search and plan.device_memory is None:
        raise UserError("--search needs --device-memory, the GiB of one device")


def check_supported(run: Run) -> None:
    """Raises `UserError` for what the planner cannot count."""
    if run.parallel.zero_offload != "none":
        raise UserError(
            f"--zero-offload {run.parallel.zero_offload}: the planner counts the memory of devices only; "
            "plan without it, and subtract the optimizer states"
        )
    if run.parallel.deepspeed_config:
        raise UserError(
            "--deepspeed_config: the planner knows the derived configuration only; leave the file out"
        )
