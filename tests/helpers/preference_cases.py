"""Cases of preference tuning for both engines and every layout, and the comparison of their curves."""

from dataclasses import replace

from helpers.preference import REWARD_TOKEN

FEW = 3
ZERO = {"deepspeed": True, "zero_stage": 1}
RM = {"preference": {"stage": "rm"}, "model": {"reward_head": True}}
WITH_TOKEN = {**RM, "data": {"reward_token_id": REWARD_TOKEN}}

LORA = {"lora_rank": 4, "lora_alpha": 8.0, "lora_target_modules": ["all-linear"]}


def with_lora(run):
    """The run with the adapters of `LORA`."""
    return replace(run, lora=replace(run.lora, **{**LORA, "lora_target_modules": ("all-linear",)}))


def case(steps=FEW, parallel=None, **groups):
    return {"steps": steps, "changes": {"parallel": parallel or {}, **groups}}


def worst(curve, expected):
    """Largest difference of losses and rewards, and largest relative difference of gradient norms.

    At the start rewards are 0 but for rounding, which decides on their order, so on the accuracy.
    """
    pairs = list(zip(curve, expected, strict=True))
    values = 0.0
    for (loss, _, *rewards, accuracy), (other_loss, _, *other_rewards, other_accuracy) in pairs:
        for one, other in zip([loss, *rewards], [other_loss, *other_rewards], strict=True):
            values = max(values, abs(one - other))
        if max(map(abs, rewards)) > 1e-5:
            values = max(values, abs(accuracy - other_accuracy))
    return values, max(abs(one[1] - other[1]) / other[1] for one, other in pairs)


LAYOUTS = {
    "micro-batches of 2": case(train={"micro_batch_size": 2}),
    "tp2 sp": case(parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "dp2": case(parallel={"use_distributed_optimizer": True}),
    "pp2": case(parallel={"pipeline_model_parallel_size": 2}),
    "cp2": case(parallel={"context_parallel_size": 2}),
    "zero 3": case(parallel={**ZERO, "zero_stage": 3}),
    "zero 1 tp2 sp": case(parallel={**ZERO, "tensor_model_parallel_size": 2, "sequence_parallel": True}),
}
