"""Names of architectures and tokenizers in llama.cpp's GGUF files."""

from dataclasses import dataclass

SENTENCEPIECE = "llama"
BYTE_LEVEL = "gpt2"
PRE_TOKENIZERS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
}
"""Regular expression of a byte-level tokenizer -> its name in llama.cpp, which implements each by itself."""


@dataclass(frozen=True)
class GgufArchitecture:
    """Architecture of llama.cpp that computes a family."""

    name: str
    interleaved: bool = True
    """True if llama.cpp rotates neighbouring rows of q and k; False: rows that are half a head apart, as in
    Hugging Face's tensors.
    """
    name_with_biases: str | None = None
    """Architecture for a model with biases in its attention; None: the same one."""
