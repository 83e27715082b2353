"""Configuration of a run: frozen dataclasses, saved in every checkpoint as run.json. No torch, no file
access.

The docstring under a field is its `--help` text, and its name is its flag (`num_layers` -> `--num-layers`);
`cli.parser` parses them.
"""

import dataclasses
import typing
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from tyro.conf import Suppress, arg

from ascendspeed.utils.errors import UserError

DeviceChoice = Literal["auto", "cpu", "cuda", "npu"]
BackendChoice = Literal["auto", "nccl", "gloo", "hccl"]
MOCK_DATA = "<mock data>"
"""Value of `DataConfig.data_path` for --mock-data."""
CpuLinearChoice = Literal["auto", "onednn", "torch"]
QuantizationChoice = Literal["w8a16"]
KVCacheChoice = Literal["auto", "int8"]


def alias(*names: str) -> Any:
    """Other spellings of a flag."""
    return arg(aliases=[f"--{name}" for name in names])


@dataclass(frozen=True)
class ModelConfig:
    """Model architecture: the contents of a Hugging Face `config.json` under Megatron's names. Flags override
    `--model`."""

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
    """Longest training sequence; dynamic rope scaling starts above it."""
    norm_epsilon: float = 1e-6
    """Epsilon of RMSNorm."""
    rotary_base: float = 10000.0
    """Base (theta) of the rotary embedding."""
    rope_scaling_type: Literal["none", "linear", "dynamic", "llama3", "yarn"] = "none"
    """Scaling of the rotary embedding: of all positions (linear), of the base beyond the trained length
    (dynamic), of low frequencies (llama3, of Llama 3.1 and later), or of low frequencies and of attention
    (yarn)."""
    rope_scaling_factor: float = 1.0
    """Factor of the rope scaling."""
    rope_original_max_position_embeddings: int | None = None
    """Types llama3 and yarn: length L of the training before the scaling."""
    rope_low_freq_factor: float = 1.0
    """Type llama3: wavelengths above L / this are scaled by the factor."""
    rope_high_freq_factor: float = 4.0
    """Type llama3: wavelengths below L / this are not scaled; those between are scaled in part."""
    rope_beta_fast: float = 32.0
    """Type yarn: frequencies that turn more than this often over L are not scaled."""
    rope_beta_slow: float = 1.0
    """Type yarn: frequencies that turn less than this often over L are scaled by the factor; those between
    are scaled in part."""
    rope_attention_factor: float | None = None
    """Type yarn: factor of cos and sin, whose square multiplies the attention scores; None: 0.1 ln(factor) +
    1."""
    add_qkv_bias: bool = True
    """Bias on the query, key and value projections (InternLM 7B and 65B have it)."""
    add_dense_bias: bool = True
    """Bias on the attention's output projection (InternLM 7B and 65B have it)."""
    add_mlp_bias: bool = False
    """Bias on the projections of the MLP (InternLM3 with `bias`)."""
    qk_layernorm: bool = False
    """RMSNorm of every query and key head before the rotary embedding (Qwen3)."""
    tie_embeddings: bool = False
    """Use the embedding as the output layer as well."""
    activation: Literal["silu", "gelu-tanh"] = "silu"
    """Activation of the gated MLP: SwiGLU, or GeGLU by the tanh approximation (Gemma)."""
    zero_centered_norm: bool = False
    """RMSNorm keeps w and multiplies by 1 + w (Gemma)."""
    scale_embeddings: bool = False
    """Multiply the embeddings by the square root of the hidden size (Gemma)."""
    normalize_head: bool = False
    """Normalize every row of the output layer to length 1 (Baichuan 2's NormHead)."""
    num_experts: int | None = None
    """Experts in every MLP; None: a dense model."""
    moe_router_topk: int = 2
    """Experts that a token is sent to."""
    moe_ffn_hidden_size: int | None = None
    """Inner width of one expert; None: --ffn-hidden-size."""
    moe_shared_expert_intermediate_size: int | None = None
    """Inner width of the gated shared expert, which every token is sent to; None: no shared expert."""
    moe_router_pre_softmax: bool = False
    """Softmax over all experts before the top ones are selected (Qwen2-MoE); else over the selected ones
    (Mixtral)."""
    moe_aux_loss_coeff: float = 0.0
    """Coefficient of the experts' load-balancing loss, as router_aux_loss_coef of config.json: a mean over
    layers and rows of Hugging Face's load_balancing_loss_func; 0: no such loss."""
    moe_z_loss_coeff: float = 0.0
    """Coefficient of the router's z-loss, a mean over layers and rows of log² of the sum of exp(scores)."""
    init_method_std: float = 0.02
    """Standard deviation of random weights; divided by sqrt(2 * layers) for residual projections."""
    reward_head: Suppress[bool] = False
    """The model is a reward model: its output layer gives one score for every position."""
    scored_token_id: Suppress[int | None] = None
    """Reward model: token after the text, at whose position the score is read; None: at the last token."""

    def __post_init__(self) -> None:
        # Canonical form: equal architectures compare equal, and `replace` of the heads keeps the ratio.
        if self.num_query_groups == self.num_attention_heads:
            object.__setattr__(self, "num_query_groups", None)
        if self.kv_channels is not None and self.kv_channels * self.num_attention_heads == self.hidden_size:
            object.__setattr__(self, "kv_channels", None)
        if self.reward_head:  # no output layer that could be tied
            object.__setattr__(self, "tie_embeddings", False)

    def same_function(self, other: "ModelConfig") -> bool:
        """True if two models differ at most in fields that only training reads."""
        return replace(self, **TRAINING_FIELDS) == replace(other, **TRAINING_FIELDS)

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
        """Inner widths of the MLPs of a layer: the dense one, or an expert and the shared expert."""
        shared = self.moe_shared_expert_intermediate_size
        return (
            (self.ffn_hidden_size,)
            if self.num_experts is None
            else (self.expert_ffn, *((shared,) if shared else ()))
        )


