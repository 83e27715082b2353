"""Checks of the flags that choose kernels. No torch."""

from ascendspeed.config.schema import Run, TrainConfig
from ascendspeed.utils.errors import UserError


def check_triton(train: TrainConfig) -> None:
    """Raises UserError for --triton-kernels auto or off together with anything else."""
    alone = [value for value in train.triton_kernels if value in ("auto", "off")]
    if alone and len(train.triton_kernels) > 1:
        raise UserError(
            f"--triton-kernels {' '.join(train.triton_kernels)}: give {alone[0]} alone, or operations"
        )


def check_compile(run: Run) -> None:
    """Raises UserError for an activation memory budget out of range or without --compile."""
    budget = run.train.compile_activation_memory_budget
    if budget is None:
        return
    flag = f"--compile-activation-memory-budget {budget:g}"
    if not 0 < budget <= 1:
        raise UserError(f"{flag}: must be above 0 and at most 1")
    if not run.train.compile:
        raise UserError(f"{flag} belongs to --compile; add it")


def check_fp8(run: Run) -> None:
    """Raises UserError for products in fp8 with settings, or of sizes, that they do not have."""
    if run.train.fp8_format is None:
        return
    flag = f"--fp8-format {run.train.fp8_format}"
    for name, is_given in (("--bf16", run.optim.bf16), ("--compile", run.train.compile)):
        if not is_given:
            raise UserError(f"{flag} needs {name}; add it")
    for name, is_given in (
        ("--lora-rank", run.lora.lora_rank),
        ("--use-torch-fsdp2", run.parallel.use_torch_fsdp2),
    ):
        if is_given:
            raise UserError(f"{flag} does not go with {name}; leave one of them out")
    model, heads = run.model, run.model.num_attention_heads
    sizes = {
        "the hidden size": model.hidden_size,
        "the FFN width": model.ffn_widths[0],
        "the width of the attention": heads * model.head_dim,
        "the width of query, key and value": (heads + 2 * model.kv_heads) * model.head_dim,
        "the number of tokens in a micro-batch": run.train.micro_batch_size * run.data.seq_length,
    }
    for name, size in sizes.items():
        if size % 16:
            raise UserError(f"{flag}: {name} must be a multiple of 16, and is {size}; leave the flag out")
