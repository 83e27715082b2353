"""One rank of an engine test: runs the cases of a job over the same batches; rank 0 writes their curves.

A case: {"changes": {group: {field: value}}, "load": folder, "save": folder, "first": step, "last": step, "break": what}.
"""

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

from ascendspeed import config, device


def main() -> None:
    """Reads the job, runs every case, writes case -> [[loss, gradient norm, weights' digest], ...]."""
    job = json.loads(Path(sys.argv[1]).read_text())
    here = device.prepare(job.get("device", "cpu"))

    import oracle
    import torch

    from ascendspeed import checkpoint, parallel, schedule
    from ascendspeed.data.dataset import Batch
    from ascendspeed.engines.deepspeed import DeepSpeedEngine, ds_config
    from ascendspeed.kernels import Kernels
    from ascendspeed.weights import random_tensors

    base = config.from_dict(job["run"])
    grid = parallel.initialize(here, base.parallel, base.train.seed)
    data = oracle.batches(base.model.vocab_size, job["steps"], base.train.global_batch_size, base.data.seq_length, job["data_seed"])
    curves = {}
    for name, case in job["cases"].items():
        run = base
        for group, values in case.get("changes", {}).items():
            run = replace(run, **{group: replace(getattr(run, group), **values)})
        if case.get("break") == "sequence-parallel hook":
            DeepSpeedEngine._sum_over_tensor_parallel = lambda self, gradient: gradient
        size, rows = run.train.micro_batch_size, run.train.global_batch_size // grid.dp
        parallel.initialize(here, run.parallel, run.train.seed)  # the generators start anew
        tensors = None if case.get("load") else random_tensors(run.model, run.train.seed, here.torch)
        engine = DeepSpeedEngine(run, grid, here, ds_config(run, grid.world), Kernels(), tensors)
        if case.get("load"):
            engine.restore(checkpoint.open_checkpoint(case["load"], say=lambda text: None))
        curve = []
        for batch in data[case.get("first", 0) : case.get("last")]:
            mine = {k: v[grid.dp_rank * rows : (grid.dp_rank + 1) * rows] for k, v in batch.items()}
            positions = torch.arange(run.data.seq_length).expand(size, -1)
            micros = [Batch(**{k: v[i : i + size] for k, v in mine.items()}, position_ids=positions) for i in range(0, rows, size)]
            result = engine.step(micros, schedule.lr_at(engine.updates, run.optim, run.train.train_iters))
            curve.append([result.loss, result.grad_norm])
        if case.get("save"):
            state = checkpoint.TrainState(case["last"], 0, 0, engine.scalars())
            place = grid.rank, grid.world, grid.barrier
            checkpoint.save(case["save"], state, run, engine.fragments(), engine.rng(), *place)
        curves[name] = curve
        del engine
        gc.collect()
    if grid.rank == 0:
        Path(job["out"]).write_text(json.dumps(curves))
    parallel.destroy()


if __name__ == "__main__":
    main()