TRAINING_FIELDS: dict[str, Any] = {
    "init_method_std": 0.02,
    "moe_aux_loss_coeff": 0.0,
    "moe_z_loss_coeff": 0.0,
}
"""Fields of `ModelConfig` that only training reads, with their defaults."""


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


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, its learning-rate schedule and precision."""

    optimizer: Literal["adam", "muon"] = "adam"
    """AdamW, without weight decay for biases and one-dimensional weights (Megatron's rule); muon: Muon for
    the linears of the layers, AdamW for all else."""
    muon_momentum: float = 0.95
    """Muon's momentum (Nesterov)."""
    muon_num_ns_steps: int = 5
    """Newton-Schulz iterations of an update of Muon."""
    muon_scale_mode: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Size of Muon's update of a matrix [m, n]: that of AdamW's (0.2 sqrt(max(m, n))), so that both share
    --lr, or original (sqrt(max(1, m / n)))."""
    lr: float = 1.5e-4
    """Peak learning rate."""
    min_lr: float = 1.0e-5
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the decay; WSD (warmup, stable, decay) keeps --lr until the last --lr-wsd-decay-iters."""
    lr_decay_iters: int | None = None
    """Iterations to decay over, warmup included; None: --train-iters."""
    lr_decay_samples: int | None = None
    """Samples to decay over, in a run of --train-samples; None: --train-samples."""
    lr_warmup_fraction: float | None = None
    """Fraction of --lr-decay-iters or --lr-decay-samples to warm up over."""
    lr_warmup_iters: int = 0
    """Iterations to warm up over; not together with --lr-warmup-fraction."""
    lr_warmup_samples: int = 0
    """Samples to warm up over, in a run of --train-samples."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the decay at the end of WSD."""
    lr_wsd_decay_iters: int | None = None
    """Iterations of the decay at the end of WSD."""
    lr_wsd_decay_samples: int | None = None
    """Samples of the decay at the end of WSD, in a run of --train-samples."""
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
    """Weights and activations in bfloat16, with fp32 master weights and fp32 gradient accumulation."""
    store_param_remainders: bool = False
    """Keep 16 further bits of every weight instead of an fp32 master, which both are together: 16 instead of
    18 bytes per parameter; with --bf16 in Megatron-core's engine."""
    fp16: bool = False
    """Weights and activations in float16, with fp32 master weights and loss scaling."""
    initial_loss_scale: float = 65536.0
    """Initial dynamic loss scale of fp16; a power of two."""

    @property
    def dtype(self) -> Literal["bf16", "fp16", "fp32"]:
        """Name of the compute type."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"


@dataclass(frozen=True)
class DataConfig:
    """Token data and its division into samples."""

    data_path: tuple[str, ...] = ()
    """Prefix of a .bin/.idx pair, or weights and prefixes: 0.3 a 0.7 b. Instead of a prefix: a folder of
    InternEvo's .bin and .bin.meta files, or a Hugging Face data set (a folder of save_to_disk, parquet or
    jsonl files), tokenized during training."""
    mock_data: bool = False
    """Train on random token ids instead of --data-path, to measure speed and memory."""
    valid_data_path: tuple[str, ...] = ()
    """Validation data, in the form of --data-path, all of which is then training data."""
    split: str = "949,50,1"
    """Shares of train, validation and test documents."""
    seq_length: int = 2048
    """Tokens per sample."""
    packing: Literal["first-fit", "none", "internevo-cut", "internevo-whole"] | None = None
    """Packing of documents with loss masks into samples: each into the first sample with enough space
    (first-fit), one per sample (none), or consecutively and cut at the end of a sample, with attention within
    documents (internevo-cut) or across them (internevo-whole). Default: first-fit; internevo-cut for
    InternEvo's data."""
    max_segment_length: int | None = None
    """InternEvo's packings: longest attention span in tokens (max_length_per_sample); None: --seq-length."""
    min_length: int = 0
    """InternEvo's data: skip documents with fewer tokens."""
    handler_name: str | None = None
    """Hugging Face data sets: handler that converts rows to documents, as in tools/preprocess_data.py; None:
    GeneralPretrainHandler."""
    json_keys: tuple[str, ...] = ("text",)
    """Hugging Face data sets: the column that GeneralPretrainHandler reads."""
    chat_template: str | None = None
    """Hugging Face data sets: name of the chat template; None: the template of the model or tokenizer. A
    checkpoint records the template of its training data, whatever their kind."""
    system: str | None = None
    """Hugging Face data sets: system message for conversations without one."""
    loss_on: Literal["all", "last"] | None = None
    """Hugging Face data sets: answers in the loss; None: all."""
    parse_special_tokens: bool = False
    """Hugging Face data sets: special tokens in the text become their ids, as in tools/preprocess_data.py."""
    strict: bool = False
    """Hugging Face data sets: stop at a row that gives no document."""
    reward_token_id: int | None = None
    """Stage rm: token that is put after every conversation, and at whose position the score is read (92527
    for InternLM2, as in its published reward models); None: the score is read at the last token."""
    is_instruction_dataset: bool = False
    """Assert that all data are instruction data, which are detected in any case."""
    data_cache_path: str | None = None
    """Folder for index caches; None: next to the data."""
    tokenizer_name_or_path: str | None = None
    """Directory with tokenizer.model or tokenizer.json."""


