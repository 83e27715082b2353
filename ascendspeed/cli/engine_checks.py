"""Flags that the engine of a run does not support. No torch."""

from collections.abc import Iterable, Iterator

from ascendspeed.cli.parser import flag_of
from ascendspeed.config.schema import ParallelConfig, Run
from ascendspeed.utils.errors import UserError

MEGATRON_ONLY = {
    "pipeline_model_parallel_size": "has no pipeline stages (ZeRO-2 and 3 cannot have them); "
    "use 1 and a higher TP or ZeRO stage",
    "expert_model_parallel_size": "does not share experts; use 1 and ZeRO-3",
    "decoder_first_pipeline_num_layers": "has no pipeline stages; leave it out",
    "decoder_last_pipeline_num_layers": "has no pipeline stages; leave it out",
    "num_distributed_optimizer_instances": "shards the states of ZeRO-1 and 2 over all replicas; use 1",
    "use_distributed_optimizer": "has ZeRO; use --zero-stage 1",
    "use_torch_fsdp2": "shards the same by --zero-stage 3; use that",
    "overlap_grad_reduce": 'overlaps by itself ("overlap_comm" in --deepspeed_config)',
    "overlap_param_gather": 'overlaps by itself ("overlap_comm" in --deepspeed_config)',
}
"""Fields that the DeepSpeed engine does not support -> the reason and the alternative."""
DEEPSPEED_ONLY = ("deepspeed_config", "zero_hpz_partition_size", "zero_offload", "zero_offload_nvme_path")


def _flags_set(parallel: ParallelConfig, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields (field, flag with its value) of the fields in `names` that do not have their default."""
    default = ParallelConfig()
    for name in names:
        value = getattr(parallel, name)
        if value != getattr(default, name):
            yield name, flag_of(name) + (f" {value}" if value is not True else "")


def check_engine(parallel: ParallelConfig) -> None:
    """Raises UserError for flags that the engine of the run does not support."""
    if parallel.deepspeed:
        for name, flag in _flags_set(parallel, MEGATRON_ONLY):
            raise UserError(
                f"{flag}: the DeepSpeed engine {MEGATRON_ONLY[name]}, or drop --deepspeed for Megatron's "
                "engine"
            )
        _check_zero(parallel)
        return
    for _, flag in _flags_set(parallel, DEEPSPEED_ONLY):
        raise UserError(f"{flag}: only the DeepSpeed engine has it; add --deepspeed, or leave it out")
    overlaps = parallel.use_distributed_optimizer and parallel.overlap_grad_reduce
    if parallel.overlap_param_gather and not overlaps:
        raise UserError(
            "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce; add them"
        )
    instances = parallel.num_distributed_optimizer_instances
    if instances > 1 and not parallel.use_distributed_optimizer:
        raise UserError(
            f"--num-distributed-optimizer-instances {instances} needs --use-distributed-optimizer; add it"
        )
    if instances > 1 and parallel.overlap_grad_reduce:
        raise UserError(
            f"--num-distributed-optimizer-instances {instances} does not go with --overlap-grad-reduce; "
            "leave one of them out"
        )


WITHOUT_FSDP = {
    "tensor_model_parallel_size": "use 1",
    "pipeline_model_parallel_size": "use 1",
    "expert_model_parallel_size": "use 1",
    "use_distributed_optimizer": "FSDP shards the optimizer states too: leave it out",
    "overlap_grad_reduce": "FSDP overlaps by itself: leave it out",
}
"""Fields that do not go with --use-torch-fsdp2 -> the alternative."""


def check_fsdp(run: Run) -> None:
    """Raises UserError for settings that FSDP2 does not support."""
    if not run.parallel.use_torch_fsdp2:
        return
    for name, flag in _flags_set(run.parallel, WITHOUT_FSDP):
        raise UserError(f"--use-torch-fsdp2 does not go with {flag}; {WITHOUT_FSDP[name]}")
    if run.optim.fp16:
        raise UserError("--use-torch-fsdp2 has no loss scale for --fp16; use --bf16")
    if run.optim.optimizer == "muon":
        raise UserError("--use-torch-fsdp2 shards by rows, and --optimizer muon needs more; use adamw")
    if run.lora.quantization_bit:
        raise UserError("--use-torch-fsdp2 shards weights as they are; leave --quantization-bit out")


def _check_zero(parallel: ParallelConfig) -> None:
    """Raises UserError for features of ZeRO that the stage or the layout does not support."""
    stage = parallel.zero_stage
    offload = parallel.zero_offload
    partition = parallel.zero_hpz_partition_size
    if partition > 1 and (stage != 3 or parallel.tensor_model_parallel_size > 1):
        layout = f"{stage} and TP {parallel.tensor_model_parallel_size}"
        raise UserError(f"--zero-hpz-partition-size {partition} needs --zero-stage 3 and TP 1, not {layout}")
    if offload != "none" and stage < (3 if offload == "nvme" else 1):
        stages = "3" if offload == "nvme" else "1, 2 or 3"
        raise UserError(f"--zero-offload {offload} needs --zero-stage {stages}, not {stage}")
    if (offload == "nvme") != (parallel.zero_offload_nvme_path is not None):
        raise UserError(
            "--zero-offload nvme and --zero-offload-nvme-path, a folder on a local disk, belong together; "
            "give both"
        )
