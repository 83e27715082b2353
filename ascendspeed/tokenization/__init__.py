"""Tokenizers, detokenization and chat templates."""
