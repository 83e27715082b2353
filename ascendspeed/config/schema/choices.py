"""Choices that several groups and commands share, and aliases of flags."""

from typing import Any, Literal

from tyro.conf import arg

DeviceChoice = Literal["auto", "cpu", "cuda", "npu"]
BackendChoice = Literal["auto", "nccl", "gloo", "hccl"]
MOCK_DATA = "<mock data>"
"""Value of `DataConfig.data_path` for --mock-data."""
CpuLinearChoice = Literal["auto", "onednn", "fp32", "torch"]
TritonChoice = Literal["auto", "off", "swiglu", "rotary", "cross_entropy"]
QuantizationChoice = Literal["w8a16"]
KVCacheChoice = Literal["auto", "int8"]


def alias(*names: str) -> Any:
    """Other spellings of a flag."""
    return arg(aliases=[f"--{name}" for name in names])
