"""Command line of tools/plan.py: the flags of training, and those of the plan."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from tyro.conf import FlagCreatePairsOff

from ascendspeed.cli import command
from ascendspeed.cli.compat import TRAIN
from ascendspeed.cli.train_args import TrainCommand, resolve_line
from ascendspeed.config.schema import Run
from ascendspeed.utils.errors import UserError


@dataclass(frozen=True)
class PlanOptions:
    """The devices, and the form of the answer."""

    devices: int = 1
    """Devices (processes) of the run."""
    device_memory: float | None = None
    """Memory of one device in GiB; None: no limit is checked."""
    kernels: Literal["accelerator", "cpu"] = "accelerator"
    """Memory that kernels keep: those of torch on an accelerator, or those of a CPU."""
    json: bool = False
    """Print JSON instead of tables."""


@dataclass(frozen=True)
class PlanCommand(TrainCommand):
    """Plans a training run without starting it: memory of every rank that differs.

    python tools/plan.py --model internlm2-7b --devices 8 --bf16 --deepspeed --zero-stage 2

    All flags of pretrain_intern.py are legal; --model may also be a folder. Nothing is allocated: the real
    engine runs on tensors without memory.
    """

    plan: FlagCreatePairsOff[PlanOptions] = field(default_factory=PlanOptions)


def resolve(args: Sequence[str]) -> tuple[PlanOptions, Run, list[str]]:
    """Returns the options of the plan, the run that `args` describe and notes for the user.

    Raises `UserError` for what training would refuse before it opens files.
    """
    line = command.parse(PlanCommand, args, TRAIN, PlanCommand.__doc__ or "")
    options = line.options
    plan = options.plan
    if plan.devices < 1:
        raise UserError(f"--devices {plan.devices} must be at least 1")
    if plan.device_memory is not None and plan.device_memory <= 0:
        raise UserError(f"--device-memory {plan.device_memory:g} must be above 0")
    if options.preset.model and Path(options.preset.model).is_dir():
        folder = replace(options.train, load=options.preset.model)
        options = replace(options, preset=replace(options.preset, model=None), train=folder)
    if not options.data.data_path:  # a plan needs no data
        options = replace(options, data=replace(options.data, data_path=("unused",)))
    run, notes = resolve_line(replace(line, options=options), plan.devices)
    check_supported(run)
    return plan, run, notes


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
