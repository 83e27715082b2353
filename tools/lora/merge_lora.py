"""Merges LoRA adapters into their base weights, bit for bit as PEFT does.

python tools/lora/merge_lora.py --base internlm2-7b --adapter ckpt/adapter --output internlm2-7b-alpaca
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from ascendspeed.cli import parser
from ascendspeed.utils import errors


@dataclass(frozen=True)
class Options:
    """Merges LoRA adapters into their base weights, bit for bit as PEFT does."""

    base: str
    """Base weights: a Hugging Face directory, or another format that tools/ckpt_convert/convert.py reads."""
    adapter: str
    """Adapters: a PEFT directory, or a training checkpoint with adapters."""
    save: Annotated[str, parser.output_flag("save")]
    """Hugging Face directory to write, with the names of --base; must be empty or absent."""
    dtype: Literal["keep", "bf16", "fp16", "fp32"] = "keep"
    """Data type of the written tensors; keep: that of --base."""
    max_shard_size: str = "10GB"
    """Largest size of a safetensors file."""


def main() -> None:
    """Runs the command."""
    options = parser.parse(Options, description=__doc__ or "")
    from ascendspeed.conversion import convert  # after parsing, so that --help does not wait for torch
    from ascendspeed.conversion.formats import peft
    from ascendspeed.conversion.lora_merge import merge
    from ascendspeed.utils.atomic import require_empty_dir

    require_empty_dir(options.save)
    adapter = peft.open_adapter(options.adapter)
    base = convert.with_tokenizer(convert.open_reader(options.base), None)
    peft.check_complete(adapter, base.config)
    source = merge(base, adapter)
    print(
        f"{adapter.summary()} from {adapter.path} into {base.path}: {base.description}, {base.config.family}"
    )
    if not adapter.fingerprint:
        print(
            f"note: {adapter.path} does not record the weights it was trained on: "
            f"{base.path} could not be checked"
        )
    writer = convert.HuggingFaceWriter(None, convert.parse_size(options.max_shard_size))
    convert.convert(source, options.save, writer, convert.DTYPES.get(options.dtype))
    print(options.save)


if __name__ == "__main__":
    errors.run(main, clean_up=True)
