"""Checks of the optimizer's flags: combinations that an optimizer does not support. No torch."""

from ascendspeed.cli.parser import flag_of
from ascendspeed.config.schema import OptimConfig, Run
from ascendspeed.utils.errors import UserError


def check_muon(run: Run) -> None:
    """Raises UserError for what Muon does not support, and for its settings without it."""
    optim, parallel = run.optim, run.parallel
    default = OptimConfig()
    if optim.optimizer != "muon":
        for name in ("muon_momentum", "muon_num_ns_steps", "muon_scale_mode"):
            if (value := getattr(optim, name)) != getattr(default, name):
                raise UserError(f"{flag_of(name)} {value} belongs to --optimizer muon; add it")
        return
    if parallel.deepspeed and parallel.zero_stage == 3:
        raise UserError(
            "--optimizer muon needs whole matrices, which ZeRO-3 does not keep; use --zero-stage 0, 1 or 2"
        )
    if parallel.zero_offload != "none":
        raise UserError(
            f"--optimizer muon runs on the device; leave out --zero-offload {parallel.zero_offload}"
        )
    if (instances := parallel.num_distributed_optimizer_instances) > 1:
        raise UserError(
            f"--optimizer muon gathers matrices over all replicas; leave out "
            f"--num-distributed-optimizer-instances {instances}"
        )
    if run.lora.lora_rank:
        raise UserError("--optimizer muon trains the linears themselves; use --optimizer adam for adapters")


def check_split_masters(run: Run) -> None:
    """Raises UserError for a run whose engine or optimizer cannot keep masters as weights and 16 bits."""
    if not run.optim.store_param_remainders:
        return
    flag, parallel = "--store-param-remainders", run.parallel
    if not run.optim.bf16:
        raise UserError(f"{flag} splits the fp32 masters of bf16 weights; add --bf16")
    if parallel.deepspeed or parallel.use_torch_fsdp2:
        other = "--deepspeed" if parallel.deepspeed else "--use-torch-fsdp2"
        raise UserError(f"{flag} belongs to Megatron-core's optimizers; leave out {other}")
    if run.optim.optimizer != "adam":
        raise UserError(f"{flag} does not go with --optimizer {run.optim.optimizer}; use adam")
    if run.train.ema_decay is not None:
        raise UserError(f"{flag} keeps no masters to average; leave out --ema-decay {run.train.ema_decay:g}")


def check_safeguards(run: Run) -> None:
    """Raises UserError for a rollback without checkpoints, and an average that the engine cannot keep."""
    train = run.train
    if train.rollback_on_spike and not train.save_interval:
        raise UserError(
            f"--rollback-on-spike {train.rollback_on_spike} goes back to a checkpoint: set --save and "
            "--save-interval"
        )
    if train.rollback_on_spike and run.parallel.deepspeed and run.parallel.zero_stage == 3:
        raise UserError(
            "--rollback-on-spike: a running ZeRO-3 engine does not restore exactly; "
            "use --zero-stage 0, 1 or 2"
        )
    if train.ema_decay is not None and run.parallel.zero_offload == "nvme":
        raise UserError("--ema-decay keeps an average of weights in memory; leave out --zero-offload nvme")
    if train.ema_decay is not None and run.lora.lora_rank:
        raise UserError("--ema-decay averages whole models; leave it out for adapters")
