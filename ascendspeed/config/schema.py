"""What a run is: frozen dataclasses, printable, saved beside every checkpoint. No torch, no file access.

The docstring under a field is its `--help` text, and its name is its flag (`num_layers` -> `--num-layers`); `flags.py` parses them.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.conf import Suppress, arg

from ascendspeed.utils.errors import UserError

DeviceChoice = Literal["auto", "cpu", "cuda", "npu"]
BackendChoice = Literal["auto", "nccl", "gloo", "hccl"]


def alias(*names: str) -> Any:
    """Other spellings of a flag, for people who have them in their shell history."""
    return arg(aliases=[f"--{name}" for name in names])


@dataclass(frozen=True)
class ModelConfig:
    """The architecture: what `config.json` of the Hugging Face model says, in Megatron's words. Flags override `--model`."""

    family: Suppress[str] = "internlm"
    """Entry of `ascendspeed.models.families`."""
    num_layers: int = 32
    """Transformer layers."""
    hidden_size: int = 4096
    """Width h of the residual stream."""
    ffn_hidden_size: int = 11008
    """Inner width f of the SwiGLU MLP."""
    num_attention_heads: int = 32
    """Query heads."""
    num_query_groups: int | None = None
    """Key/value heads for grouped-query attention; None: as many as query heads."""
    kv_channels: int | None = None
    """Width of one head; None: hidden size / heads."""
    vocab_size: int = 103168
    """Rows of the vocabulary, before padding for tensor parallel."""
    max_position_embeddings: int = 2048
    """Longest trained sequence; dynamic rope scaling starts above it."""
    norm_epsilon: float = 1e-6
    """Epsilon of RMSNorm."""
    rotary_base: float = 10000.0
    """Base (theta) of the rotary embedding."""
    rope_scaling_type: Literal["none", "linear", "dynamic"] = "none"
    """Scaling of the rotary embedding beyond the trained length."""
    rope_scaling_factor: float = 1.0
    """Factor of the rope scaling."""
    add_qkv_bias: bool = True
    """Bias on the query, key and value projections (InternLM 7B and 65B have it)."""
    add_dense_bias: bool = True
    """Bias on the attention's output projection (InternLM 7B and 65B have it)."""
    add_mlp_bias: bool = False
    """Bias on the projections of the MLP (InternLM3 with `bias`)."""
    tie_embeddings: bool = False
    """Use the embedding as the output layer too."""
    activation: Literal["silu", "gelu-tanh"] = "silu"
    """Activation of the gated MLP: SwiGLU, or GeGLU by the tanh approximation (Gemma)."""
    zero_centered_norm: bool = False
    """RMSNorm keeps w and multiplies by 1 + w (Gemma)."""
    scale_embeddings: bool = False
    """Multiply the embeddings by the square root of the hidden size (Gemma)."""
    normalize_head: bool = False
    """Bring every row of the output layer to length 1 (Baichuan 2's NormHead)."""
    num_experts: int | None = None
    """Experts in every MLP; None: a dense model."""
    moe_router_topk: int = 2
    """Experts that a token is sent to."""
    moe_ffn_hidden_size: int | None = None
    """Inner width of one expert; None: --ffn-hidden-size."""
    moe_shared_expert_intermediate_size: int | None = None
    """Inner width of the expert that every token is sent to, with a gate of its own; None: there is none."""
    moe_router_pre_softmax: bool = False
    """Softmax over all experts, then the top ones as they are (Qwen2-MoE); else softmax over the top ones (Mixtral)."""
    init_method_std: float = 0.02
    """Standard deviation of random weights; residual projections get this / sqrt(2 * layers)."""

    def __post_init__(self) -> None:
        # One spelling for one architecture, so that equal models compare equal and `replace` follows the heads.
        if self.num_query_groups == self.num_attention_heads:
            object.__setattr__(self, "num_query_groups", None)
        if self.kv_channels is not None and self.kv_channels * self.num_attention_heads == self.hidden_size:
            object.__setattr__(self, "kv_channels", None)

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def expert_ffn(self) -> int:
        """Inner width of one expert."""
        return self.moe_ffn_hidden_size or self.ffn_hidden_size

    @property
    def ffn_widths(self) -> tuple[int, ...]:
        """Inner widths of the MLPs that a layer has: its own, or those of an expert and of the shared one."""
        shared = self.moe_shared_expert_intermediate_size
        return (
            (self.ffn_hidden_size,)
            if self.num_experts is None
            else (self.expert_ffn, *((shared,) if shared else ()))
        )


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is laid over the devices, and by which engine."""

    tensor_model_parallel_size: Annotated[int, alias("tp")] = 1
    """Ranks that share every layer."""
    pipeline_model_parallel_size: Annotated[int, alias("pp")] = 1
    """Ranks that share the stack of layers."""
    num_virtual_stages_per_pipeline_rank: Annotated[int, alias("vpp")] = 1
    """Pieces of the stack that every pipeline rank holds; above 1 the schedule is interleaved: smaller bubbles, more traffic."""
    context_parallel_size: Annotated[int, alias("cp")] = 1
    """Ranks that share the sequence of every sample."""
    expert_model_parallel_size: Annotated[int, alias("ep")] = 1
    """Ranks, of those that share neither layers nor stages, that share the experts of every layer."""
    sequence_parallel: bool = False
    """Split activations along the sequence between the tensor-parallel regions."""
    use_distributed_optimizer: bool = False
    """Megatron engine: every data-parallel rank keeps and updates a part of the optimizer's states, as ZeRO 1 does."""
    overlap_grad_reduce: bool = False
    """Megatron engine: sum gradients over the data-parallel ranks while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Megatron engine: gather updated weights while the next forward pass goes on; needs the two flags above."""
    deepspeed: bool = False
    """Train with the DeepSpeed engine (ZeRO); else with Megatron-core's own."""
    deepspeed_config: str | None = None
    """A DeepSpeed JSON that adds to the derived one (offload, buckets, overlap) and may not contradict it."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed engine: what ZeRO partitions: 0 nothing, 1 optimizer states, 2 and gradients, 3 and weights."""
    zero_hpz_partition_size: int = 1
    """DeepSpeed engine, stage 3: ranks (those of one node) that keep a second copy of the weights among them, to gather from."""
    zero_offload: Literal["none", "cpu", "nvme"] = "none"
    """DeepSpeed engine: where the optimizer's states live, if not on the device."""
    zero_offload_nvme_path: str | None = None
    """Folder on a local NVMe disk for --zero-offload nvme."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this x the tensor-parallel size."""

    @property
    def model_size(self) -> int:
        """Ranks that see the same samples: together they hold one model."""
        return (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )

    @property
    def layout_key(self) -> tuple[int, ...]:
        """What decides which part of the work a rank does: with equal places and as many ranks, runs draw equal random numbers."""
        return (
            self.tensor_model_parallel_size,
            self.pipeline_model_parallel_size,
            self.num_virtual_stages_per_pipeline_rank,
            self.context_parallel_size,
            self.expert_model_parallel_size,
            self.sequence_parallel,
        )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule and its precision."""

    optimizer: Literal["adam"] = "adam"
    """AdamW; biases and one-dimensional weights do not decay (Megatron's rule)."""
    lr: float = 1.5e-4
    """Peak learning rate."""
    min_lr: float = 1.0e-5
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay."""
    lr_decay_iters: int | None = None
    """Iterations to decay over; None: --train-iters."""
    lr_warmup_fraction: float | None = None
    """Fraction of --lr-decay-iters to warm up over."""
    lr_warmup_iters: int = 0
    """Iterations to warm up over; not together with --lr-warmup-fraction."""
    weight_decay: float = 1e-2
    """Decoupled weight decay."""
    clip_grad: float = 1.0
    """Clip gradients to this global norm; 0: do not clip."""
    adam_beta1: float = 0.9
    """Adam's first beta."""
    adam_beta2: float = 0.95
    """Adam's second beta."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    bf16: bool = False
    """Weights and activations in bfloat16, with fp32 masters and fp32 gradient accumulation."""
    fp16: bool = False
    """Weights and activations in float16, with fp32 masters and loss scaling."""
    initial_loss_scale: float = 65536.0
    """First dynamic loss scale of fp16; a power of two."""

    @property
    def dtype(self) -> Literal["bf16", "fp16", "fp32"]:
        """Name of the compute type."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"


@dataclass(frozen=True)
class DataConfig:
    """The token data and how it is cut into samples."""

    data_path: tuple[str, ...] = ()
    """Prefix of a .bin/.idx pair, or weights and prefixes: 0.3 a 0.7 b. In place of a prefix: a folder of InternEvo's .bin and
    .bin.meta, or a Hugging Face data set (a folder of save_to_disk, parquet or jsonl files), which is tokenized while it is
    trained on."""
    valid_data_path: tuple[str, ...] = ()
    """Validation data, named in the same way; all of --data-path is then trained on."""
    split: str = "949,50,1"
    """Shares of train, validation and test documents."""
    seq_length: int = 2048
    """Tokens per sample."""
    packing: Literal["first-fit", "none", "internevo-cut", "internevo-whole"] | None = None
    """Of data with masks: how documents share a sample: each in the first that has room for it (first-fit), one in each (none), or
    one after the other and cut where a sample ends, attention within documents (internevo-cut) or across them (internevo-whole).
    Default: first-fit; of InternEvo's data internevo-cut."""
    max_segment_length: int | None = None
    """InternEvo's packings: attention spans at most this many tokens (max_length_per_sample); None: --seq-length."""
    min_length: int = 0
    """InternEvo's data: documents with fewer tokens are left out."""
    handler_name: str | None = None
    """Hugging Face data sets: how a row becomes a document, as in tools/preprocess_data.py; None: GeneralPretrainHandler."""
    json_keys: tuple[str, ...] = ("text",)
    """Hugging Face data sets: the column that GeneralPretrainHandler reads."""
    chat_template: str | None = None
    """Hugging Face data sets, as the next two: chat format by name; None: that of the model or of the tokenizer."""
    system: str | None = None
    """System message of conversations that have none."""
    loss_on: Literal["all", "last"] | None = None
    """Answers that are learnt; None: all of them."""
    strict: bool = False
    """Hugging Face data sets: a row that makes no document is an error."""
    is_instruction_dataset: bool = False
    """Asserts that all data are instruction data; they are recognised."""
    data_cache_path: str | None = None
    """Folder for index caches; None: beside the data."""
    tokenizer_name_or_path: str | None = None
    """Directory with tokenizer.model or tokenizer.json."""


@dataclass(frozen=True)
class TrainConfig:
    """Batches, length, logging, checkpoints and the device."""

    micro_batch_size: int = 1
    """Samples per rank and forward pass."""
    global_batch_size: int | None = None
    """Samples per iteration over all ranks; None: micro batch x data-parallel size."""
    train_iters: int = 1000
    """Iterations in the whole run."""
    train_epochs: float | None = None
    """Passes over the training data in the whole run, instead of --train-iters."""
    seed: int = 1234
    """Seed of data order, random weights and dropout."""
    attention_dropout: float = 0.0
    """Dropout on attention probabilities."""
    hidden_dropout: float = 0.0
    """Dropout on the residual branches."""
    recompute_granularity: Literal["none", "full", "selective"] = "none"
    """Activation recomputation: full keeps only the input of layers, selective all but the inside of the core attention."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Of full recomputation: uniform recomputes all layers in groups, block single layers, as many as --recompute-num-layers."""
    recompute_num_layers: int = 1
    """Layers in a group (uniform), or layers of every (virtual) pipeline stage that are recomputed (block)."""
    load: str | None = None
    """What to start from: a training checkpoint, converted weights, or a Hugging Face directory."""
    save: str | None = None
    """Folder for training checkpoints."""
    finetune: bool = False
    """Take only the weights from --load: start at iteration 0 with a fresh optimizer."""
    auto_resume: bool = False
    """Continue from the newest good checkpoint in --save when there is one; else start as --load says."""
    async_save: bool = False
    """Copy what a checkpoint holds to host memory, and write it behind the following iterations."""
    save_interval: int | None = None
    """Iterations between checkpoints; the last iteration is saved too."""
    keep: int | None = None
    """Newest checkpoints to keep; None: all."""
    log_interval: int = 1
    """Iterations between log lines."""
    eval_interval: int | None = None
    """Iterations between evaluations; None: none."""
    eval_iters: int = 10
    """Global batches per evaluation."""
    exit_interval: int | None = None
    """Save and stop at the first multiple of this many iterations."""
    exit_duration_in_mins: float | None = None
    """Save and stop after the first iteration that ends this many minutes after the start of the program."""
    distributed_timeout_minutes: float = 10.0
    """All ranks leave, and say why, when one has given no sign of life for this long, or a collective has not ended."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard events."""
    log_dir: str = "logs"
    """Folder for train.log."""
    device: DeviceChoice = "auto"
    """Where to run; auto takes an NPU, else a GPU, else the CPU."""
    distributed_backend: BackendChoice = "auto"
    """Collectives; nccl in a recipe means the device's own (gloo, nccl, hccl)."""
    use_fused_rmsnorm: bool = False
    """RMSNorm by the device's fused kernel, where there is one."""
    use_fused_rotary_pos_emb: bool = False
    """Rotary embedding by the device's fused kernel, where there is one."""
    mlp_layer_fusion: bool = False
    """SwiGLU by the device's fused kernel, where there is one."""
    max_skipped_steps: int = 10
    """Stop after this many skipped (overflowed or NaN) iterations in a row."""


@dataclass(frozen=True)
class LoraConfig:
    """Adapters beside weights that stay as they are (LoRA, arXiv 2106.09685)."""

    lora_rank: int = 0
    """Inner width of an adapter; 0: no adapters, all weights are trained."""
    lora_alpha: float = 16.0
    """What an adapter adds is multiplied by this / --lora-rank."""
    lora_dropout: float = 0.0
    """Dropout on what goes into an adapter."""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """Matrices with an adapter, by the family's Hugging Face names (q_proj v_proj ...; wqkv w1 ...), Megatron's, or all-linear."""
    lora_load: str | None = None
    """Adapters to start from, in place of fresh ones: a directory of peft, or a training checkpoint of adapters."""
    lora_base: str | None = None
    """Where the weights lie now that the adapters in --load belong to; None: where they lay when these were saved."""
    lora_base_fingerprint: Suppress[str | None] = None
    """Of the weights that the adapters belong to (`conversion.weights_identity.sampled`)."""


@dataclass(frozen=True)
class Run:
    """Everything a training run is."""

    model: ModelConfig
    parallel: ParallelConfig
    optim: OptimConfig
    data: DataConfig
    train: TrainConfig
    lora: LoraConfig = field(default_factory=LoraConfig)


def padded_vocab_size(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Vocabulary rows after padding to a multiple of `make_vocab_size_divisible_by` x tensor-parallel size."""
    multiple = parallel.make_vocab_size_divisible_by * parallel.tensor_model_parallel_size
    return -(-model.vocab_size // multiple) * multiple


def check_tensor_parallel(model: ModelConfig, size: int) -> None:
    """Raises `UserError` naming the legal choices when the model does not split over `size` tensor-parallel ranks."""
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
            f"{heads} attention heads, {groups} key/value heads and an FFN width of {' and '.join(map(str, widths))} "
            f"do not split over {size} tensor-parallel ranks; choose {choices}"
        )


def check_pipeline_parallel(model: ModelConfig, size: int, virtual: int = 1) -> None:
    """Raises `UserError` naming the legal choices when the layers do not split evenly over `size` pipeline stages x `virtual`."""
    layers = model.num_layers
    if size < 1 or layers % size:
        choices = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
        raise UserError(f"{layers} layers do not split over {size} pipeline stages; choose {choices}")
    if virtual < 1 or layers // size % virtual:
        choices = ", ".join(str(n) for n in range(1, layers // size + 1) if layers // size % n == 0)
        raise UserError(
            f"the {layers // size} layers of each of {size} pipeline stages do not split into {virtual} virtual stages; "
            f"choose {choices}"
        )


def to_dict(run: Any) -> dict[str, Any]:
    """A JSON-able dictionary of a config dataclass; `from_dict` reads it back."""
    return dataclasses.asdict(run)


def from_dict(values: dict[str, Any]) -> Run:
    """The `Run` that `to_dict` wrote. Raises `UserError` on a key that is not known."""
    groups = {
        "model": ModelConfig,
        "parallel": ParallelConfig,
        "optim": OptimConfig,
        "data": DataConfig,
        "train": TrainConfig,
    }
    try:
        parts = {name: group(**values[name]) for name, group in groups.items()}
        lora = LoraConfig(**values.get("lora", {}))  # older checkpoints have none
    except (KeyError, TypeError) as error:
        raise UserError(f"run.json is not one of this version: {error}") from error
    data = parts["data"]
    listed = {name: tuple(getattr(data, name)) for name in ("data_path", "valid_data_path", "json_keys")}
    parts["data"] = dataclasses.replace(data, **listed)
    return Run(**parts, lora=dataclasses.replace(lora, lora_target_modules=tuple(lora.lora_target_modules)))
