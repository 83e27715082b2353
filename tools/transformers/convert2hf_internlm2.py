"""Makes a Hugging Face directory of an InternEvo training folder of InternLM2 or 2.5.

python tools/transformers/convert2hf_internlm2.py --src 5000 --tgt mine --tokenizer internlm2.model --max_pos 32768
"""

from dataclasses import dataclass

from ascendspeed.cli import parser
from ascendspeed.conversion import internlm_tools
from ascendspeed.utils import errors


@dataclass(frozen=True)
class Options(internlm_tools.ToHuggingFace):
    """Makes a Hugging Face directory of an InternEvo training folder of InternLM2 or 2.5."""

    scaling_factor: float = 2.0
    """Factor of dynamic NTK: it counts with --rotary_type dynamic (and not, as the published page says, with origin)."""


def main() -> None:
    """Parses, converts."""
    options = parser.parse(Options, description=Options.__doc__)
    internlm_tools.to_hugging_face(
        options,
        parser.typed_fields(Options),
        "internlm2",
        "convert2hf_internlm.py, or tools/ckpt_convert/convert.py",
    )


if __name__ == "__main__":
    errors.run(main, clean_up=True)
