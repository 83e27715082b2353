"""Device selection, with a stand-in for torch_npu, and the limits of adapting torch on a CPU."""

import sys
import types

import pytest
import torch

from ascendspeed.distributed import device, fused_kernels, training_kernels
from ascendspeed.utils.errors import UserError


def fake_npu(monkeypatch, available: bool = True) -> list[str]:
    """Puts a stand-in for torch_npu, which records its calls, into sys.modules."""
    calls: list[str] = []
    npu = types.SimpleNamespace(
        is_available=lambda: available,
        device_count=lambda: 8,
        set_device=lambda index: calls.append(f"set_device {index}"),
        get_device_name=lambda index: f"Ascend stand-in {index}",
        max_memory_allocated=lambda: 123,
        synchronize=lambda: calls.append("synchronize"),
        empty_cache=lambda: calls.append("empty_cache"),
    )
    package = types.ModuleType("torch_npu")
    package.__spec__ = types.SimpleNamespace(name="torch_npu")
    package.npu_rms_norm = lambda x, weight, epsilon: (x * weight, epsilon)
    package.npu_rotary_mul = lambda x, cos, sin: x * cos + sin
    package.npu_swiglu = lambda x, dim: x.chunk(2, dim)[0]
    transfer = types.ModuleType("torch_npu.contrib.transfer_to_npu")
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    for name, module in (
        ("torch_npu", package),
        ("torch_npu.contrib", package),
        ("torch_npu.contrib.transfer_to_npu", transfer),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    loaded = sys.modules.get("megatron.core.jit") or types.ModuleType("megatron.core.jit")
    monkeypatch.setitem(sys.modules, "megatron.core.jit", loaded)
    monkeypatch.setattr(
        device.importlib, "import_module", lambda name: calls.append(name) or sys.modules[name]
    )
    monkeypatch.setattr(
        device.importlib.util, "find_spec", lambda name: package.__spec__ if name == "torch_npu" else None
    )
    return calls


def test_an_npu_is_chosen_and_prepared_by_its_own_package(monkeypatch):
    calls = fake_npu(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    prepared = device.prepare("auto", "nccl")
    assert (prepared.kind, prepared.index, prepared.backend, prepared.name) == (
        "npu",
        3,
        "hccl",
        "Ascend stand-in 3",
    )
    assert calls == ["torch_npu", "torch_npu.contrib.transfer_to_npu", "set_device 3"]
    assert prepared.peak_memory() == 123
    prepared.synchronize()
    assert calls[-1] == "synchronize"


def test_the_launchers_choice_of_the_cpu_is_undone_on_another_device(monkeypatch):
    """DeepSpeed would run the ranks of an NPU as those of a CPU."""
    fake_npu(monkeypatch)
    for value, left in (("cpu", None), ("npu", "npu")):
        monkeypatch.setenv("DS_ACCELERATOR", value)
        device.prepare("auto")
        assert device.os.environ.get("DS_ACCELERATOR") == left


def test_fused_kernels_of_an_npu(monkeypatch):
    fake_npu(monkeypatch)
    here = device.Device("npu", 0, "hccl", "stand-in")
    chosen = fused_kernels.select_kernels(here, rms_norm=True, rotary=True, swiglu=False)
    assert str(chosen) == "rms_norm: torch_npu.npu_rms_norm; rotary: torch_npu.npu_rotary_mul; swiglu: torch"
    x = torch.ones(2, 4)
    assert torch.equal(chosen.rms_norm(x, torch.full((4,), 2.0), 1e-6), x * 2)
    assert torch.equal(chosen.rotary(x, x * 3, x), x * 4)


def test_auto_takes_the_cpu_when_there_is_nothing_else(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.choose("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.choose("auto") == "cuda"


def test_an_npu_without_its_driver_is_passed_over(monkeypatch):
    fake_npu(monkeypatch, available=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.choose("auto") == "cpu"
    with pytest.raises(UserError, match="--device npu: no such device here"):
        device.choose("npu")


def test_a_device_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"--device cuda: no such device here \(torch .* sees: cpu\)"):
        device.choose("cuda")


def test_more_processes_than_devices_is_an_error(monkeypatch):
    fake_npu(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "8")
    with pytest.raises(UserError, match="local rank 8 has no npu device: this machine shows 8"):
        device.prepare("npu")


def test_a_wanted_kernel_that_is_not_there_is_said(cpu):
    chosen = fused_kernels.select_kernels(cpu, rms_norm=True, rotary=False, swiglu=True)
    assert (
        str(chosen) == "rms_norm, swiglu: torch (no fused kernel is installed for this device); rotary: torch"
    )


@pytest.mark.parametrize("operation", ["rms_norm", "rotary", "swiglu"])
def test_a_gpu_without_fused_packages_gets_torch(operation, monkeypatch):
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    assert training_kernels.fused_kernel(device.Device("cuda", 0, "nccl", "x"), operation) is None


@pytest.mark.parametrize(("kind", "threads"), [("cuda", 4), ("npu", 4), ("cpu", 1)])
def test_offloaded_work_gets_this_ranks_share_of_the_cores(kind, threads, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda process: set(range(8)))
    counts = [1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: counts[-1])
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    assert device.use_host_cores(device.Device(kind, 0, "", "")) == threads


@pytest.mark.usefixtures("cpu")
def test_adapting_torch_leaves_transformers_alone(tmp_path):
    """A patched constructor once bypassed `with torch.device("meta")` and left rope buffers uninitialised."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 50}
    built = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).eval()
    built.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    frequencies = 1e4 ** -(torch.arange(0, 16, 2) / 16)
    for model in (built, loaded):
        assert torch.allclose(model.model.rotary_emb.inv_freq, frequencies)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, built(tokens).logits)


def test_the_cpu_answers_what_megatron_core_asks_of_cuda(cpu):
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(2, pin_memory=True).device.type == "cpu"
    assert torch.tensor([1.0]).cuda().device.type == "cpu"
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    state = device.rng_state()
    first = torch.rand(3)
    device.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    assert device.current_device() == torch.device("cpu")
    assert cpu.peak_memory() > 1 << 20
