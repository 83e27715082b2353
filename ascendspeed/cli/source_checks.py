"""Checks of legacy converter flags that describe the source checkpoint: its architecture and its layout."""

from collections.abc import Callable, Iterator
from typing import Any

from ascendspeed.cli.legacy_flags import Translation
from ascendspeed.config.schema import ModelConfig
from ascendspeed.models import families
from ascendspeed.utils.errors import UserError

SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
"""Fields of a configuration that a size such as 7B determines."""
Mismatches = Callable[[Any, Any], Iterator[str]]
"""(checkpoint reader, value of the flag) -> mismatches."""


def check_source(legacy: Translation, folder: str, reader: Any) -> None:
    """Checks the legacy flags against the source in `folder`, and prints notes about those without effect.

    Raises UserError naming everything that they contradict.
    """
    if texts := legacy.mismatches(reader):
        raise UserError(f"{folder} is another model: {'; '.join(texts)}")
    for note in legacy.notes:
        print(note)


def require_rank_files(folder: str, reader: Any) -> None:
    """Raises UserError unless the source consists of rank files."""
    if reader.parallel_sizes is None:
        raise UserError(
            f"{folder} holds no rank files: tools/ckpt_convert/convert.py converts from any format"
        )


def mismatch(name: str, value: Any, actual: Any, source: str = "config.json") -> Iterator[str]:
    """Yields a text if `value` is not the `actual` one, which `source` holds."""
    if value != actual:
        yield f"{name} {value}, {source} {actual}"


def config_mismatches(flag: str, name: str) -> Mismatches:
    """Returns the check of a flag against a field of the configuration."""
    return lambda reader, value: mismatch(flag, value, getattr(reader.config, name))


def layout_mismatches(name: str, index: int) -> Mismatches:
    """Returns the check of a flag against the tensor- (0) or pipeline-parallel size (1) of rank files."""
    return lambda reader, value: mismatch(name, value, reader.parallel_sizes[index], "its files")


def bias_mismatches(reader: Any, value: bool) -> Iterator[str]:
    """Checks `--bias`: the attention has biases."""
    yield from mismatch("--bias", value, reader.config.add_qkv_bias and reader.config.add_dense_bias)


def size_mismatches(config: ModelConfig, size: str) -> Iterator[str]:
    """Checks `--type`, such as 7B. Raises UserError if the family has no such size."""
    presets = families.FAMILIES[config.family].presets
    candidates = [preset for name, preset in presets.items() if name.endswith(f"-{size.lower()}")]
    if not candidates:
        raise UserError(
            f"--type {size}: the family {config.family} has no such size; there are {', '.join(presets)}"
        )

    def agreement(preset: ModelConfig) -> int:
        return sum(getattr(preset, name) == getattr(config, name) for name in SIZES)

    nearest = max(candidates, key=agreement)  # several generations may have the size
    for name in SIZES:
        yield from mismatch(f"--type {size}: {name}", getattr(nearest, name), getattr(config, name))


def no_added_tokens(word: str) -> int:
    """Parses `--added-token-num`. Raises UserError unless it is 0."""
    if count := int(word):
        raise UserError(
            f"--added-token-num {count} would make another model, and a conversion changes nothing: "
            "resize the Hugging Face model (resize_token_embeddings), save it, and convert that"
        )
    return 0
