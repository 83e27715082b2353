"""The InternLM GPTModel: a thin layer on megatron-core."""
