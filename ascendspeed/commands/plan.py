"""Plans a training run without starting it: the command `intern plan` and tools/plan.py.

python tools/plan.py --model internlm2-7b --devices 8 --device-memory 64 --bf16 --deepspeed --zero-stage 2

All flags of pretrain_intern.py are legal. Nothing is allocated: the real engine runs on tensors without
memory.
"""

import json
import sys

from ascendspeed.planning import command, report
from ascendspeed.planning.command import PlanCommand
from ascendspeed.utils import errors


def main() -> int:
    """Runs the command. Exit code 1: the run does not fit into --device-memory."""
    options, run, notes = command.resolve(sys.argv[1:])
    from ascendspeed.distributed import device as devices

    device = devices.prepare("cpu")
    from ascendspeed.planning import memory_plan

    plan = memory_plan.plan_memory(run, options.devices, device, options.kernels)
    if options.json:
        print(json.dumps(report.as_json(plan, options.device_memory)))
    else:
        for note in notes:
            print(f"note: {note}")
        print(report.memory_table(plan))
        print(report.verdict(plan, options.device_memory))
    fits = options.device_memory is None or plan.peak <= options.device_memory * report.GIB
    return 0 if fits else 1


def run_command() -> None:
    """Runs the command as a program."""
    errors.run(main)


if __name__ == "__main__":
    run_command()


__all__ = ["PlanCommand", "main", "run_command"]
