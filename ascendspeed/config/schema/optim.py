"""Group `optim` of a run: the optimizer, its schedule and precision."""

from dataclasses import dataclass
from typing import Literal


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
