"""Converts an InternEvo training folder of InternLM2 or 2.5 to a Hugging Face directory.

python tools/transformers/convert2hf_internlm2.py --src 5000 --tgt internlm2-hf --tokenizer internlm2.model \\
    --max_pos 32768
"""

from dataclasses import dataclass

from ascendspeed.cli import parser
from ascendspeed.conversion import internlm_tools
from ascendspeed.utils import errors


@dataclass(frozen=True)
class Options(internlm_tools.ToHuggingFace):
    """Converts an InternEvo training folder of InternLM2 or 2.5 to a Hugging Face directory."""

    scaling_factor: float = 2.0
    """Factor of dynamic NTK; only used with --rotary-type dynamic (the published page wrongly names
    origin)."""


def main() -> None:
    """Runs the command."""
    options = parser.parse(Options, description=__doc__ or "")
    internlm_tools.to_hugging_face(
        options,
        parser.typed_fields(Options),
        "internlm2",
        "convert2hf_internlm.py, or tools/ckpt_convert/convert.py",
    )


if __name__ == "__main__":
    errors.run(main, clean_up=True)
