"""Converts an InternEvo training folder of InternLM (7B, 20B, 65B) to a Hugging Face directory.

python tools/transformers/convert2hf_internlm.py --src 5000 --tgt mine --tokenizer v7.model --max_pos 2048
"""

from dataclasses import dataclass

from ascendspeed.cli import parser
from ascendspeed.conversion import internlm_tools
from ascendspeed.utils import errors


@dataclass(frozen=True)
class Options(internlm_tools.ToHuggingFace):
    """Converts an InternEvo training folder of InternLM to a Hugging Face directory."""


def main() -> None:
    """Runs the command."""
    options = parser.parse(Options, description=__doc__ or "")
    internlm_tools.to_hugging_face(
        options,
        parser.typed_fields(Options),
        "internlm",
        "convert2hf_internlm2.py, or tools/ckpt_convert/convert.py",
    )


if __name__ == "__main__":
    errors.run(main, clean_up=True)
