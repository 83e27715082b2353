"""One rank of a model test: logits, losses and gradients of every case of the job; the last rank writes them.

A case: {"run": ..., "weights": safetensors, "tokens": [b, s + 1]}; name cases of one layout in sequence.
"""

import json
import sys
from pathlib import Path
from typing import Any

from ascendspeed.config import schema
from ascendspeed.distributed import device


def main() -> None:
    """Reads the job, runs the cases, saves NAME.logits [b, s, v], NAME.losses [b, s] and parameter facts."""
    job = json.loads(Path(sys.argv[1]).read_text())
    here = device.prepare("cpu")

    import torch
    from megatron.core import parallel_state
    from safetensors.torch import load_file, save_file

    from ascendspeed.distributed import process_groups
    from ascendspeed.models.gpt import gpt_model, layer_spec

    tensors, facts, before = {}, {}, ()
    for name, case in job["cases"].items():
        run = schema.from_dict(case["run"])
        layout = (run.parallel.tensor_model_parallel_size, run.parallel.pipeline_model_parallel_size)
        if layout != before:
            parallel_state.destroy_model_parallel()
        before, grid = layout, process_groups.initialize(here, run.parallel, seed=1)
        model = gpt_model.build_model(
            run.model, run.parallel, layer_spec.transformer_config(run.model, run.parallel, run.train)
        ).eval()
        gpt_model.load_weights(model, run.model, run.parallel, load_file(case["weights"]).items())
        tokens = torch.tensor(case["tokens"])
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        with torch.no_grad():
            logits = forward(model, run, inputs, runtime_gather_output=True)[1]
        given, losses = forward(model, run, inputs, labels=labels)
        backward(model, given, losses)
        tensors |= {f"{name}.logits": logits.contiguous(), f"{name}.losses": losses.detach().contiguous()}
        facts[name] = facts_of(gpt_model.named_parameters(model))
    everyone = grid.all_gather_object(facts)
    if grid.rank == grid.world - 1:
        save_file(tensors, job["out"] + ".safetensors")
        Path(job["out"]).write_text(
            json.dumps({name: together([facts[name] for facts in everyone]) for name in job["cases"]})
        )
    process_groups.destroy()


def forward(model: Any, run: schema.Run, inputs: Any, **more: Any) -> tuple[Any, Any]:
    """Returns the input of this pipeline stage (None: tokens) and its output.

    Both are hidden states [s, b, h]; the output of the last stage is the model's.
    """
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    given = None
    if not model.pre_process:
        batch, length = inputs.shape
        length //= run.parallel.tensor_model_parallel_size if run.parallel.sequence_parallel else 1
        given = torch.empty(length, batch, run.model.hidden_size)
        dist.recv(given, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(given.requires_grad_(torch.is_grad_enabled()))
    out = model(inputs, None, None, **more)
    if not model.post_process:
        dist.send(out.detach().contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return given, out


def backward(model: Any, given: Any, out: Any) -> None:
    """The gradients of the sum of the last stage's output, stage by stage."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    gradient = torch.ones_like(out)
    if not model.post_process:
        dist.recv(gradient, parallel_state.get_pipeline_model_parallel_next_rank())
    out.backward(gradient)
    if given is not None:
        dist.send(given.grad.contiguous(), parallel_state.get_pipeline_model_parallel_prev_rank())


def facts_of(named: dict[str, Any]) -> dict[str, Any]:
    """Describes this rank's parameters.

    Shapes, partition dimensions, `finite` (all gradients are finite), `idle` (gradients all 0 or None).
    """
    return {
        "shapes": {n: list(p.shape) for n, p in named.items()},
        "finite": all(p.grad is not None and bool(p.grad.isfinite().all()) for p in named.values()),
        "idle": [n for n, p in named.items() if p.grad is None or not p.grad.any()],
        "cuts": {
            n: [p.partition_dim, p.partition_stride] if getattr(p, "tensor_model_parallel", False) else None
            for n, p in named.items()
        },
    }


def together(facts: list[dict[str, Any]]) -> dict[str, Any]:
    """The facts of all ranks."""
    return {
        "shapes": {n: shape for rank_facts in facts for n, shape in rank_facts["shapes"].items()},
        "finite": all(rank_facts["finite"] for rank_facts in facts),
        "idle": sorted({n for rank_facts in facts for n in rank_facts["idle"]}),
        "cuts": {n: cut for rank_facts in facts for n, cut in rank_facts["cuts"].items()},
    }


if __name__ == "__main__":
    main()
