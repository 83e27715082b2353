"""--auto-recompute-device-size: the fewest layers whose recomputation makes a run fit, by the planner's
count, and the check of that count on a device.

`python -m ascendspeed.planning.auto_recompute` answers a question on stdin in a process of its own, because
a plan needs one without process groups and without a device.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ascendspeed.cli import validation
from ascendspeed.config import schema
from ascendspeed.config.pipeline_stages import pipeline_stage_layers
from ascendspeed.config.schema import Run
from ascendspeed.planning import command
from ascendspeed.training.metric_lines import EvalLine, TrainLine
from ascendspeed.utils.errors import UserError

if TYPE_CHECKING:
    from ascendspeed.distributed.device import Device
    from ascendspeed.distributed.process_groups import ProcessGrid

logger = logging.getLogger(__name__)

FLAG = "--auto-recompute-device-size"
MIB = 2**20
TOLERANCE = 0.05
"""Share by which the measured peak may differ from the planned one without a warning."""
STEPS = 2
"""Steps after which the peak is measured: the second one has all states that the first one creates."""
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Choice:
    """Layers to recompute."""

    layers: int
    """In every (virtual) pipeline stage."""
    of: int
    """Layers of the largest (virtual) pipeline stage."""
    peak: int
    """Planned bytes of the rank that needs most."""
    first_peak: int
    """Planned bytes of rank 0."""
    parts: dict[str, int]
    """Category -> bytes at the peak of the rank that needs most."""

    def applied(self, run: Run) -> Run:
        """The run that recomputes these layers."""
        return with_recomputed(run, self.layers, self.of)

    def text(self, budget: int) -> str:
        """Sentence with the sum; `budget` in MiB."""
        sum_ = " + ".join(f"{name} {size / MIB:,.0f}" for name, size in self.parts.items() if size)
        fits = "" if self.peak <= budget * MIB else f", {self.peak / MIB - budget:,.0f} more than that"
        return (
            f"{FLAG} {budget}: {self.layers} of {self.of} layers of a pipeline stage are recomputed; planned "
            f"peak per device in MiB: {sum_} = {self.peak / MIB:,.0f}{fits}"
        )


def with_recomputed(run: Run, layers: int, of: int) -> Run:
    """The run that recomputes the first `layers` of the `of` layers of every (virtual) pipeline stage."""
    if not layers:
        settings: dict[str, Any] = {"recompute_granularity": "none"}
    elif layers == of:
        settings = {"recompute_granularity": "full"}
    else:
        settings = {
            "recompute_granularity": "full",
            "recompute_method": "block",
            "recompute_num_layers": layers,
        }
    return replace(run, train=replace(run.train, **settings))


def choose(run: Run, devices: int, plan: Callable[[Run], Any]) -> Choice:
    """The fewest layers with which the run fits into its --auto-recompute-device-size; all if none do.

    `plan(run)` gives a `MemoryPlan`. Raises `UserError` for what the planner cannot count.
    """
    command.check_supported(run)
    parallel = run.parallel
    budget = run.train.auto_recompute_device_size
    assert budget is not None
    stages = pipeline_stage_layers(run.model.num_layers, parallel)
    count = max(stages) // parallel.num_virtual_stages_per_pipeline_rank
    plans: dict[int, Any] = {}

    def excess(layers: int) -> float:
        candidate = with_recomputed(run, layers, count)
        validation.check_run(candidate, devices)
        plans[layers] = plan(candidate)
        return plans[layers].peak - budget * MIB

    layers = _fewest(excess, count)
    worst = max(plans[layers].ranks, key=lambda rank: rank.peak)
    return Choice(layers, count, worst.peak, plans[layers].ranks[0].peak, worst.at_peak)


def _fewest(excess: Callable[[int], float], most: int) -> int:
    """The least number in 0 ... most whose `excess`, which decreases, is not above 0; `most` if none is.

    Tries the number where a straight line would cross 0.
    """
    low, above = 0, excess(0)
    if above <= 0:
        return 0
    high, below = most, excess(most)
    if below > 0:
        return most
    while high - low > 1:
        guess = low + round((high - low) * above / max(above - below, 1))
        middle = min(max(guess, low + 1), high - 1)
        value = excess(middle)
        if value > 0:
            low, above = middle, value
        else:
            high, below = middle, value
    return high


def apply(run: Run, grid: "ProcessGrid", device: "Device") -> tuple[Run, Choice | None]:
    """Returns the run with the recomputation that its flag asks for, and the choice, if there is one.

    Rank 0 plans; collective. What the planner cannot count recomputes every layer.
    """
    budget = run.train.auto_recompute_device_size
    if budget is None:
        return run, None
    try:
        command.check_supported(run)
    except UserError as error:
        logger.warning(f"{FLAG}: every layer is recomputed, as nothing was planned: {error}")
        return replace(run, train=replace(run.train, recompute_granularity="full")), None
    answer = _ask(run, grid.world, device.kind) if grid.rank == 0 else {}
    answer = grid.all_gather_object(answer)[0]
    if "error" in answer:
        raise UserError(f"{FLAG} {budget}: {answer['error']}")
    choice = Choice(**answer)
    is_enough = choice.peak <= budget * MIB
    logger.log(logging.INFO if is_enough else logging.WARNING, choice.text(budget))
    return choice.applied(run), choice


def _ask(run: Run, devices: int, kind: str) -> dict[str, Any]:
    """Plans in another process."""
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    question = {"run": schema.to_dict(run), "devices": devices, "kernels": _kernels(kind)}
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(question),
        env=environment | {"PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"the planner ended with {done.returncode}"]
        return {"error": f"{lines[-1].removeprefix('error: ')}; use --recompute-granularity instead"}
    return json.loads(done.stdout.splitlines()[-1])


def _kernels(kind: str) -> str:
    return "cpu" if kind == "cpu" else "accelerator"


class PeakCheck:
    """Compares the measured peak of rank 0 with the plan, once; a `MetricsSink`."""

    name = "memory plan"

    def __init__(self, choice: Choice, kind: str, step: int) -> None:
        """`kind`: device; `step`: iterations that were done before."""
        self.planned, self.after = choice.first_peak, step + STEPS
        self.is_done = kind == "cpu"
        if self.is_done:
            logger.info(f"note: {FLAG}: on a CPU the peak of the steps is planned, and not measured")

    def write(self, line: TrainLine | EvalLine) -> None:
        """Looks at the first line after enough steps."""
        if self.is_done or not isinstance(line, TrainLine) or line.iteration < self.after:
            return
        self.is_done = True
        assert line.memory_gib is not None
        measured = line.memory_gib * 1024
        difference = measured / (self.planned / MIB) - 1
        text = (
            f"measured peak {measured:,.0f} MiB on rank 0, planned {self.planned / MIB:,.0f} "
            f"({difference:+.1%})"
        )
        if abs(difference) > TOLERANCE:
            logger.warning(f"{FLAG}: {text}: more than {TOLERANCE:.0%} apart")
        else:
            logger.info(f"{FLAG}: {text}")

    def close(self) -> None:
        """Nothing is open."""


def main() -> None:
    """Answers a question on stdin."""
    question = json.loads(sys.stdin.read())
    from ascendspeed.distributed import device as devices

    device = devices.prepare("cpu")
    from ascendspeed.planning import memory_plan

    run, count = schema.from_dict(question["run"]), question["devices"]
    choice = choose(
        run, count, lambda candidate: memory_plan.plan_memory(candidate, count, device, question["kernels"])
    )
    print(json.dumps(asdict(choice)))


if __name__ == "__main__":
    from ascendspeed.utils import errors

    errors.run(main)