@dataclass(frozen=True)
class TrainConfig:
    """Batch sizes, run length, logging, checkpoints and device."""

    micro_batch_size: int = 1
    """Samples per rank and forward pass."""
    global_batch_size: int | None = None
    """Samples per iteration over all ranks; None: micro batch x data-parallel size."""
    rampup_batch_size: tuple[int, int, int] | None = None
    """START INCREMENT SAMPLES: begin with a global batch of START and add INCREMENT in equal steps, until
    after SAMPLES samples it is --global-batch-size; needs --train-samples."""
    iterations_to_skip: tuple[int, ...] = ()
    """Iterations whose samples are left out without an update; the first iteration is 0, as in
    Megatron-LM (the log calls it 1)."""
    skip_batches: str | None = None
    """Iterations to skip as numbers and ranges, as in InternEvo: 3,7-9; the first one is 0."""
    train_iters: int = 1000
    """Iterations in the whole run."""
    train_samples: int | None = None
    """Samples in the whole run, instead of --train-iters; schedules then count samples."""
    train_epochs: float | None = None
    """Passes over the training data in the whole run, instead of --train-iters."""
    seed: int = 1234
    """Seed of data order, random weights and dropout."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over the vocabulary, as in torch's cross_entropy. The reported loss
    stays the cross entropy."""
    z_loss_coeff: float = 0.0
    """Coefficient of a z-loss: log² of the sum of exp(logits) of every supervised token. It is not in the
    reported loss."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights: after every update, average = DECAY x average +
    (1 - DECAY) x weights. It is in the checkpoints, and at the end a Hugging Face directory in --save."""
    rollback_on_spike: int = 0
    """At a loss spike, go back to the last checkpoint and leave out the samples of that iteration, at most
    this many times in a run; 0: never."""
    attention_dropout: float = 0.0
    """Dropout on attention probabilities."""
    hidden_dropout: float = 0.0
    """Dropout on the residual branches."""
    recompute_granularity: Literal["none", "full", "selective"] = "none"
    """Activation recomputation: full stores the inputs of layers only, selective everything except core
    attention."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Full recomputation: uniform recomputes all layers in groups, block recomputes --recompute-num-layers
    single layers."""
    recompute_num_layers: int = 1
    """Layers in a group (uniform), or layers of every (virtual) pipeline stage that are recomputed
    (block)."""
    auto_recompute_device_size: int | None = None
    """MiB of one device: recompute as few layers as fit into it by the planner's count, which leaves out
    1 to 2 GiB of the device's libraries. --recompute-granularity full or selective overrides it."""
    load: str | None = None
    """Training checkpoint, converted weights, or Hugging Face directory to start from."""
    save: str | None = None
    """Folder for training checkpoints."""
    finetune: bool = False
    """Load only the weights of --load: start at iteration 0 with a new optimizer."""
    auto_resume: bool = False
    """Resume from the newest valid checkpoint in --save if there is one; else start from --load."""
    async_save: bool = False
    """Copy the checkpoint to host memory and write it during the following iterations."""
    save_interval: int | None = None
    """Iterations between checkpoints; the last iteration is saved too."""
    keep: int | None = None
    """Number of newest checkpoints to keep; None: all."""
    log_interval: int = 1
    """Iterations between log lines."""
    eval_interval: int | None = None
    """Iterations between evaluations; None: no evaluation."""
    eval_iters: int = 10
    """Global batches per evaluation."""
    eval_tasks: tuple[str, ...] = ()
    """Benchmarks to score during training: the names of the evaluation's --task."""
    eval_tasks_data_path: tuple[str, ...] = ()
    """Folder of each benchmark, in the order of --eval-tasks."""
    eval_tasks_interval: int | None = None
    """Iterations between the scores of --eval-tasks."""
    eval_tasks_limit: int | None = None
    """Questions of each subject of --eval-tasks; None: all."""
    exit_interval: int | None = None
    """Save and stop at the first multiple of this many iterations."""
    exit_duration_in_mins: float | None = None
    """Save and stop after the first iteration that ends at least this many minutes after program start."""
    distributed_timeout_minutes: float = 10.0
    """Minutes after which all ranks exit with a report if a rank is silent or a collective has not
    finished."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard events."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "swanlab", "trackio"], ...] = ()
    """Experiment trackers; each needs its package, and tensorboard writes to --tensorboard-dir, else to
    tensorboard in --log-dir."""
    wandb_project: str | None = None
    """Project of the trackers; alone it asks for wandb."""
    wandb_exp_name: str | None = None
    """Name of the run in the trackers."""
    wandb_entity: str | None = None
    """Team or user of Weights & Biases."""
    wandb_save_dir: str | None = None
    """Folder for local files of Weights & Biases; None: --log-dir."""
    log_dir: str = "logs"
    """Folder for train.log, metrics.jsonl and run.html."""
    device: DeviceChoice = "auto"
    """Device; auto selects an NPU, else a GPU, else the CPU."""
    distributed_backend: BackendChoice = "auto"
    """Backend for collectives; nccl in a recipe means the device's own (gloo, nccl, hccl)."""
    deterministic: bool = False
    """Only kernels and collectives with a fixed order of sums, so that a repeated or resumed run has equal
    bits on a GPU too; slower. A CPU needs no flag."""
    use_fused_rmsnorm: bool = False
    """Use the device's fused RMSNorm kernel, if available."""
    use_fused_rotary_pos_emb: bool = False
    """Use the device's fused rotary-embedding kernel, if available."""
    mlp_layer_fusion: bool = False
    """Use the device's fused SwiGLU kernel, if available."""
    cpu_linear: CpuLinearChoice = "auto"
    """Matrix products in fp32 on a CPU: oneDNN's or torch's; auto: the faster one, measured at the start on
    CPUs of AMD. The two differ by rounding."""
    no_gradient_accumulation_fusion: bool = False
    """Add weight gradients to their fp32 sums in a pass of their own, not in the product that makes them
    (bf16 on CUDA)."""
    profile: bool = False
    """Trace a few iterations with torch.profiler, into profile in --log-dir, with a summary of the time by
    kind."""
    profile_step_start: int = 10
    """Completed iterations after which the profile begins."""
    profile_step_end: int = 12
    """Completed iterations after which the profile ends."""
    profile_ranks: tuple[int, ...] = ()
    """Ranks to trace; none given: all."""
    record_memory_history: bool = False
    """Record every allocation on a CUDA device, and write --memory-snapshot-path at the end of the run."""
    memory_snapshot_path: str = "snapshot.pickle"
    """File for --record-memory-history, for pytorch.org/memory_viz; each other rank has one of its own."""
    max_skipped_steps: int = 10
    """Stop after this many consecutive skipped iterations (overflow or NaN)."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of frozen weights (LoRA, arXiv 2106.09685)."""

    lora_rank: int = 0
    """Rank of the adapters; 0: no adapters, all weights are trained."""
    lora_alpha: float = 16.0
    """The output of an adapter is multiplied by this / --lora-rank."""
    lora_dropout: float = 0.0
    """Dropout on the input of adapters."""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """Matrices with an adapter, by the family's Hugging Face names (q_proj v_proj ...; wqkv w1 ...),
    Megatron's, or all-linear."""
    quantization_bit: Literal[8] | None = None
    """QLoRA: the frozen linears of the layers are kept in 8 bits, with a scale for each output channel; None:
    in the type of the run."""
    lora_load: str | None = None
    """Adapters to start from instead of new ones: a peft directory or a training checkpoint of adapters."""
    lora_base: str | None = None
    """Current path of the base weights of the adapters in --load; None: the path at the time of saving."""
    lora_base_fingerprint: Suppress[str | None] = None
    """Fingerprint of the base weights of the adapters (`conversion.weights_identity.sampled`)."""


