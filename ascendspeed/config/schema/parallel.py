"""Group `parallel` of a run: the layout, and its legal sizes for an architecture."""

from dataclasses import dataclass
from typing import Annotated, Literal

from ascendspeed.config.schema.choices import alias
from ascendspeed.config.schema.model import ModelConfig
from ascendspeed.utils.errors import UserError


@dataclass(frozen=True)
class ParallelConfig:
    """Parallel layout of the model over the devices, and the engine."""

    tensor_model_parallel_size: Annotated[int, alias("tp")] = 1
    """Ranks that share every layer (tensor parallel)."""
    pipeline_model_parallel_size: Annotated[int, alias("pp")] = 1
    """Ranks that share the stack of layers (pipeline parallel)."""
    num_virtual_stages_per_pipeline_rank: Annotated[int, alias("vpp")] = 1
    """Virtual stages of every pipeline rank; above 1 the schedule is interleaved: smaller bubbles, more
    communication."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers of the first pipeline stage, which also holds the embedding; the stages without a number share
    the rest equally."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last pipeline stage, which also holds the output layer and computes the loss."""
    context_parallel_size: Annotated[int, alias("cp")] = 1
    """Ranks that share the sequence of every sample (context parallel)."""
    cp_comm_type: Literal["allgather", "a2a"] = "allgather"
    """Exchange between context-parallel ranks: `allgather` gathers keys and values; `a2a` exchanges positions
    for heads (all-to-all, as in DeepSpeed-Ulysses)."""
    expert_model_parallel_size: Annotated[int, alias("ep")] = 1
    """Data-parallel ranks that share the experts of every layer (expert parallel)."""
    sequence_parallel: bool = False
    """Split activations along the sequence between the tensor-parallel regions."""
    use_distributed_optimizer: bool = False
    """Megatron engine: every data-parallel rank keeps and updates a part of the optimizer states, as in ZeRO
    1."""
    num_distributed_optimizer_instances: int = 1
    """Megatron engine, with --use-distributed-optimizer: shard the optimizer states over this fraction of the
    replicas only, and keep that many copies (hybrid ZeRO): fewer messages between nodes, more memory."""
    use_torch_fsdp2: bool = False
    """Megatron engine: shard weights, gradients and optimizer states over the data-parallel ranks by torch's
    FSDP2, as ZeRO 3 does."""
    overlap_grad_reduce: bool = False
    """Megatron engine: reduce gradients over the data-parallel ranks during the backward pass."""
    overlap_param_gather: bool = False
    """Megatron engine: gather updated weights during the next forward pass; requires the two flags above."""
    deepspeed: bool = False
    """Train with the DeepSpeed engine (ZeRO); else with Megatron-core's own."""
    deepspeed_config: str | None = None
    """DeepSpeed JSON with additional settings (offload, buckets, overlap); it must not contradict the derived
    ones."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed engine: ZeRO stage: 0 partitions nothing, 1 optimizer states, 2 also gradients, 3 also
    weights."""
    zero_hpz_partition_size: int = 1
    """DeepSpeed engine, stage 3: ranks (of one node) that share a second copy of the weights, to gather
    from."""
    zero_offload: Literal["none", "cpu", "nvme"] = "none"
    """DeepSpeed engine: memory for the optimizer states, if not the device's."""
    zero_offload_nvme_path: str | None = None
    """Folder on a local NVMe disk for --zero-offload nvme."""
    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this x the tensor-parallel size."""

    @property
    def model_size(self) -> int:
        """Number of ranks of one model replica: they process the same samples."""
        return (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )

    @property
    def layout_key(self) -> tuple[int | str | None, ...]:
        """Sizes that determine a rank's share of the work: runs with equal keys and world sizes draw equal
        random numbers."""
        return (
            self.tensor_model_parallel_size,
            self.pipeline_model_parallel_size,
            self.decoder_first_pipeline_num_layers,
            self.decoder_last_pipeline_num_layers,
            self.num_virtual_stages_per_pipeline_rank,
            self.context_parallel_size,
            self.cp_comm_type,
            self.expert_model_parallel_size,
            self.sequence_parallel,
        )


def padded_vocab_size(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Vocabulary rows after padding to a multiple of `make_vocab_size_divisible_by` x tensor-parallel
    size."""
    multiple = parallel.make_vocab_size_divisible_by * parallel.tensor_model_parallel_size
    return -(-model.vocab_size // multiple) * multiple


def check_tensor_parallel(model: ModelConfig, size: int) -> None:
    """Raises `UserError`, with the legal sizes, if the model does not split over `size` tensor-parallel
    ranks."""
    heads, groups, widths = model.num_attention_heads, model.kv_heads, model.ffn_widths

    def fits(size: int) -> bool:
        return (
            heads % size == 0
            and not any(width % size for width in widths)
            and (groups % size == 0 or size % groups == 0)
        )

    if size < 1 or not fits(size):
        choices = ", ".join(str(n) for n in range(1, heads + 1) if fits(n))
        raise UserError(
            f"{heads} attention heads, {groups} key/value heads and an FFN width of "
            f"{' and '.join(map(str, widths))} do not split over {size} tensor-parallel ranks; "
            f"choose {choices}"
        )
