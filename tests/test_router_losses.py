"""Load-balancing loss and z-loss of routers against Hugging Face's functions, on every layout."""

from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from helpers import oracle
from helpers.engines import DATA_SEED, RUN, run_cases
from helpers.moe import MIXTRAL, QWEN2_MOE, loaded
from safetensors.torch import save_file
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from ascendspeed.cli.train_args import resolve
from ascendspeed.config import lr_schedule
from ascendspeed.config.schema import ModelConfig
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES
from ascendspeed.models.gpt.router_losses import valid_tokens_of
from ascendspeed.training.metric_lines import TrainLine, format_line, parse_line
from ascendspeed.utils.errors import UserError

STEPS = 3
BALANCED = {
    "mixtral": replace(MIXTRAL, moe_aux_loss_coeff=0.5, moe_z_loss_coeff=0.1),
    "qwen2_moe": replace(QWEN2_MOE, moe_aux_loss_coeff=0.5),
}


def router_losses(config: ModelConfig, model, batch) -> tuple[torch.Tensor, list[float]]:
    """(weighted sum, [load-balancing loss, z-loss if any]): means over rows and layers."""
    balance, z = [], []
    for row in range(len(batch["tokens"])):
        length = int(batch["lengths"][row]) if "lengths" in batch else batch["tokens"].size(1)
        scores = model(batch["tokens"][row : row + 1], output_router_logits=True).router_logits
        for layer in (s[:length] for s in scores):
            balance.append(load_balancing_loss_func((layer,), config.num_experts, config.moe_router_topk))
            z.append(router_z_loss_func(layer[None]))
    means = torch.stack([torch.stack(balance).mean(), torch.stack(z).mean()])
    total = config.moe_aux_loss_coeff * means[0] + config.moe_z_loss_coeff * means[1]
    return total, means.tolist()[: 2 if config.moe_z_loss_coeff else 1]


def expected_curve(config: ModelConfig, folder, batches=None, steps=STEPS) -> list[tuple[float, ...]]:
    """(loss, gradient norm, router losses) of a plain torch loop over Hugging Face's model."""
    data = batches or oracle.batches(config.vocab_size, steps, 4, RUN.data.seq_length, DATA_SEED)
    lrs = [lr_schedule.lr_at(i, RUN.optim, RUN.train.train_iters) for i in range(steps)]
    reference = loaded(config, dict(param_mapping.random_tensors(config, RUN.train.seed)), folder)
    return oracle.train(reference, data, lrs, vars(RUN.optim), auxiliary=partial(router_losses, config))


def case(config: ModelConfig, train=None, **parallel) -> dict:
    return {
        "changes": {"model": asdict(config), "parallel": {"zero_stage": 1, **parallel}, "train": train or {}}
    }


def packed_rows(path) -> list[dict[str, torch.Tensor]]:
    """Batches with documents that end before the row does, also saved for the ranks."""
    data = oracle.batches(MIXTRAL.vocab_size, STEPS, 4, RUN.data.seq_length, DATA_SEED)
    lengths = torch.tensor([32, 20, 9, 31])
    index = torch.arange(RUN.data.seq_length).expand(4, -1)
    used = index < lengths[:, None]
    for batch in data:
        batch["loss_mask"][:, :8] = 1
        for name in ("tokens", "labels", "loss_mask"):
            batch[name] = batch[name] * used
        batch["position_ids"] = torch.where(used, index, index - lengths[:, None])
    save_file({name: torch.stack([batch[name] for batch in data]) for name in data[0]}, path)
    return [batch | {"lengths": lengths} for batch in data]


def compare(curves: dict, expected: dict) -> None:
    """Cases are named after their model; controls must fail."""
    for name, curve in curves.items():
        reference = expected[name.partition(",")[0]]
        pairs = zip(curve, reference, strict=True)
        off = max(abs(a - b) / b for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))
        print(f"{name}: {off:.1e}")
        assert (off > 1e-3) if "control" in name else (off < 1e-5), (name, off)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_losses_and_gradients_equal_hugging_face(every, tmp_path):
    """Both engines at TP 2 with sequence parallel; recomputed; without the loss the curve is another."""
    config = BALANCED["mixtral"]
    cases = {
        "mixtral, deepspeed": case(config, sequence_parallel=True),
        "mixtral, megatron": case(config, deepspeed=False, sequence_parallel=True),
        "mixtral, recomputed": case(
            config, {"recompute_granularity": "full"}, deepspeed=False, sequence_parallel=True
        ),
        "mixtral, control: half the coefficient": case(
            replace(config, moe_aux_loss_coeff=0.25), sequence_parallel=True
        ),
    }
    path = tmp_path / "rows.safetensors"
    rows = packed_rows(path)
    if every:
        cases["packed, deepspeed"] = cases["mixtral, deepspeed"] | {"data": str(path)}
    cases["packed, megatron"] = cases["mixtral, megatron"] | {"data": str(path)}
    if not every:
        del cases["mixtral, recomputed"], cases["mixtral, megatron"]
    cases["mixtral, control: other rows"] = cases["packed, megatron"]
    steps = STEPS if every else 2
    for settings in cases.values():
        settings["last"] = steps
    curves = run_cases("tp2-dp1", cases, tmp_path, STEPS, train_iters=RUN.train.train_iters)
    expected = {"mixtral": expected_curve(config, tmp_path / "hf", steps=steps)}
    compare(curves, expected | {"packed": expected_curve(config, tmp_path / "hf", rows[:steps], steps)})


