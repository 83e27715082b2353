"""Merges LoRA adapters into the weights that they belong to, as peft does, bit for bit.

python tools/lora/merge_lora.py --base internlm2-7b --adapter ckpt/adapter --save internlm2-7b-alpaca
"""

from dataclasses import dataclass
from typing import Literal

from ascendspeed.cli import parser
from ascendspeed.utils import errors


@dataclass(frozen=True)
class Options:
    """Merges LoRA adapters into the weights that they belong to, as peft does, bit for bit."""

    base: str
    """The weights: a Hugging Face directory, or whatever else tools/ckpt_convert/convert.py reads."""
    adapter: str
    """The adapters: a directory of peft, or a training checkpoint of adapters."""
    save: str
    """Hugging Face directory to write, under the names that --base has; must not hold anything yet."""
    dtype: Literal["keep", "bf16", "fp16", "fp32"] = "keep"
    """Type of the written tensors; keep: those of --base."""
    max_shard_size: str = "10GB"
    """Size of a safetensors file."""


def main() -> None:
    """Parses, merges, says where the result is."""
    options = parser.parse(Options, description=Options.__doc__)
    from ascendspeed.conversion import convert  # after parsing, so that --help does not wait for torch
    from ascendspeed.conversion.formats import peft
    from ascendspeed.conversion.lora_adapter import merged
    from ascendspeed.utils.atomic import require_empty_dir

    require_empty_dir(options.save)
    adapter = peft.open_adapter(options.adapter)
    base = convert.with_tokenizer(convert.open_reader(options.base), None)
    peft.check_complete(adapter, base.config)
    source = merged(base, adapter)
    print(
        f"{len(adapter.pairs)} adapters from {adapter.where} into {base.path}: {base.description}, {base.config.family}"
    )
    if not adapter.fingerprint:
        print(
            f"note: {adapter.where} does not say which weights it was trained on: {base.path} could not be checked"
        )
    to = convert.HuggingFaceWriter(None, convert.parse_size(options.max_shard_size))
    convert.convert(source, options.save, to, convert.DTYPES.get(options.dtype))
    print(options.save)


if __name__ == "__main__":
    errors.run(main, clean_up=True)
