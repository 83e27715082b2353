"""LoRA adapters: target modules and layers."""
