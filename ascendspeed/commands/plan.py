"""Plans a training run without starting it: the command `intern plan` and tools/plan.py.

python tools/plan.py --model internlm2-7b --devices 8 --device-memory 64 --bf16 --deepspeed --zero-stage 2

All flags of pretrain_intern.py are legal. Nothing is allocated: the real engine runs on tensors without
memory.
"""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ascendspeed.config.schema import Run
from ascendspeed.planning import auto_recompute, command, report, search
from ascendspeed.planning.command import PlanCommand, PlanOptions
from ascendspeed.planning.device_table import rates_of
from ascendspeed.planning.time_estimate import estimate
from ascendspeed.utils import errors

if TYPE_CHECKING:
    from ascendspeed.planning.memory_plan import MemoryPlan

logger = logging.getLogger(__name__)


def main() -> int:
    """Runs the command. Exit code 1: the run does not fit into --device-memory."""
    args = sys.argv[1:]
    options = command.options_of(args)
    return _search(args, options) if options.search else _plan(args)


def _plan(args: Sequence[str]) -> int:
    """Plans one layout."""
    options, run, notes = command.resolve(args)
    execute = _executor(options)
    if budget := run.train.auto_recompute_device_size:
        choice = auto_recompute.choose(run, options.devices, execute)
        run, notes = choice.applied(run), [*notes, choice.text(budget)]
    plan = execute(run)
    time = estimate(run, options.devices, rates_of(options.device_type))
    if options.json:
        print(json.dumps(report.as_json(plan, time, options)))
    else:
        for note in notes:
            print(f"note: {note}")
        print(report.memory_table(plan))
        print(report.verdict(plan, options.device_memory))
        print("\n".join(report.estimate_lines(run, time, options)))
    fits = options.device_memory is None or plan.peak <= options.device_memory * report.GIB
    return 0 if fits else 1


def _search(args: Sequence[str], options: PlanOptions) -> int:
    """Ranks the layouts that fit."""
    words = command.training_words(args)
    if not {"--bf16", "--fp16"} & set(words):
        words.append("--bf16")
        logger.info("note: neither --bf16 nor --fp16 is given: --bf16 is added")
    base, typed = command.resolve_base(words)
    if base.train.auto_recompute_device_size:
        raise errors.UserError(
            f"{auto_recompute.FLAG}: --search chooses the recomputation itself; leave the flag out"
        )
    legal = search.candidates(base, typed, options.devices, rates_of(options.device_type))
    fitting, executed = search.fastest_that_fit(legal, options, _executor(options))
    if options.json:
        print(json.dumps(report.search_json(fitting, words, options)))
    else:
        print(f"{len(legal)} legal layouts; {executed} executed; fastest by estimate that fit:")
        print(report.search_text(fitting, words, options))
    return 0 if fitting else 1


def _executor(options: PlanOptions) -> Callable[[Run], "MemoryPlan"]:
    """Prepares the CPU; returns the function that plans the memory of a run."""
    from ascendspeed.distributed import device as devices

    device = devices.prepare("cpu")
    from ascendspeed.planning import memory_plan

    return lambda run: memory_plan.plan_memory(run, options.devices, device, options.kernels)


def run_command() -> None:
    """Runs the command as a program."""
    errors.run(main)


if __name__ == "__main__":
    run_command()


__all__ = ["PlanCommand", "main", "run_command"]
