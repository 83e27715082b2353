"""Converts tokenized data of InternEvo (X.bin, X.bin.meta) to `P_packed_{input_ids,labels}_document`.

    python tools/convert_internevo_data.py --input TRAIN_FOLDER --output P

Training can read TRAIN_FOLDER directly (--data-path TRAIN_FOLDER); converted data are read faster, and the
conversion validates every line.
"""

from dataclasses import dataclass
from typing import Annotated

from ascendspeed.cli import parser
from ascendspeed.data.indexed import internevo
from ascendspeed.utils import errors


@dataclass(frozen=True)
class Options:
    """Input and output of the conversion."""

    input: str
    """Folder with .bin and .bin.meta files at any depth, or one .bin file."""
    output_prefix: Annotated[str, parser.output_flag("output-prefix")]
    """Prefix P of the files P_packed_input_ids_document and P_packed_labels_document, each with .bin,
    .idx and .meta."""
    overwrite: bool = False
    """Replace data of the prefix that are made from other files or with another --min-length."""
    min_length: int = 0
    """Smallest number of tokens of a document; shorter ones are skipped (InternEvo's min_length)."""


def main() -> None:
    """Runs the command."""
    options = parser.parse(Options, description=__doc__ or "")
    internevo.convert(options.input, options.output_prefix, options.min_length, options.overwrite)


if __name__ == "__main__":
    errors.run(main, clean_up=True)
