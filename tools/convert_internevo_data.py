"""InternEvo's tokenized data (X.bin, X.bin.meta) -> `P_packed_{input_ids,labels}_document.{bin,idx}`.

    python tools/convert_internevo_data.py --input TRAIN_FOLDER --output-prefix P

Training reads TRAIN_FOLDER itself too (--data-path TRAIN_FOLDER); converted data are read faster, and every line was checked.
"""

from dataclasses import dataclass

from ascendspeed.cli import parser
from ascendspeed.data.indexed import internevo
from ascendspeed.utils import errors


@dataclass(frozen=True)
class Options:
    """What to convert."""

    input: str
    """A folder with .bin and .bin.meta files, at any depth, or one .bin file."""
    output_prefix: str
    """Writes <prefix>_packed_input_ids_document and <prefix>_packed_labels_document, each .bin, .idx and .meta."""
    min_length: int = 0
    """Documents with fewer tokens are left out (InternEvo's min_length)."""


def main() -> None:
    """The command line."""
    options = parser.parse(Options, description=__doc__ or "")
    internevo.convert(options.input, options.output_prefix, options.min_length)


if __name__ == "__main__":
    errors.run(main, clean_up=True)