REFERENCE_LOSSES = ("dpo", "ipo", "kto")
"""Values of `--loss` that compare with the weights from before the training."""


@dataclass(frozen=True)
class PreferenceConfig:
    """Training on pairs of a chosen and a rejected answer."""

    stage: Literal["pretrain", "sft", "dpo", "rm"] | None = None
    """Stage of the training: pretrain and sft predict the next token; dpo trains on preference pairs by
    --loss; rm trains a reward model on preference pairs. None: pretrain or sft, by the data."""
    loss: Literal["dpo", "ipo", "orpo", "simpo", "kto"] = "dpo"
    """Loss of --stage dpo. dpo, ipo and kto compare with a reference: the weights of --load, or for LoRA the
    weights without adapters; orpo and simpo do not."""
    beta: Annotated[float, alias("dpo-beta")] = 0.1
    """Strength of the tie to the reference (dpo, ipo, kto); factor of the rewards (simpo, orpo)."""
    dpo_label_smoothing: float = 0.0
    """Assumed share of pairs whose answers are swapped (dpo, simpo)."""
    simpo_gamma: float = 1.0
    """Margin between the rewards that simpo aims at."""
    orpo_lambda: float = 0.1
    """Weight of the odds ratio beside the cross entropy of the chosen answer (orpo)."""
    kto_desirable_weight: float = 1.0
    """Weight of chosen answers (kto)."""
    kto_undesirable_weight: float = 1.0
    """Weight of rejected answers (kto)."""
    reference_fingerprint: Suppress[str | None] = None
    """Fingerprint of the reference weights (`conversion.weights_identity.sampled`)."""

    @property
    def trains_on_pairs(self) -> bool:
        """True if the data are preference pairs."""
        return self.stage in ("dpo", "rm")

    @property
    def trains_reward_model(self) -> bool:
        """True if the model gets a scalar head."""
        return self.stage == "rm"

    @property
    def needs_reference(self) -> bool:
        """True if the loss compares with reference weights."""
        return self.stage == "dpo" and self.loss in REFERENCE_LOSSES