@pytest.mark.slow
def test_every_layout_equals_hugging_face(tmp_path):
    expected = {name: expected_curve(config, tmp_path / name) for name, config in BALANCED.items()}
    one, two, four = {}, {}, {}
    path = tmp_path / "rows.safetensors"
    expected["packed"] = expected_curve(BALANCED["mixtral"], tmp_path / "packed", packed_rows(path))
    for name, config in BALANCED.items():
        megatron = partial(case, config, deepspeed=False, tensor_model_parallel_size=1)
        one[f"{name}, one rank, rows together"] = megatron({"micro_batch_size": 2})
        for stage in range(4):
            two[f"{name}, zero {stage} over 2"] = case(config, zero_stage=stage)
        two[f"{name}, ep 2"] = megatron(expert_model_parallel_size=2)
        two[f"{name}, pp 2"] = megatron(pipeline_model_parallel_size=2)
        two[f"{name}, pp 2 recomputed"] = megatron(
            {"recompute_granularity": "full"}, pipeline_model_parallel_size=2
        )
        two[f"{name}, cp 2"] = megatron(context_parallel_size=2)
        two[f"{name}, distributed optimizer"] = megatron(use_distributed_optimizer=True)
        four[f"{name}, tp 2 pp 2"] = case(
            config, deepspeed=False, pipeline_model_parallel_size=2, sequence_parallel=True
        )
        four[f"{name}, tp 2 ep 2"] = case(
            config, deepspeed=False, expert_model_parallel_size=2, sequence_parallel=True
        )
    packed = four["mixtral, tp 2 pp 2"] | {"data": str(path)}
    four["packed, tp 2 pp 2"] = packed
    two["packed, cp 2"] = two["mixtral, cp 2"] | {"data": str(path)}
    for layout, cases in (("tp1-dp1", one), ("tp1-dp2", two), ("tp2-dp2", four)):
        curves = run_cases(layout, cases, tmp_path / layout, STEPS, train_iters=RUN.train.train_iters)
        compare(curves, expected)


def test_unused_ends_of_rows_are_found():
    """A last document of zeros without supervised tokens; not one that is supervised or has tokens."""
    tokens = torch.tensor([[5, 0, 0, 0], [5, 6, 0, 0], [5, 6, 0, 7], [5, 6, 7, 0]])
    positions = torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 0, 1], [0, 1, 2, 0]])
    mask = torch.zeros(4, 4)
    assert valid_tokens_of(tokens, mask, positions).int().tolist() == [
        [1, 1, 1, 1],
        [1, 1, 0, 0],
        [1, 1, 1, 1],
        [1, 1, 1, 0],
    ]
    assert valid_tokens_of(tokens[:1], mask[:1], positions[:1]) is None
    mask[1, 2] = 1
    assert valid_tokens_of(tokens[:3], mask[:3], positions[:3]) is None


@pytest.mark.parametrize("name", BALANCED)
def test_the_coefficient_is_read_from_config_json_and_written(name):
    config = replace(BALANCED[name], moe_z_loss_coeff=0.0)
    written = FAMILIES[name].write_config(config)
    assert written["router_aux_loss_coef"] == 0.5
    assert FAMILIES[name].read_config(written) == config
    assert FAMILIES[name].read_config(written | {"router_aux_loss_coef": 0}).moe_aux_loss_coeff == 0
    assert "z_loss" not in str(FAMILIES[name].write_config(BALANCED[name]))
    with pytest.raises(UserError, match="router_aux_loss_coef"):
        FAMILIES[name].read_config(written | {"router_aux_loss_coef": -1.0})


def test_flags_and_notes():
    words = ["--data-path", "x", "--model", "mixtral-tiny", "--moe-aux-loss-coeff", "0.02"]
    run, notes = resolve(words, 1)
    assert run.model.moe_aux_loss_coeff == 0.02
    assert sum("coefficient 0.02" in note for note in notes) == 1
    assert not any("without a balancing loss" in note for note in notes)
    for flag in ("--moe-aux-loss-coeff", "--moe-z-loss-coeff"):
        with pytest.raises(UserError, match=f"{flag} 0.1: only a model with experts"):
            resolve(["--data-path", "x", "--model", "llama-tiny", flag, "0.1"], 1)


def test_the_log_line_has_columns_of_their_own():
    line = TrainLine("2026-01-01 00:00:00", 1, 2, loss=3.0, aux_loss=2.5, z_loss=0.25)
    assert "| lm loss: 3.00000000E+00 | load_balancing_loss: 2.50000000E+00 | z_loss: 2.5" in format_line(
        line
    )
    assert parse_line(format_line(line)) == line
    assert "load_balancing_loss" not in format_line(replace(line, aux_loss=None))
