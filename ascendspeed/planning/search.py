"""Search for a layout: the legal ones by estimated speed, and the memory of the fastest by execution. No
torch.

Legality is decided by the checks of training: a layout is a command line that `resolve` accepts.
"""

import itertools
import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ascendspeed.config.schema import ModelConfig, ParallelConfig, Run
from ascendspeed.models import estimates
from ascendspeed.planning.command import PlanOptions
from ascendspeed.planning.device_table import NODE, DeviceRates
from ascendspeed.planning.time_estimate import TimeEstimate, estimate
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

Resolve = Callable[[Sequence[str]], Run]
"""Flags of training -> the run; raises `UserError` if it is illegal."""

KEPT_PER_TOKEN = (17, 6)
"""Least bytes of a layer's activations per token, per hidden and per FFN width, for leaving out layouts that
cannot fit; half of what a layer of InternLM-7B keeps."""
ROOM = 1.02
"""Layouts whose model states and least activations exceed the memory by this factor are not executed."""


@dataclass(frozen=True)
class Candidate:
    """A legal layout."""

    flags: tuple[str, ...]
    """Flags of the layout."""
    run: Run
    time: TimeEstimate

    @property
    def environment(self) -> dict[str, str]:
        """Variables that the recipes set for such a run."""
        variables = {"OMP_NUM_THREADS": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
        if self.run.parallel.tensor_model_parallel_size > 1:
            variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
        return variables


def candidates(typed: Sequence[str], devices: int, resolve: Resolve, device: DeviceRates) -> list[Candidate]:
    """All legal layouts for the flags `typed`, fastest first; flags that are typed are not varied."""
    found: dict[Run, Candidate] = {}
    reasons: list[str] = []
    for flags in _flag_sets(typed, devices):
        try:
            run = resolve([*flags, *typed])
        except UserError as error:
            reasons.append(str(error))
            continue
        if run not in found:
            found[run] = Candidate(flags, run, estimate(run, devices, device))
    if not found:
        raise UserError(f"no layout of {devices} devices is legal; the last one: {reasons[-1]}")
    return sorted(found.values(), key=lambda candidate: candidate.time.step)


def _flag_sets(typed: Sequence[str], devices: int) -> Iterator[tuple[str, ...]]:
    """Flags of every layout to try."""
    given = {word.partition("=")[0].replace("_", "-") for word in typed if word.startswith("--")}
    sizes = [size for size in (1, 2, 4, 8, 16) if devices % size == 0]
    engines: list[tuple[str, ...]] = [("--deepspeed", "--zero-stage", str(stage)) for stage in (1, 2, 3)]
    pipelines = ((size, virtual) for size in sizes for virtual in ((1, 2) if size > 1 else (1,)))
    engines += [
        ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
        + (("--pp", str(pp), "--vpp", str(virtual)) if pp > 1 else ())
        for pp, virtual in pipelines
    ]
    if given & {"--deepspeed", "--zero-stage"}:
        engines = [()] if "--zero-stage" in given else [words[1:] for words in engines[:3]]
    tensors = [
        () if size == 1 else ("--tp", str(size), "--sequence-parallel") for size in sizes if size <= NODE
    ]
    batches: list[tuple[str, ...]] = [("--micro-batch-size", str(size)) for size in (1, 2, 4)]
    recomputations: list[tuple[str, ...]] = [(), ("--recompute-granularity", "full")]
    if given & {"--tp", "--tensor-model-parallel-size"}:
        tensors = [()]
    if "--micro-batch-size" in given:
        batches = [()]
    if "--recompute-granularity" in given:
        recomputations = [()]
    if "--global-batch-size" not in given:
        batches = [(*words, "--global-batch-size", str(32 * devices)) for words in batches]
    for parts in itertools.product(engines, tensors, batches, recomputations):
        yield tuple(itertools.chain.from_iterable(parts))


@dataclass(frozen=True)
class Fitting:
    """A layout whose memory was planned by execution."""

    candidate: Candidate
    peak: int
    """Bytes of the rank that needs most."""


def fastest_that_fit(
    legal: Sequence[Candidate], options: PlanOptions, plan: Callable[[Run], Any]
) -> tuple[list[Fitting], int]:
    """The first `options.top` layouts that fit, and the number of layouts that were executed."""
    memory = options.device_memory
    assert memory is not None
    fitting: list[Fitting] = []
    executed = 0
    for candidate in legal:
        if not can_fit(candidate, options.devices, memory):
            continue
        executed += 1
        peak = plan(candidate.run).peak
        logger.info(f"{peak / 2**30:.1f} GiB: {' '.join(candidate.flags)}")
        if peak <= memory * 2**30:
            fitting.append(Fitting(candidate, peak))
        if len(fitting) == options.top:
            break
    return fitting, executed


def can_fit(candidate: Candidate, devices: int, memory: float) -> bool:
    """False if the model states and the least activations are already more than `memory` GiB."""
    run = candidate.run
    parallel = run.parallel
    replicas = devices // parallel.tensor_model_parallel_size // parallel.pipeline_model_parallel_size
    stage = parallel.zero_stage if parallel.deepspeed else int(parallel.use_distributed_optimizer)
    sharded = ParallelConfig(
        parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, zero_stage=stage
    )
    states = estimates.model_states(
        run.model, sharded, replicas, run.optim.dtype, fp32_gradients=True, lora=run.lora
    )
    least = states.total + _least_activations(run)
    return least <= memory * 2**30 * ROOM


def _least_activations(run: Run) -> float:
    model, parallel, train = run.model, run.parallel, run.train
    if train.recompute_granularity != "none":
        return 0.0
    h, f = KEPT_PER_TOKEN
    tokens = train.micro_batch_size * run.data.seq_length
    share = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    in_flight = parallel.pipeline_model_parallel_size  # micro-batches of the first of as many stages
    layers = model.num_layers / parallel.pipeline_model_parallel_size
    return in_flight * layers * tokens * (h * model.hidden_size + f * _width(model)) / share


def _width(model: ModelConfig) -> int:
    return min(model.ffn_widths)


def command_line(candidate: Candidate, typed: Sequence[str], devices: int) -> str:
    """Shell command that starts the run; inputs that the plan did not need are left to the user."""
    variables = " ".join(f"{name}={value}" for name, value in candidate.environment.items())
    nodes = -(-devices // NODE)
    launcher = f"torchrun --nproc_per_node {min(devices, NODE)}"
    if nodes > 1:
        launcher += f" --nnodes {nodes} --node_rank $NODE_RANK --master_addr $MASTER_ADDR"
    words = [*typed, *candidate.flags]
    given = {word.partition("=")[0].replace("_", "-") for word in typed}
    missing = " --data-path $DATA" if "--data-path" not in given else ""
    missing += " --tokenizer-name-or-path $TOKENIZER_PATH" if "--tokenizer-name-or-path" not in given else ""
    return f"{variables} {launcher} pretrain_intern.py {shlex.join(words)}{missing}"
