"""Selects the kernels of a training run from its flags, and names them for the log."""

from dataclasses import replace

from ascendspeed.config.schema import Run
from ascendspeed.distributed import fp8, fused_kernels, layer_compiler, sdpa_backend
from ascendspeed.distributed.cpu_products import Products
from ascendspeed.distributed.device import Device
from ascendspeed.distributed.fused_kernels import Kernels


def select(run: Run, device: Device) -> Kernels:
    """The kernels of a run. Collective.

    Raises `UserError` for what --compile, --sdpa-backend or --fp8-format name and this machine lacks.
    """
    compiler, text = layer_compiler.choose(run, device) if run.train.compile else (None, "")
    kernels = fused_kernels.select_kernels(
        device,
        rms_norm=run.train.use_fused_rmsnorm,
        rotary=run.train.use_fused_rotary_pos_emb,
        swiglu=run.train.mlp_layer_fusion,
        varlen=run.optim.dtype != "fp32"
        and not run.train.attention_dropout
        and not run.train.deterministic
        and run.parallel.context_parallel_size == 1
        and compiler is None,
        # A compiled layer has its own products.
        weight_gradient=run.optim.bf16 and not run.train.no_gradient_accumulation_fusion and compiler is None,
        products=Products.of_training(run),
        triton=run.train.triton_kernels if compiler is None else _without_auto(run.train.triton_kernels),
    )
    backend, attention = sdpa_backend.choose(run, device)
    fp8_product, fp8_text = fp8.choose(run, device)
    if kernels.attention_dtype is not None:
        attention = f"{attention} {dict(kernels.sources)['attention']}"
    named = {"layers": text, "linears of the layers": fp8_text, "attention": attention}
    sources = dict(kernels.sources) | {name: source for name, source in named.items() if source}
    return replace(
        kernels,
        fp8_product=fp8_product,
        sdpa_backend=backend,
        layer_compiler=compiler,
        sources=tuple(sources.items()),
    )


def _without_auto(triton: tuple[str, ...]) -> tuple[str, ...]:
    """--triton-kernels of compiled layers, which have fused operations of their own."""
    return ("off",) if triton == ("auto",) else triton


def describe(run: Run, kernels: Kernels) -> str:
    """Text of the line `kernels:` of the log."""
    masters = "; masters: bf16 weights and 16 bits" if run.optim.store_param_remainders else ""
    return f"{kernels}{masters}"
