"""`--deterministic`: settings of torch and of the libraries, and the losses of a run with it."""

import numpy as np
import pytest
import torch
from helpers import launch

from ascendspeed.data.indexed.megatron_pair import PairWriter
from ascendspeed.distributed import device
from ascendspeed.training.metric_lines import TrainLine, read_lines
from ascendspeed.utils.errors import UserError


@pytest.fixture
def variables(monkeypatch):
    """The environment without the variables that matter, and torch's settings restored afterwards."""
    for name in device.DETERMINISTIC_VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield monkeypatch
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_it_is_asked_of_torch_and_of_the_libraries(cpu, variables):
    device.prepare("cpu", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()  # else flash attention would not be
    assert device.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert device.os.environ["NCCL_ALGO"] == "Ring"


def test_a_variable_that_contradicts_it_is_an_error(cpu, variables):
    variables.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(
        UserError, match="CUBLAS_WORKSPACE_CONFIG=:0:0; unset it, or set it to :4096:8 or :16:8"
    ):
        device.prepare("cpu", deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_with_it_has_the_losses_of_one_without(tmp_path):
    generator = np.random.default_rng(0)
    with PairWriter(tmp_path / "data", np.dtype(np.uint16)) as pair:
        pair.add(generator.integers(3, 64, 4000).astype(np.uint16), np.full(100, 40, np.int32))
        pair.commit({"tokens": pair.tokens, "max_token": 63})
    curves = {}
    for name, flags in {"plain": [], "first": ["--deterministic"], "second": ["--deterministic"]}.items():
        output = launch.must(
            *("pretrain_intern.py", "--device", "cpu", "--model", "internlm-tiny", "--num-layers", 1),
            *("--vocab-size", 64, "--seq-length", 32, "--micro-batch-size", 2, "--train-iters", 3),
            *("--lr", "1e-2", "--split", "100,0,0", "--data-path", tmp_path / "data"),
            *("--log-dir", tmp_path / name, *flags),
        )
        assert ("deterministic: fixed order of sums" in output) == bool(flags)
        lines = read_lines(tmp_path / name / "train.log")
        curves[name] = [(line.loss, line.grad_norm) for line in lines if isinstance(line, TrainLine)]
    assert curves["first"] == curves["second"]
    assert np.array(curves["first"]) == pytest.approx(np.array(curves["plain"]), rel=1e-5)


def test_it_leaves_no_choice_to_a_measurement():
    from ascendspeed.config.schema import (
        DataConfig,
        ModelConfig,
        OptimConfig,
        ParallelConfig,
        Run,
        TrainConfig,
    )
    from ascendspeed.distributed.cpu_products import Products

    def choice(**train) -> str:
        run = Run(ModelConfig(), ParallelConfig(), OptimConfig(), DataConfig(), TrainConfig(**train))
        return Products.of_training(run).choice

    assert choice(deterministic=True) == "torch"
    assert choice(deterministic=True, cpu_linear="onednn") == "onednn"
    assert choice() == "auto"
