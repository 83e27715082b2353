"""InternLM on Megatron-core and DeepSpeed: from raw text to an exported model, on CPU, CUDA and Ascend NPU."""

__version__ = "0.1.0"
