"""InternLM on Megatron-core and DeepSpeed: raw text to exported model, on CPU, CUDA and Ascend NPU."""

__version__ = "0.1.0"
