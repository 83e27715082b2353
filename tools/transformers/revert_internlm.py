"""Converts a Hugging Face directory of InternLM, InternLM3 or Llama to an InternEvo training folder.

python tools/transformers/revert_internlm.py --src internlm-7b --tgt ckpt --tp_size 2 --embed_split \\
    --use_flash --version 1
"""

from dataclasses import dataclass
from typing import Literal

from ascendspeed.cli import command
from ascendspeed.cli.compat import TO_INTERNEVO
from ascendspeed.conversion import internlm_tools
from ascendspeed.utils import errors


@dataclass(frozen=True, kw_only=True)
class Options(internlm_tools.ToInternEvo):
    """Converts a Hugging Face directory of InternLM, InternLM3 or Llama to an InternEvo training folder."""

    version: Literal[1, 2]
    """1: w2 is up and w3 is down (InternEvo before March 2024); 2: w3 is up and w2 is down."""
    adapt_hf: bool = False
    """Keep the order of the rows of q and k, for training with adapt_hf=True (now qk_interleaved=False); else
    they are interleaved, as the published command does. No effect on a model with biases, which is trained as
    INTERNLM and keeps the order."""


def main() -> None:
    """Runs the command."""
    options = command.parse(Options, table=TO_INTERNEVO, description=__doc__ or "").options
    internlm_tools.to_internevo(
        options, ("internlm", "internlm3", "llama"), "revert_internlm2.py", options.version, options.adapt_hf
    )


if __name__ == "__main__":
    errors.run(main, clean_up=True)
