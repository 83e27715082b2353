"""One rank of a preference run: the cases of a job over the same pairs; rank 0 writes their curves.

A case: {"changes": {group: {field: value}}, "steps": number of iterations, "save": save after the last one,
"break": a deliberate mistake}. Its curve has, for every iteration, loss, gradient norm and the rewards.
"""

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

from ascendspeed.config import schema
from ascendspeed.distributed import device


def main() -> None:
    """Reads the job, runs every case, writes case -> [[loss, gradient norm, *rewards], ...]."""
    job = json.loads(Path(sys.argv[1]).read_text())
    here = device.prepare("cpu")

    from ascendspeed.distributed import process_groups
    from ascendspeed.models.families import read_config
    from ascendspeed.models.lora import targets
    from helpers.engine_worker import leave_groups

    base = schema.from_dict(job["run"])
    base = replace(base, model=read_config(Path(base.train.load) / "config.json"))
    curves, layout = {}, None
    for name, case in job["cases"].items():
        print(name, flush=True)
        run = base
        for group, values in case.get("changes", {}).items():
            run = replace(run, **{group: replace(getattr(run, group), **values)})
        modules = tuple(run.lora.lora_target_modules)
        lora = targets.resolve_config(run.model, replace(run.lora, lora_target_modules=modules))
        run = replace(run, lora=lora)
        if layout not in (None, run.parallel.layout_key):
            leave_groups()
        layout = run.parallel.layout_key
        grid = process_groups.initialize(here, run.parallel, run.train.seed)
        curves[name] = curve_of(run, grid, here, case)
        gc.collect()
    if grid.rank == 0:
        Path(job["out"]).write_text(json.dumps(curves))
    process_groups.destroy()


def curve_of(run, grid, here, case):
    """Trains as the program does: data, start, engine, reference, then iterations."""
    from ascendspeed.checkpoint.fragment import TrainState
    from ascendspeed.checkpoint.save import save_checkpoint
    from ascendspeed.distributed.fused_kernels import Kernels
    from ascendspeed.training import data_setup, engines, reference, setup

    run, batches = data_setup.open_data(run, grid)
    start = setup.find_start(run, grid, here)
    engine = engines.engine_builder(run, grid, here, Kernels())(start.tensors)
    if start.resume:
        engine.restore(start.resume)
    reference.attach(run, grid, engine, batches, start)
    curve, size = [], run.train.global_batch_size
    first = start.state.step
    for step in range(first, first + case["steps"]):
        micro_batches = [mistaken(batch, case.get("break")) for batch in batches("train", step * size)]
        result = engine.step(micro_batches, run.optim.lr)
        curve.append([result.loss, result.grad_norm, *result.metrics.values()])
    if case.get("save"):
        state = TrainState(first + case["steps"], (first + case["steps"]) * size, 0, engine.scalars())
        save_checkpoint(
            case["save"],
            state,
            start.saved_run(run),
            engine.fragments(),
            engine.rng(),
            grid.rank,
            grid.world,
            grid.barrier,
        )
    return curve


def mistaken(batch, mistake):
    """The batch with a mistake made on purpose."""
    if mistake == "pair swapped":
        reference = batch.reference
        if reference is not None:
            reference = reference.view(-1, 2).flip(1).reshape(-1)
        return replace(batch, conversations=batch.conversations ^ 1, reference=reference)
    return batch


if __name__ == "__main__":
    main()
