"""Models that the layout, the engine or the quantisation of a run does not support. No torch."""

from ascendspeed.cli.parser import flag_of
from ascendspeed.config import schema
from ascendspeed.config.pipeline_stages import pipeline_stage_layers
from ascendspeed.config.schema import ModelConfig, ParallelConfig, Run
from ascendspeed.models.families import FAMILIES
from ascendspeed.models.families.base import check_experts, check_heads
from ascendspeed.models.families.rope_config import check_rope
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import divisors


def check_model(run: Run) -> None:
    """Raises UserError for an inconsistent architecture, or one that does not split over the ranks."""
    model = run.model
    parallel = run.parallel
    check_heads(model)
    check_rope(model)
    schema.check_tensor_parallel(model, parallel.tensor_model_parallel_size)
    pipeline_stage_layers(model.num_layers, parallel)
    _check_head_exchange(model, parallel)
    _check_experts(run)
    _check_biases(model)


def _check_head_exchange(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raises UserError if context-parallel ranks cannot exchange positions for heads."""
    if parallel.cp_comm_type != "a2a":
        return
    cp = parallel.context_parallel_size
    if cp == 1:
        raise UserError("--cp-comm-type a2a needs --context-parallel-size above 1; add it")
    tp = parallel.tensor_model_parallel_size
    groups = max(1, model.kv_heads // tp)
    if groups % cp:
        per_rank = f" / TP {tp} = {groups}" if tp > 1 else ""
        raise UserError(
            f"--cp-comm-type a2a: {model.kv_heads} key/value heads{per_rank} do not split over "
            f"{cp} context-parallel ranks; choose --context-parallel-size {divisors(groups)}, or "
            "--cp-comm-type allgather"
        )


def _check_experts(run: Run) -> None:
    """Raises UserError if the number of experts does not fit the family or the layout."""
    model = run.model
    parallel = run.parallel
    ranks = parallel.expert_model_parallel_size
    check_experts(model)
    mappings = FAMILIES[model.family].param_mappings
    family_has_experts = any("{e}" in mapping.megatron_param for mapping in mappings)
    if (model.num_experts is not None) != family_has_experts:
        has = "always has" if model.num_experts is None else "never has"
        raise UserError(
            f"--num-experts {model.num_experts}: a model of the family {model.family} {has} experts"
        )
    for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        if getattr(model, name) and not model.num_experts:
            raise UserError(
                f"{flag_of(name)} {getattr(model, name):g}: only a model with experts has a router"
            )
    if ranks > 1 and (model.num_experts or 1) % ranks:
        has = f"{model.num_experts} experts do" if model.num_experts else "a model without experts does"
        choices = divisors(model.num_experts or 1)
        raise UserError(f"{has} not split over {ranks} expert-parallel ranks; choose {choices}")
    if model.num_experts and parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        raise UserError(
            "experts under tensor parallel train wrongly without sequence parallel; add --sequence-parallel"
        )


def _check_biases(model: ModelConfig) -> None:
    """Raises UserError for a bias or norm that checkpoints of the family cannot hold."""
    family = FAMILIES[model.family]
    mappings = family.param_mappings
    if model.qk_layernorm != family.implicit_config.get("qk_layernorm", False):
        has = "have no norms of query and key heads" if model.qk_layernorm else "have them"
        raise UserError(
            f"--{'' if model.qk_layernorm else 'no-'}qk-layernorm: the models of the family "
            f"{model.family} {has}; leave it out"
        )
    for name in ("add_qkv_bias", "add_dense_bias", "add_mlp_bias"):
        if getattr(model, name) and not any(mapping.condition == name for mapping in mappings):
            raise UserError(
                f"{flag_of(name)}: the models of the family {model.family} have no such bias; leave it out"
            )


def check_quantization(run: Run) -> None:
    """Raises UserError for a quantised base whose weights would be partitioned."""
    if run.lora.quantization_bit is None:
        return
    flag = f"--quantization-bit {run.lora.quantization_bit}"
    if run.parallel.deepspeed and run.parallel.zero_stage == 3:
        raise UserError(
            f"{flag}: --zero-stage 3 partitions weights in the type of the run; use stage 0, 1 or 2"
        )
    if run.lora.quantization_bit == 4:
        _check_nf4_blocks(run)


def _check_nf4_blocks(run: Run) -> None:
    """Raises UserError if a linear's inputs on a rank cannot be divided into blocks of NF4."""
    model, tp = run.model, run.parallel.tensor_model_parallel_size
    cut = {"attention": model.num_attention_heads * model.head_dim}
    cut |= {f"an MLP of {width}": width for width in model.ffn_widths}
    widths = {"hidden_size": model.hidden_size, **{name: width // tp for name, width in cut.items()}}
    for name, width in widths.items():
        if width % schema.NF4_BLOCK:
            raise UserError(
                f"--quantization-bit 4 has a scale for every {schema.NF4_BLOCK} inputs, and {name} has "
                f"{width} on a rank (TP {tp}); use --quantization-bit 8"
            )
