"""The GPT model on megatron-core: layer spec, attention, rotary embedding, packed sequences, experts, loss,
and KV cache."""
