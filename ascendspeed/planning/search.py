"""Search for a layout: the legal ones by estimated speed, and the memory of the fastest by execution. No
torch.

Legality is decided by the check that training has (`cli.validation`).
"""

import itertools
import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ascendspeed.cli import validation
from ascendspeed.cli.parser import flag_of
from ascendspeed.config.schema import ModelConfig, ParallelConfig, Run, TrainConfig
from ascendspeed.models import estimates
from ascendspeed.planning.command import PlanOptions
from ascendspeed.planning.device_table import NODE, DeviceRates
from ascendspeed.planning.time_estimate import TimeEstimate, estimate
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

Changes = dict[str, Any]
"""Field of `ParallelConfig` or `TrainConfig` -> value."""
SAMPLES = 32
"""Samples of a step for each device, if the command line does not set the global batch."""

KEPT_PER_TOKEN = (17, 6)
"""Least bytes of a layer's activations per token, per hidden and per FFN width, for leaving out layouts that
cannot fit; half of what a layer of InternLM-7B keeps."""
SLACK = 1.02
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


def candidates(base: Run, typed: frozenset[str], devices: int, device: DeviceRates) -> list[Candidate]:
    """All legal layouts of the run `base`, fastest first; fields that are `typed` are not varied."""
    found: list[Candidate] = []
    reason = ""
    for changes in _variations(base, typed, devices):
        run = _with(base, changes)
        try:
            validation.check_run(run, devices)
        except UserError as error:
            reason = str(error)
            continue
        found.append(Candidate(_flags(changes), run, estimate(run, devices, device)))
    if not found:
        raise UserError(f"no layout of {devices} devices is legal; the last one: {reason}")
    return sorted(found, key=lambda candidate: candidate.time.step)


def _variations(base: Run, typed: frozenset[str], devices: int) -> Iterator[Changes]:
    """Fields of every layout to try."""
    sizes = [size for size in (1, 2, 4, 8, 16) if devices % size == 0]
    axes = [
        _engines(base, typed, sizes),
        _axis("tensor_model_parallel_size", [size for size in sizes if size <= NODE], typed),
        _axis("micro_batch_size", (1, 2, 4), typed),
        _axis("recompute_granularity", ("none", "full"), typed),
    ]
    for parts in itertools.product(*axes):
        changes = {name: value for part in parts for name, value in part.items()}
        if changes.get("tensor_model_parallel_size", 1) > 1 and "sequence_parallel" not in typed:
            changes["sequence_parallel"] = True
        if "global_batch_size" not in typed:
            changes["global_batch_size"] = SAMPLES * devices
        yield changes


def _engines(base: Run, typed: frozenset[str], sizes: Sequence[int]) -> list[Changes]:
    """ZeRO stages of DeepSpeed, and pipelines of Megatron-core's engine with the distributed optimizer."""
    stages = _axis("zero_stage", (1, 2, 3), typed)
    pipelines = [
        {"pipeline_model_parallel_size": size, "num_virtual_stages_per_pipeline_rank": virtual}
        for size in sizes
        for virtual in ((1, 2) if size > 1 else (1,))
    ]
    if typed & {"pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank"}:
        pipelines = [{}]
    sharded = {
        name: True
        for name in ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
        if name not in typed
    }
    own = [] if base.parallel.deepspeed else [sharded | pipeline for pipeline in pipelines]
    return [{"deepspeed": True} | stage for stage in stages] + own


def _axis(name: str, values: Sequence[Any], typed: frozenset[str]) -> list[Changes]:
    return [{}] if name in typed else [{name: value} for value in values]


def _with(run: Run, changes: Changes) -> Run:
    groups = {}
    for group in ("parallel", "train"):
        settings = getattr(run, group)
        own = {name: value for name, value in changes.items() if hasattr(settings, name)}
        groups[group] = replace(settings, **own)
    return replace(run, **groups)


def _flags(changes: Changes) -> tuple[str, ...]:
    """Flags of the changes that are not the default."""
    defaults = vars(ParallelConfig()) | vars(TrainConfig())
    words: list[str] = []
    for name, value in changes.items():
        if value is True:
            words.append(flag_of(name))
        elif value != defaults[name] or name == "zero_stage":
            words += [flag_of(name), str(value)]
    return tuple(words)


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
        logger.info(f"{peak / 2**30:.2f} GiB: {' '.join(candidate.flags)}")
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
        run.model,
        sharded,
        replicas,
        run.optim.dtype,
        fp32_gradients=True,
        lora=run.lora,
        param_remainders=run.optim.store_param_remainders,
    )
    least = states.total + _least_activations(run)
    return least <= memory * 2**30 * SLACK


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
    per_node = max(size for size in range(1, NODE + 1) if devices % size == 0)
    nodes = devices // per_node
    launcher = f"torchrun --nproc_per_node {per_node}"
    if nodes > 1:
        launcher += f" --nnodes {nodes} --node_rank $NODE_RANK --master_addr $MASTER_ADDR"
    words = [*typed, *candidate.flags]
    given = {word.partition("=")[0].replace("_", "-") for word in typed}
    missing = " --data-path $DATA" if "--data-path" not in given else ""
    missing += " --tokenizer-name-or-path $TOKENIZER_PATH" if "--tokenizer-name-or-path" not in given else ""
    return f"{variables} {launcher} pretrain_intern.py {shlex.join(words)}{missing}"
