"""One rank of an engine test: runs the cases of a job over the same batches; rank 0 writes their curves.

A case: {"changes": {group: {field: value}}, "weights": safetensors (else random ones), "load": folder, "save": folder,
"first": step, "last": step,
"evaluate": also the loss of batch 0 before training, "break": what to do wrong on purpose,
"poison": step before which one comes whose gradients are NaN on one rank}.
"""

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

from ascendspeed import config, device


def main() -> None:
    """Reads the job, runs every case, writes case -> [[loss, gradient norm], ...]; a skipped step is [null, null]."""
    job = json.loads(Path(sys.argv[1]).read_text())
    here = device.prepare(job.get("device", "cpu"))

    import oracle
    import torch
    from safetensors.torch import load_file

    from ascendspeed import checkpoint, parallel, schedule
    from ascendspeed.data.dataset import Batch
    from ascendspeed.engines.deepspeed import DeepSpeedEngine, ds_config
    from ascendspeed.kernels import Kernels
    from ascendspeed.weights import random_tensors

    class WithoutHook(DeepSpeedEngine):
        def _sum_over_tensor_parallel(self, gradient):
            return gradient

    base = config.from_dict(job["run"])
    grid = parallel.initialize(here, base.parallel, base.train.seed)
    data = oracle.batches(base.model.vocab_size, job["steps"], base.train.global_batch_size, base.data.seq_length, job["data_seed"])

    def micro_batches(run, batch):
        size, rows = run.train.micro_batch_size, run.train.global_batch_size // grid.dp
        mine = {k: v[grid.dp_rank * rows : (grid.dp_rank + 1) * rows] for k, v in batch.items()}
        positions = torch.arange(run.data.seq_length).expand(size, -1)
        return [Batch(**{k: v[i : i + size] for k, v in mine.items()}, position_ids=positions) for i in range(0, rows, size)]

    def step(engine, run, batch):
        result = engine.step(micro_batches(run, batch), schedule.lr_at(engine.updates, run.optim, run.train.train_iters))
        return [None, None] if result.skipped else [result.loss, result.grad_norm]

    curves = {}
    for name, case in job["cases"].items():
        run = base
        for group, values in case.get("changes", {}).items():
            run = replace(run, **{group: replace(getattr(run, group), **values)})
        parallel.initialize(here, run.parallel, run.train.seed)  # the generators start anew
        given = load_file(case["weights"]).items() if case.get("weights") else random_tensors(run.model, run.train.seed)
        tensors = None if case.get("load") else given
        make = WithoutHook if case.get("break") == "sequence-parallel hook" else DeepSpeedEngine
        engine = make(run, grid, here, ds_config(run, grid.world), Kernels(), tensors)
        if case.get("load"):
            engine.restore(checkpoint.open_checkpoint(case["load"], say=lambda text: None))
        if case.get("break") == "moments":
            for fragment in engine.fragments():
                if fragment.kind == "exp_avg":
                    fragment.tensor.zero_()
        if case.get("evaluate"):
            total, tokens = engine.loss(micro_batches(run, data[0]))
            curves[f"{name}: evaluated"] = [[total / tokens, None]]
        first, last, curves[name] = case.get("first", 0), case.get("last", job["steps"]), []
        for i in range(first, last):
            if case.get("poison") == i:
                weight = engine.module.decoder.final_layernorm.weight
                hook = weight.register_hook(lambda g: g * float("nan") if grid.rank == 0 else g)
                curves[name].append(step(engine, run, data[i]))
                hook.remove()
            curves[name].append(step(engine, run, data[i]))
        if case.get("save"):
            state = checkpoint.TrainState(last, 0, 0, engine.scalars())
            checkpoint.save(case["save"], state, run, engine.fragments(), engine.rng(), grid.rank, grid.world, grid.barrier)
        del engine
        gc.collect()
    if grid.rank == 0:
        Path(job["out"]).write_text(json.dumps(curves))
    parallel.destroy()


if __name__ == "__main__":
    main()
