"""Products in fp8 for the linears of compiled layers (`--fp8-format`), by torchao."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from ascendspeed.config.schema import Run
from ascendspeed.distributed import layer_compiler
from ascendspeed.distributed.device import Device
from ascendspeed.utils.errors import UserError

Product = Callable[[Tensor, Tensor], Tensor]
"""x [..., k], weight [n, k] -> x weight^T [..., n], with its gradients."""
PACKAGE = "torchao>=0.18,<0.19"
"""Tested versions of the library."""
CAPABILITY = "8.9"
"""Least compute capability of a GPU with such products."""


def product(fp8_format: Literal["e4m3", "hybrid"], emulate: bool = False) -> Product:
    """Returns the product of a linear: x [..., k], weight [n, k] -> x weight^T [..., n], with its gradients.

    Operands are rounded to fp8 with one scale each, from their largest values. "hybrid": weights and
    activations are e4m3, gradients of outputs e5m2; "e4m3": all are e4m3. `emulate`: rounded operands are
    multiplied in the type of x, which every device can.
    """
    from torchao.float8 import config as torchao_config
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

    config: Any = torchao_config.Float8LinearConfig(emulate=emulate)
    if fp8_format == "e4m3":
        cast = torchao_config.CastConfig(target_dtype=torchao_config.e4m3_dtype)
        config = replace(config, cast_config_grad_output=cast, cast_config_grad_output_for_grad_weight=cast)
    settings = LinearMMConfig(
        *(
            ScaledMMConfig(emulate, gemm.use_fast_accum, False, config.pad_inner_dim)
            for gemm in (
                config.gemm_config_output,
                config.gemm_config_grad_input,
                config.gemm_config_grad_weight,
            )
        )
    )
    return lambda x, weight: matmul_with_hp_or_float8_args.apply(x, weight.t(), settings, config)


def choose(run: Run, device: Device) -> tuple[Product | None, str]:
    """The product of a run, and the text for the log; None without --fp8-format.

    Raises `UserError` for what is missing: in the run, on the device, in the installation.
    """
    if run.train.fp8_format is None:
        return None, ""
    flag = f"--fp8-format {run.train.fp8_format}"
    if reason := layer_compiler.obstacle(run):
        raise UserError(f"{flag} is for compiled layers, and those of this run are not: {reason}")
    if not device.has_fp8_products:
        raise UserError(
            f"{flag}: {device.name} has no products in fp8, only GPUs of compute capability {CAPABILITY} or "
            "later have them; leave it out"
        )
    if importlib.util.find_spec("torchao") is None:
        raise UserError(f"{flag} needs torchao: pip install '{PACKAGE}', or leave it out")
    return product(run.train.fp8_format), f"torchao, {run.train.fp8_format}, a scale for each tensor"
