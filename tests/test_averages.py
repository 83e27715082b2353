"""Average of weights against torch's AveragedModel, its checkpoints and export; restoring in mid-run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import oracle
from helpers.engines import DATA_SEED, MODEL, RUN, run_cases
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ascendspeed.checkpoint.discovery import open_checkpoint
from ascendspeed.cli.train_args import resolve
from ascendspeed.config.lr_schedule import lr_at
from ascendspeed.models import param_mapping
from ascendspeed.utils.errors import UserError

STEPS, DECAY = 4, 0.7


def expected() -> dict[str, torch.Tensor]:
    """Averaged Hugging Face weights of a plain torch loop."""
    batches = oracle.batches(MODEL.vocab_size, STEPS, 4, RUN.data.seq_length, DATA_SEED)
    lrs = [lr_at(i, RUN.optim, RUN.train.train_iters) for i in range(STEPS)]
    model = oracle.hugging_face(MODEL, dict(param_mapping.random_tensors(MODEL, RUN.train.seed)))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

    def before_update(model, batch):
        averaged.update_parameters(model)  # the first call copies the initial weights
        return torch.zeros((), requires_grad=True), []

    oracle.train(model, batches, lrs, vars(RUN.optim), auxiliary=before_update)
    averaged.update_parameters(model)
    return dict(averaged.module.state_dict())


def in_hugging_face_names(path: Path, kind: str) -> dict[str, torch.Tensor]:
    tensors = dict(open_checkpoint(path).tensors(kind))
    named = {}
    for parameter in param_mapping.parameters(MODEL):
        named |= param_mapping.megatron_to_hf(MODEL, parameter, tensors[parameter.name])
    return named


def largest_difference(named: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    return max(float((tensor - reference[name]).abs().max()) for name, tensor in named.items())


def cases_of(modes: dict, folder: Path) -> dict:
    """For every mode: a whole run, one in two halves, and a step after going back in the same process."""
    cases = {}
    for name, parallel in modes.items():
        changes = {"parallel": parallel, "train": {"ema_decay": DECAY}}
        at = str(folder / "ckpt" / name)
        cases[f"{name}: first"] = {"changes": changes, "last": 2, "save": at}
        cases[f"{name}: then"] = {"changes": changes, "first": 2, "load": at, "save": f"{at} end"}
        cases[f"{name}: back"] = {"changes": changes, "first": 2, "load": at, "restore": 3}
        cases[f"{name}: skip"] = {"changes": changes, "first": 3, "load": at}
    return cases


@pytest.mark.parametrize(
    "modes",
    [
        {"zero 1": {"zero_stage": 1}, "megatron": {"deepspeed": False, "use_distributed_optimizer": True}},
        pytest.param(
            {f"zero {stage}": {"zero_stage": stage} for stage in (0, 2, 3)}
            | {
                "megatron": {"deepspeed": False},
                "pp": {"deepspeed": False, "pipeline_model_parallel_size": 2},
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["two", "all"],
)
def test_average_equals_torch_and_restores(modes, tmp_path):
    curves = run_cases(
        "tp1-dp2", cases_of(modes, tmp_path), tmp_path, STEPS, train_iters=RUN.train.train_iters
    )
    reference = expected()
    for name in modes:
        end = tmp_path / "ckpt" / f"{name} end"
        assert largest_difference(in_hugging_face_names(end, "ema"), reference) < 1e-5, name
        assert largest_difference(in_hugging_face_names(end, "master"), reference) > 1e-3, name
        if name == "zero 3":
            continue  # keeps gathered weights of before; --rollback-on-spike refuses it
        assert curves[f"{name}: back"][1:] == curves[f"{name}: skip"], name  # to the bit
        assert curves[f"{name}: back"][1:] != curves[f"{name}: then"][1:], name


def test_export_beside_the_checkpoint(tmp_path):
    """An average that a run begins at a checkpoint without one is that of its weights."""
    from ascendspeed.checkpoint.fragment import EMA, KINDS, Fragment, TrainState
    from ascendspeed.checkpoint.save import save_checkpoint
    from ascendspeed.training.loop import _export_average

    weights = dict(param_mapping.random_tensors(MODEL, 3))
    specs = {p.name: p.shard_spec(1, MODEL.vocab_size) for p in param_mapping.parameters(MODEL)}
    fragments = [
        Fragment(name, kind, specs[name], 0, 0, (t * (2 if kind == EMA else 1)).flatten())
        for name, t in weights.items()
        for kind in (*KINDS, EMA)
    ]
    run = replace(RUN, train=replace(RUN.train, ema_decay=DECAY))
    save_checkpoint(tmp_path, TrainState(7, 28, 1), run, fragments, {}, 0, 1, lambda: None)
    _export_average(open_checkpoint(tmp_path), tmp_path)
    exported = load_file(tmp_path / "ema_0000007" / "model.safetensors")
    assert torch.equal(exported["model.norm.weight"], 2 * weights["decoder.final_layernorm.weight"])
    assert json.loads((tmp_path / "ema_0000007" / "config.json").read_text())["hidden_size"] == 64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rollback-on-spike 2", "set --save and --save-interval"),
        ("--rollback-on-spike 2 --save x --save-interval 5 --deepspeed --zero-stage 3", "use --zero-stage 0"),
        ("--ema-decay 1", "below 1"),
        ("--ema-decay 0.9", "--ema-decay 0.9 keeps an average in checkpoints: add --save"),
        ("--ema-decay 0.9 --lora-rank 4", "leave it out for adapters"),
        ("--label-smoothing 1", "below 1"),
        ("--z-loss-coeff -1", "0 or more"),
    ],
)
def test_refusals(words, message):
    with pytest.raises(UserError, match=message):
        resolve(["--mock-data", "--model", "internlm-tiny", *words.split()], 1)
