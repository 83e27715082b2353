"""Group `train` of a run: batch sizes, run length, logging, checkpoints and device."""

from dataclasses import dataclass
from typing import Literal

from ascendspeed.config.schema.choices import BackendChoice, CpuLinearChoice, DeviceChoice, TritonChoice


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
    rampup_batch_size_iters: tuple[int, int, int] | None = None
    """START INCREMENT ITERATIONS: begin with a global batch of START and add INCREMENT after every ITERATIONS
    iterations until it is --global-batch-size, as InternEvo does."""
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
    triton_kernels: tuple[TritonChoice, ...] = ("auto",)
    """Operations that run as Triton kernels on CUDA; auto: all of them, if Triton can compile there."""
    cpu_linear: CpuLinearChoice = "auto"
    """Matrix products on a CPU: those in fp32 by oneDNN or torch; those in bf16 and fp16 in fp32, rounded
    afterwards, or by torch. auto: the faster one, in fp32 by a measurement on CPUs of AMD, in bf16 and fp16
    by the CPU's instructions. They differ by rounding."""
    no_gradient_accumulation_fusion: bool = False
    """Add weight gradients to their fp32 sums in a pass of their own, not in the product that makes them
    (bf16 on CUDA)."""
    sdpa_backend: Literal["auto", "default", "flash", "cudnn", "efficient", "math"] = "default"
    """Backend of torch's attention on CUDA: default is torch's choice; auto measures flash, cudnn and
    efficient at the start, for the shape of the run, and takes the fastest, alike on all ranks."""
    compile: bool = False
    """Compile the transformer layers by torch.compile, each as one graph, at TP 1: fewer passes over memory
    between the matrix products, after a minute or so at the start. On a CPU it needs g++."""
    compile_activation_memory_budget: float | None = None
    """Share of a compiled layer's activations that its backward pass may keep, above 0 up to 1; the cheapest
    of the others are recomputed. None: torch's choice, which is 1."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Products of the linears of compiled layers in fp8, by torchao, with a scale for each tensor: hybrid has
    gradients in e5m2 and the rest in e4m3. Needs --bf16, --compile and a GPU of compute capability 8.9."""
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