@dataclass(frozen=True)
class InputRecord:
    """Content of what a run has read, for notes when its checkpoint is continued; no flags set it."""

    data: tuple[str, ...] = ()
    """Hash of each data set of --data-path (`data.dataset.hash_dataset`)."""
    valid_data: tuple[str, ...] = ()
    """Hash of each data set of --valid-data-path."""
    tokenizer: str | None = None
    """Hash of the tokenizer (`tokenization.fingerprint`)."""
    deepspeed_config: str | None = None
    """Content of --deepspeed_config, as JSON."""
    hub: tuple[str, ...] = ()
    """Models that were fetched from a hub, with their commits: internlm/internlm2-7b@COMMIT."""


@dataclass(frozen=True)
class Run:
    """Complete configuration of a training run."""

    model: ModelConfig
    parallel: ParallelConfig
    optim: OptimConfig
    data: DataConfig
    train: TrainConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    inputs: InputRecord = field(default_factory=InputRecord)


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


def to_dict(run: Any) -> dict[str, Any]:
    """Converts a config dataclass to a dictionary for JSON; `from_dict` is the inverse for a `Run`."""
    return dataclasses.asdict(run)


def from_dict(values: dict[str, Any]) -> Run:
    """Builds a `Run` from a dictionary of `to_dict`. Raises `UserError` for unknown or missing keys."""
    groups = {
        "model": ModelConfig,
        "parallel": ParallelConfig,
        "optim": OptimConfig,
        "data": DataConfig,
        "train": TrainConfig,
    }
    try:
        parts = {name: _group_from_dict(group, values[name]) for name, group in groups.items()}
        lora = _group_from_dict(LoraConfig, values.get("lora", {}))  # absent in older checkpoints
        inputs = _group_from_dict(InputRecord, values.get("inputs", {}))  # likewise
        preference = _group_from_dict(PreferenceConfig, values.get("preference", {}))  # likewise
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"run.json is not one of this version: {str(error)[:200]}") from error
    return Run(**parts, lora=lora, preference=preference, inputs=inputs)


def _group_from_dict(group: type, values: dict[str, Any]) -> Any:
    """Builds one dataclass of a `Run`. Raises `TypeError` for a key or a type that it does not have."""
    hints = typing.get_type_hints(group)
    for name, value in values.items():
        if name in hints and not _is_of_type(value, hints[name]):
            raise TypeError(f"{name} = {value!r:.80}")
    # JSON turns tuples into lists; no field is a list.
    tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return group(**values | tuples)


def _is_of_type(value: Any, hint: Any) -> bool:
    """True if a JSON value can be that of a field; choices are compared by type only."""
    origin = typing.get_origin(hint)
    options = typing.get_args(hint)
    if origin is Literal:
        return any(type(value) is type(option) for option in options)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_is_of_type(item, options[0]) for item in value)
    if options:  # a union
        return any(_is_of_type(value, option) for option in options)
    return type(value) in (int, float) if hint is float else type(value) is hint
