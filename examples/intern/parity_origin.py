"""Writes origin.json beside a log: the seed and the hashes of the weights and data of its run.

python examples/intern/parity_origin.py LOG
"""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from ascendspeed.cli import parser
from ascendspeed.loss_compare import origin
from ascendspeed.utils import errors


@dataclass(frozen=True)
class Options:
    """Run it on the machine of the run: weights and data are read from the paths that the run used."""

    log: Annotated[Positional[str], arg(metavar="LOG")]
    """train.log of a run."""


def main() -> None:
    """Hashes weights and data and writes the file."""
    options = parser.parse(Options, description=__doc__ or "")
    print(f"wrote {origin.write_origin(options.log)}")


if __name__ == "__main__":
    errors.run(main)
