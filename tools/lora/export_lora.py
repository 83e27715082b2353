"""Exports the LoRA adapters of a training checkpoint as a PEFT directory.

python tools/lora/export_lora.py --from ckpt --output adapter --names llama
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from ascendspeed.cli import parser
from ascendspeed.utils import errors


@dataclass(frozen=True)
class Options:
    """Exports the LoRA adapters of a training checkpoint as a PEFT directory."""

    source: Annotated[str, arg(name="from")]
    """Training checkpoint with adapters: a folder of steps, or one step."""
    target: Annotated[str, parser.output_flag("to")]
    """Folder to write; must be empty or absent."""
    names: Literal["keep", "llama"] = "keep"
    """Module names. keep: those that were trained; llama: those of LlamaForCausalLM, for weights exported as
    hf-llama."""
    base: str | None = None
    """Base weights to name in adapter_config.json; None: those of the training, if their modules have these
    names."""


def main() -> None:
    """Runs the command."""
    options = parser.parse(Options, description=__doc__ or "")
    # imported after parsing, so that --help does not wait for torch
    from ascendspeed.checkpoint.discovery import open_checkpoint
    from ascendspeed.conversion.formats import peft
    from ascendspeed.conversion.formats.training_checkpoint.reading import adapter_of
    from ascendspeed.models.lora.adapter import as_llama
    from ascendspeed.utils.atomic import require_empty_dir

    target = require_empty_dir(options.target)
    checkpoint = open_checkpoint(Path(options.source))
    adapter = adapter_of(checkpoint)
    if options.names == "llama":
        adapter = as_llama(adapter, checkpoint.config)
    peft.write(adapter, target, options.base)
    if not (options.base or adapter.base):
        print(
            f"note: {peft.CONFIG} names no weights: --base names those of LlamaForCausalLM, "
            "once exported as hf-llama"
        )
    rank = adapter.settings["r"]
    print(f"{len(adapter.pairs)} adapters of rank {rank} from {checkpoint.path}: {options.target}")


if __name__ == "__main__":
    errors.run(main, clean_up=True)
