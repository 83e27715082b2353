"""Check of --cuda-graphs by the other flags, without torch."""

from ascendspeed.cli.parser import flag_of
from ascendspeed.inference.args import EngineSpec
from ascendspeed.utils.errors import UserError


def check_graph_flags(spec: EngineSpec) -> None:
    """Raises `UserError` for flags with which graphs cannot work; the device is checked when it is known."""
    args, flag = spec.args, flag_of("cuda_graphs")
    if args.layout.model_size > 1:
        raise UserError(f"{flag} works on one process only, not with --tp and --pp: leave it out")
    if args.dtype == "fp32":
        raise UserError(
            f"{flag} needs --bf16 or --fp16: the kernels that read the paged cache do not take fp32"
        )
    if args.kv_cache_dtype == "int8":
        raise UserError(
            f"{flag} does not work with --kv-cache-dtype int8, which no kernel reads: leave one out"
        )
    if spec.model and spec.model.num_experts:
        raise UserError(f"{flag} does not work with experts, which are chosen on the host: leave it out")
