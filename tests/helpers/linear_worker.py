"""One rank of a test: tensor-parallel linears give, without gradients, the bits of megatron-core's own."""

import json
import sys
from pathlib import Path

from ascendspeed.config.schema import ParallelConfig, TrainConfig
from ascendspeed.distributed import device


def main() -> None:
    """Rank 0 writes {case: the same on every rank}."""
    job = json.loads(Path(sys.argv[1]).read_text())
    here = device.prepare("cpu")

    import torch
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from torch.nn import functional as F

    from ascendspeed.distributed import process_groups
    from ascendspeed.models.gpt.layer_spec import transformer_config
    from ascendspeed.models.gpt.linear import ColumnLinear, RowLinear
    from helpers.models import INTERNLM

    layout = ParallelConfig(tensor_model_parallel_size=2)
    grid = process_groups.initialize(here, layout, seed=1)
    config = transformer_config(INTERNLM, layout, TrainConfig())
    common = {"config": config, "init_method": torch.nn.init.normal_, "bias": True}
    generator = torch.Generator().manual_seed(grid.rank)
    x = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(9))
    column = ColumnLinear(64, 48, gather_output=False, skip_bias_add=False, **common)
    rows = [
        RowLinear(128, 40, input_is_parallel=True, skip_bias_add=skip, **common) for skip in (False, True)
    ]
    for linear in (column, *rows):
        for parameter in linear.parameters():
            parameter.data.normal_(generator=generator)
    other = torch.randn(24, 64, generator=generator)

    def same(linear, own, **more) -> bool:
        with torch.no_grad():
            short, long = linear(x, **more), own.forward(linear, x, **more)
        return torch.equal(short[0], long[0]) and short[1] is long[1]

    results = {
        "column": same(column, ColumnParallelLinear),
        "own weight": same(column, ColumnParallelLinear, weight=other),
        "gathered": same(column, ColumnParallelLinear, runtime_gather_output=True),
        "row": same(rows[0], RowParallelLinear),
        "row, bias apart": same(rows[1], RowParallelLinear),
        "not summed": torch.equal(F.linear(x, rows[1].weight), rows[1](x)[0]),
    }
    everyone = grid.all_gather_object(results)
    if grid.rank == 0:
        Path(job["out"]).write_text(
            json.dumps({name: all(rank_results[name] for rank_results in everyone) for name in results})
        )
    process_groups.destroy()


if __name__ == "__main__":
    main()
