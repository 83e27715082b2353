"""Model families, the GPT model on megatron-core, LoRA, parameter mappings, and estimates."""
