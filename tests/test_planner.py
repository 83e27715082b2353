"""Planner: sizes against calculations by hand, and against what real runs allocate."""

import dataclasses
import json

import pytest
from helpers import launch

from ascendspeed.config.schema import ParallelConfig
from ascendspeed.models import estimates, families
from ascendspeed.planning import command, report
from ascendspeed.utils.errors import UserError
from benchmarks import planner_accuracy

GIB = 2**30
LAYERS = 2


def planned(*words: object, code: int = 0) -> dict:
    done = launch.script("tools/plan.py", "--json", *words)
    assert done.returncode == code, done.stderr[-3000:]
    assert "Warning" not in done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("words", "optimizer"),
    [([], 12), pytest.param(["--store-param-remainders"], 10, marks=pytest.mark.slow)],
)
def test_model_states_of_megatron(words, optimizer):
    """18 bytes per parameter: weights 2, fp32 gradients 4, master 4 (or 2 further bytes), moments 8."""
    model = ["--model", "internlm2-7b", "--num-layers", LAYERS, "--bf16", *words]
    plan = planned(*model, "--device-memory", 8, code=1)
    model = dataclasses.replace(families.preset("internlm2-7b"), num_layers=LAYERS)
    count = estimates.parameters_per_device(model, ParallelConfig())
    (rank,) = plan["ranks"]
    for name, size in {"weights": 2, "gradients": 4, "optimizer": optimizer}.items():
        # Buffers are padded to a few hundred bytes for every tensor.
        assert rank["persistent"][name] == pytest.approx(count * size, rel=1e-5), name
    assert rank["persistent"]["buffers"] < 2**24
    assert plan["peak"] == sum(rank["at_peak"].values())
    assert plan["fits"] is False


def test_a_batch_of_one_micro_batch_is_noted():
    """Several need more memory with some engines, and real runs have them."""
    words = ["--model", "internlm-tiny", "--devices", "4", "--micro-batch-size", "2"]
    note = command.resolve(words)[2][0]
    assert note.startswith("--global-batch-size is not given: a step has 8 samples")
    given = command.resolve([*words, "--global-batch-size", "16"])[2]
    assert not any(note.startswith("--global-batch-size") for note in given)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_warns_of_nothing(stage):
    """ZeRO reads the alignment of its buffers, of which torch warns with fake tensors."""
    planned("--model", "internlm-tiny", "--bf16", "--deepspeed", "--zero-stage", stage, "--devices", 2)


def test_activations_and_logits():
    """A layer keeps so much per token in bf16 with flash attention, by hand; h 4096, f 14336, kv 1024."""
    few, more = (planned("--model", "internlm2-7b", "--num-layers", n, "--bf16")["ranks"][0] for n in (1, 2))
    h, f, kv = 4096, 14336, 1024
    norms = 2 * (2 * h + 4)  # input, and 1 / rms in fp32
    linears = 2 * (h + h + h + f)  # inputs of qkv, proj, fc1 and fc2
    attention = 2 * (h + 2 * kv) + 2 * h + 4 * 32  # rotated q, k; v; output; log-sum-exp
    swiglu = 2 * (2 * f + f)  # [gate; up], silu(gate)
    per_token = norms + linears + attention + swiglu
    difference = (more["at_peak"]["activations"] - few["at_peak"]["activations"]) / 2048
    assert difference == pytest.approx(per_token, rel=0.1)
    assert few["at_peak"]["logits"] == more["at_peak"]["logits"] >= 2048 * 92544 * 2


def test_invalid_options():
    for words, text in (
        (["--devices", "0"], "--devices 0"),
        (["--devices", "1000003"], "--devices 1000003: a plan counts at most 16,384"),
        (["--device-memory", "0"], "--device-memory 0"),
        (["--deepspeed", "--zero-offload", "cpu"], "planner counts the memory of devices"),
        (["--deepspeed", "--deepspeed_config", "x.json"], "leave the file out"),
        (["--tp", "3", "--devices", "3"], "do not split over 3"),
        (["--load", "absent"], "--load absent: no such folder, so the architecture is unknown"),
        (["--load", str(launch.ROOT / "docs")], "docs: no config.json or run.json"),
        (["--model", "absent"], "unknown model 'absent'; there are"),  # nothing is near
        (["--model", "intern2-7b"], r"'intern2-7b' \(did you mean internlm2-7b\?\); there are"),
    ):
        with pytest.raises(UserError, match=text):
            command.resolve(words)


def test_adapters_are_no_model(tmp_path):
    """Training and the plan refuse them before a model of the default size is built."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=f"holds adapters of peft .* --lora-load {tmp_path}"):
        command.resolve(["--load", str(tmp_path)])


def test_the_default_architecture_is_named():
    """A plan of nothing in particular says whose it is; a --load that is not there yet needs --model."""
    note = "neither --model nor --load is given: the model is internlm-7b"
    assert note in command.resolve([])[2]
    tiny = ["--model", "internlm-tiny"]
    for words in (tiny, ["--num-layers", "2"], [*tiny, "--load", "absent"]):
        assert note not in command.resolve(words)[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", planner_accuracy.CASES)
def test_accuracy(name):
    """The planned peak is within 1 % of torch's allocator; a mistake in one layer is beyond it."""
    done = launch.script("benchmarks/planner_accuracy.py", "--json", "--case", name, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    (sizes,) = json.loads(done.stdout).values()
    assert sizes["planned"] == pytest.approx(sizes["allocated"], rel=0.01)
    assert sizes["planned"] != pytest.approx(sizes["mistake"], rel=0.01)


def test_table():
    assert report.aligned([("a", "bc"), ("10", "1")]) == " a  bc\n10   1"
