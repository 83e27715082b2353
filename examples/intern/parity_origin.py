"""Leaves origin.json beside a log: the seed, the hash of the weights and the hash of the data that its run began with.

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
    """To be run where the run was made: weights and data are read from where it read them."""

    log: Annotated[Positional[str], arg(metavar="LOG")]
    """train.log of a run."""


def main() -> None:
    """Hashes and writes."""
    options = parser.parse(Options, description=__doc__ or "")
    print(f"wrote {origin.write(options.log)}")


if __name__ == "__main__":
    errors.run(main)
