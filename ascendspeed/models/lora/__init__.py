"""LoRA: targets (which matrices, torch-free), layers beside Megatron-core's linears, and adapter tensors."""
