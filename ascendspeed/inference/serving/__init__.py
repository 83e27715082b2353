"""Serving: continuous batching over a paged KV cache, and an OpenAI-compatible HTTP service."""
