"""Groups `lora` and `preference` of a run: adapters, and training on pairs of answers."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Suppress

from ascendspeed.config.schema.choices import alias

NF4_BLOCK = 64
"""Consecutive inputs of an output that share a scale under --quantization-bit 4."""


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
    quantization_bit: Literal[4, 8] | None = None
    """QLoRA: the frozen linears of the layers are kept in 8 bits (int8, a scale for each output channel) or 4
    (NF4, a scale for every 64 inputs); None: in the type of the run."""
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
