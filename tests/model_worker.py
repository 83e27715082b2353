"""One rank of a model test: logits, losses and gradients of every case of the job; rank 0 writes them.

A case: {"run": ..., "weights": safetensors, "tokens": [b, s + 1]}. All cases have the same tensor-parallel size.
"""

import json
import sys
from pathlib import Path

from ascendspeed import config, device


def main() -> None:
    """Reads the job, runs the cases, saves NAME.logits [b, s, v], NAME.losses [b, s] and facts about the parameters."""
    job = json.loads(Path(sys.argv[1]).read_text())
    here = device.prepare("cpu")

    import torch
    from safetensors.torch import load_file, save_file

    from ascendspeed import parallel
    from ascendspeed.model import gpt, spec

    tensors, facts = {}, {}
    for name, case in job["cases"].items():
        run = config.from_dict(case["run"])
        grid = parallel.initialize(here, run.parallel, seed=1)
        model = gpt.build(run.model, run.parallel, spec.transformer_config(run.model, run.parallel, run.train)).eval()
        gpt.fill(model, run.model, run.parallel, load_file(case["weights"]).items())
        tokens = torch.tensor(case["tokens"])
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        with torch.no_grad():
            logits = model(inputs, None, None, runtime_gather_output=True)
        losses = model(inputs, None, None, labels=labels)
        losses.sum().backward()
        tensors |= {f"{name}.logits": logits.contiguous(), f"{name}.losses": losses.detach().contiguous()}
        named = gpt.named_parameters(model)
        facts[name] = {
            "shapes": {n: list(p.shape) for n, p in named.items()},
            "finite": all(bool(p.grad.isfinite().all()) for p in named.values()),
            "cuts": {
                n: [p.partition_dim, p.partition_stride] if getattr(p, "tensor_model_parallel", False) else None
                for n, p in named.items()
            },
        }
    if grid.rank == 0:
        save_file(tensors, job["out"] + ".safetensors")
        Path(job["out"]).write_text(json.dumps(facts))
    parallel.destroy()


if __name__ == "__main__":
    main()
