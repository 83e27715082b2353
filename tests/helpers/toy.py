"""A training run with a toy engine: real loop, fault tolerance and checkpoints, small numeric engine.

The model is one weight [VOCABULARY, WIDTH]; every rank owns its share of the rows of master and moments, as
under ZeRO. The loss of a sample is a quadratic in the weight that depends on the sample's number, so that a
wrong order, a lost moment or a repeated sample changes every later loss.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

from ascendspeed.cli.command import world_size
from ascendspeed.cli.train_args import resolve
from ascendspeed.distributed import device as devices

ROWS, WIDTH, DECAY = 64, 16, 0.9
SMALL = (
    "--num-layers 1 --hidden-size 16 --ffn-hidden-size 16 --num-attention-heads 2 --vocab-size 64 "
    "--max-position-embeddings 8"
)
FLAGS = f"--deepspeed --data-path toy --seq-length 8 --device cpu --lr 0.1 --min-lr 0.01 {SMALL}".split()


def bad_samples() -> list[int]:
    """Samples whose loss is not a number, of TOY_BAD."""
    return json.loads(os.environ.get("TOY_BAD", "[]"))


def main(flags: Sequence[str]) -> int:
    """The entry, with the toy in the engine's place."""
    run, notes = resolve([*FLAGS, *flags], world_size())
    device = devices.prepare("cpu", "auto")

    from ascendspeed.data.dataset import micro_batch_starts
    from ascendspeed.distributed import process_groups
    from ascendspeed.training import loop, setup
    from ascendspeed.training.fault_tolerance import RunMonitor
    from ascendspeed.training.metrics_log import MetricsLogger

    grid = process_groups.initialize(
        device, run.parallel, run.train.seed, run.train.distributed_timeout_minutes
    )
    with MetricsLogger(grid.rank, run.train.log_dir) as log, RunMonitor(run, grid) as watch:
        for note in notes:
            log.say(f"note: {note}")
        begin = setup.find_start(run, grid, device)
        engine = engine_of(run, grid)
        if begin.resume:
            engine.restore(begin.resume)
        size, whole = run.train.micro_batch_size, run.train.global_batch_size

        def batches(split: str, consumed: int) -> list[list[int]]:
            return [
                list(range(a, a + size))
                for a in micro_batch_starts(consumed, whole, size, grid.dp_rank, grid.dp)
            ]

        loop.train(run, grid, device, engine, batches, log, begin, watch)
    process_groups.destroy()
    return watch.exit_code


def engine_of(run: Any, grid: Any) -> Any:
    """The toy; made here, as torch may only be imported after `device.prepare`."""
    import torch
    import torch.distributed as dist

    from ascendspeed.checkpoint.fragment import KINDS, Fragment
    from ascendspeed.checkpoint.load import Checkpoint, load_fragments
    from ascendspeed.models.param_mapping import ShardSpec
    from ascendspeed.training.engines import StepResult

    rows = [ROWS * (grid.rank + i) // grid.world for i in (0, 1)]

    class Toy:
        """Momentum with dropout noise from the generator, so that this one has to be restored too."""

        def __init__(self) -> None:
            self.weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(7))
            self.state = {kind: torch.zeros(rows[1] - rows[0], WIDTH) for kind in KINDS}
            self.state["master"].copy_(self.weight[rows[0] : rows[1]])
            self.updates = 0

        def step(self, batches: list[list[int]], lr: float) -> StepResult:
            gradient, losses = torch.zeros_like(self.weight), []
            for batch in batches:
                g = [torch.Generator().manual_seed(number) for number in batch]
                targets = torch.stack([torch.randn(ROWS, WIDTH, generator=generator) for generator in g])
                difference = (self.weight - targets) * (torch.rand(ROWS, WIDTH) > 0.1)
                losses.append(
                    float(difference.square().mean()) if not set(batch) & set(bad_samples()) else math.nan
                )
                gradient += difference.mean(0)
            total = torch.tensor([sum(losses), float(len(losses))], dtype=torch.float64)
            dist.all_reduce(gradient)
            dist.all_reduce(total)
            loss, norm = float(total[0] / total[1]), float(gradient.norm())
            skipped = not math.isfinite(loss)
            if not skipped:
                self._update(gradient[rows[0] : rows[1]] / float(total[1]), lr)
            bad = tuple(i for i, loss in enumerate(losses) if not math.isfinite(loss))
            return StepResult(loss, int(total[1]), norm, skipped, 1.0, bad=bad)

        def _update(self, gradient: torch.Tensor, lr: float) -> None:
            master, first, second = self.state.values()
            first.mul_(DECAY).add_(gradient)
            second.mul_(DECAY).add_(gradient.square())
            master.sub_(lr * first / (second.sqrt() + 1.0))
            self.updates += 1
            self._publish()

        def _publish(self) -> None:
            whole = [
                torch.empty(ROWS * (r + 1) // grid.world - ROWS * r // grid.world, WIDTH)
                for r in range(grid.world)
            ]
            dist.all_gather(whole, self.state["master"])
            self.weight = torch.cat(whole)

        def loss(self, batches: Any) -> tuple[float, int]:
            return float(self.weight.square().sum()), 1

        def fragments(self) -> Iterator[Fragment]:
            for kind, tensor in self.state.items():
                yield Fragment("weight", kind, ShardSpec((ROWS, WIDTH)), 0, rows[0] * WIDTH, tensor.view(-1))

        def scalars(self) -> dict[str, Any]:
            return {"updates": self.updates}

        def rng(self) -> dict[str, torch.Tensor]:
            return {"torch": torch.get_rng_state()}

        def restore(self, checkpoint: Checkpoint) -> None:
            load_fragments(checkpoint, self.fragments())
            self.updates = checkpoint.state.engine["updates"]
            lost = os.environ.get("TOY_LOSES")
            if lost != "rng":
                torch.set_rng_state(checkpoint.rng(grid.rank)["torch"])
            if lost in self.state:
                self.state[lost].zero_()
            self._publish()

    return Toy()
