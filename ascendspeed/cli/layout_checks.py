"""Sizes that the processes of a run cannot share evenly. No torch."""

import math

from ascendspeed.config import batch_schedule
from ascendspeed.config.pipeline_stages import pipeline_stage_layers
from ascendspeed.config.schema import ParallelConfig, Run
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import divisors, nearest_multiples


def check_world(run: Run, world: int) -> None:
    """Raises UserError if `world` processes cannot share the model, the sequence or the batch evenly."""
    parallel = run.parallel
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "CP": parallel.context_parallel_size,
    }
    layout = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    model_size = parallel.model_size
    if world % model_size:
        raise UserError(
            f"{world} processes do not split into groups of {model_size} for {layout}; "
            f"start a multiple of {model_size} (NPROC={model_size})"
        )
    dp = world // model_size
    cp = parallel.context_parallel_size
    ep = parallel.expert_model_parallel_size
    if (dp * cp) % ep:
        raise UserError(
            f"--expert-model-parallel-size {ep}: the {dp * cp} ranks (DP {dp} x CP {cp}) that could share "
            "experts "
            f"do not split into groups of {ep}; choose {divisors(dp * cp)} or start more processes"
        )
    _check_optimizer_instances(parallel.num_distributed_optimizer_instances, dp * cp, dp * cp // ep)
    partition = parallel.zero_hpz_partition_size
    if (dp * cp) % partition:
        raise UserError(
            f"--zero-hpz-partition-size {partition} does not divide {dp * cp} ranks (DP {dp} x CP {cp}); "
            f"choose {divisors(dp * cp)}"
        )
    _check_sequence(run.data.seq_length, parallel)
    micro_batch = run.train.micro_batch_size
    samples = micro_batch * dp  # of one micro-batch on all ranks
    for global_batch in reversed(batch_schedule.batch_sizes(run.train)):
        if global_batch % samples:
            flag = "--rampup-batch-size" if run.train.rampup_batch_size else "--rampup-batch-size-iters"
            ramp = "" if global_batch == run.train.global_batch_size else f" (of {flag})"
            raise UserError(
                f"--global-batch-size {global_batch}{ramp} is not a multiple of --micro-batch-size "
                f"{micro_batch} x {dp} data-parallel ranks = {samples}; choose "
                f"{nearest_multiples(global_batch, samples)}"
            )
        _check_virtual_stages(parallel, global_batch // samples, samples)


def _check_optimizer_instances(instances: int, replicas: int, expert_replicas: int) -> None:
    """Raises UserError if the replicas, of the model and of its experts, do not split into `instances`."""
    common = math.gcd(replicas, expert_replicas)
    if common % instances:
        experts = f", {expert_replicas} of the experts" if expert_replicas != replicas else ""
        raise UserError(
            f"--num-distributed-optimizer-instances {instances} does not divide the {replicas} replicas "
            f"(DP x CP){experts}; choose {divisors(common)}"
        )


def _check_sequence(length: int, parallel: ParallelConfig) -> None:
    """Raises UserError if context- or sequence-parallel ranks cannot share a sequence evenly."""
    tp = parallel.tensor_model_parallel_size
    cp = parallel.context_parallel_size
    multiple = math.lcm(2 * cp if cp > 1 else 1, cp * tp if parallel.sequence_parallel else 1)
    if cp > 1 and length % (2 * cp):
        chunks = f"2 x CP = {2 * cp} chunks for --context-parallel-size {cp}"
        raise UserError(
            f"--seq-length {length} does not split into {chunks}; "
            f"choose {nearest_multiples(length, multiple)}"
        )
    if parallel.sequence_parallel and length // cp % tp:
        part = f"--seq-length {length}" + (f" / CP {cp} = {length // cp}" if cp > 1 else "")
        raise UserError(
            f"{part} does not split over {tp} ranks for --sequence-parallel; "
            f"choose {nearest_multiples(length, multiple)}"
        )


def _check_virtual_stages(parallel: ParallelConfig, micro_batches: int, samples: int) -> None:
    """Raises UserError if virtual stages lack pipeline stages, or micro-batches (of `samples`) for them."""
    pp = parallel.pipeline_model_parallel_size
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    if virtual > 1 and pp == 1:
        flag = f"--num-virtual-stages-per-pipeline-rank {virtual}"
        raise UserError(f"{flag} needs pipeline stages: set --pipeline-model-parallel-size, or leave it out")
    if virtual > 1 and micro_batches % pp:
        raise UserError(
            f"{micro_batches} micro-batches per iteration are not a multiple of {pp} pipeline stages, as "
            "virtual "
            f"stages need; choose a --global-batch-size that is a multiple of {samples * pp}"
        )


def check_recompute(run: Run) -> None:
    """Raises UserError if the recomputed layers are not those of a (virtual) pipeline stage."""
    train = run.train
    parallel = run.parallel
    method = train.recompute_method
    number = train.recompute_num_layers
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    stages = pipeline_stage_layers(run.model.num_layers, parallel)
    layers = math.gcd(*stages) // virtual if method == "uniform" else max(stages) // virtual
    if train.recompute_granularity != "full":
        if (method, number) != ("uniform", 1):
            raise UserError(
                "--recompute-method and --recompute-num-layers belong to --recompute-granularity full; add it"
            )
    elif method == "uniform" and layers % number:
        raise UserError(
            f"--recompute-num-layers {number} does not divide the {layers} layers of a (virtual) pipeline "
            "stage; "
            f"choose {divisors(layers)}"
        )
    elif method == "block" and number > layers:
        raise UserError(
            f"--recompute-num-layers {number} is more than the {layers} layers of a (virtual) pipeline "
            "stage; "
            f"choose 1 to {layers}"
        )
