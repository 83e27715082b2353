"""Makes a directory of peft from the adapters in a training checkpoint.

python tools/lora/export_lora.py --from ckpt --to adapter --names llama
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from ascendspeed.cli import parser
from ascendspeed.utils import errors


@dataclass(frozen=True)
class Options:
    """Makes a directory of peft from the adapters in a training checkpoint."""

    source: Annotated[str, arg(name="from")]
    """A training checkpoint of adapters: a folder of steps, or one step."""
    target: Annotated[str, arg(name="to")]
    """Folder to write; must not hold anything yet."""
    names: Literal["keep", "llama"] = "keep"
    """keep: the names under which they were trained; llama: those of LlamaForCausalLM, for weights exported as hf-llama."""
    base: str | None = None
    """Weights that adapter_config.json names; None: those that were trained on, where their modules have these names."""


def main() -> None:
    """Parses, exports, says where the result is."""
    options = parser.parse(Options, description=Options.__doc__)
    from ascendspeed.checkpoint.discovery import (
        open_checkpoint,  # after parsing, so that --help does not wait for torch
    )
    from ascendspeed.conversion.formats import peft
    from ascendspeed.conversion.lora_adapter import as_llama, of_checkpoint
    from ascendspeed.utils.atomic import require_empty_dir

    target = require_empty_dir(options.target)
    opened = open_checkpoint(Path(options.source))
    adapter = of_checkpoint(opened)
    if options.names == "llama":
        adapter = as_llama(adapter, opened.config)
    peft.write(adapter, target, options.base)
    if not (options.base or adapter.base):
        print(
            f"note: {peft.CONFIG} names no weights: --base names those of LlamaForCausalLM, once exported as hf-llama"
        )
    print(
        f"{len(adapter.pairs)} adapters of rank {adapter.settings['r']} from {opened.path}: {options.target}"
    )


if __name__ == "__main__":
    errors.run(main, clean_up=True)
