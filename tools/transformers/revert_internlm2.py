"""Converts a Hugging Face directory of InternLM2 or 2.5 to an InternEvo training folder.

python tools/transformers/revert_internlm2.py --src internlm2-7b --tgt ckpt --tp_size 2 --embed_split \\
    --use_flash
"""

from dataclasses import dataclass

from ascendspeed.cli import command
from ascendspeed.cli.compat import TO_INTERNEVO
from ascendspeed.conversion import internlm_tools
from ascendspeed.utils import errors


@dataclass(frozen=True)
class Options(internlm_tools.ToInternEvo):
    """Converts a Hugging Face directory of InternLM2 or 2.5 to an InternEvo training folder."""


def main() -> None:
    """Runs the command."""
    options = command.parse(Options, table=TO_INTERNEVO, description=__doc__ or "").options
    internlm_tools.to_internevo(options, ("internlm2",), "revert_internlm.py")


if __name__ == "__main__":
    errors.run(main, clean_up=True)
