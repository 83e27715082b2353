"""Number of layers of every pipeline stage."""

from ascendspeed.config.schema import ModelConfig, ParallelConfig
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import divisors


def pipeline_stage_layers(num_layers: int, parallel: ParallelConfig) -> tuple[int, ...]:
    """Layers of every pipeline stage, each divisible by its virtual stages.

    Raises `UserError`, with the legal choices, if the layers do not split so.
    """
    stages = parallel.pipeline_model_parallel_size
    ends = {
        "first": parallel.decoder_first_pipeline_num_layers,
        "last": parallel.decoder_last_pipeline_num_layers,
    }
    given = {name: layers for name, layers in ends.items() if layers is not None}
    if not given:
        if stages < 1 or num_layers % stages:
            choices = divisors(num_layers)
            raise UserError(
                f"{num_layers} layers do not split over {stages} pipeline stages; choose {choices}"
            )
        layers_of = [num_layers // stages] * stages
    else:
        layers_of = _unequal_stages(num_layers, stages, given)
    _check_virtual_stages(layers_of, parallel.num_virtual_stages_per_pipeline_rank)
    return tuple(layers_of)


def _unequal_stages(num_layers: int, stages: int, given: dict[str, int]) -> list[int]:
    """Layers of every stage, of which the first, the last or both are `given`."""
    flags = " and ".join(f"--decoder-{name}-pipeline-num-layers {layers}" for name, layers in given.items())
    if stages < 2:
        raise UserError(f"{flags}: there is one pipeline stage; set --pipeline-model-parallel-size")
    others = stages - len(given)
    rest = num_layers - sum(given.values())
    if min(given.values()) < 1 or rest < others or (rest % others if others else rest):
        number = f"{others} stages" if others else "no stage"
        raise UserError(
            f"{flags}: of {num_layers} layers {rest} are left for {number}, which must have equally many "
            "and at least one; choose other numbers"
        )
    middle = [rest // others] * others if others else []
    return [
        *([given["first"]] if "first" in given else []),
        *middle,
        *([given["last"]] if "last" in given else []),
    ]


def _check_virtual_stages(layers_of: list[int], virtual: int) -> None:
    """Raises `UserError` if the layers of a pipeline stage do not split into `virtual` stages."""
    for layers in layers_of:
        if virtual < 1 or layers % virtual:
            raise UserError(
                f"the {layers} layers of each of {len(layers_of)} pipeline stages do not split into "
                f"{virtual} virtual stages; choose {divisors(layers)}"
            )


def check_pipeline_parallel(model: ModelConfig, size: int) -> None:
    """Raises `UserError`, with the legal sizes, if the layers do not split evenly over `size` stages."""
    pipeline_stage_layers(model.num_layers, ParallelConfig(pipeline_model_parallel_size=size))
