"""Do two runs have the same loss? Figures, a picture and a verdict from their logs.

    python tools/compare_loss.py REF CAND --out DIR [--ref2 SECOND_RUN_OF_REF] [--profile strict]

REF and CAND are logs of this project, of AscendSpeed, MindSpeed, Megatron-LM, InternEvo, GPT-NeoX or DeepSpeed's pipeline engine,
TensorBoard events, JSON lines, or the folder of a run. Exit code 0: parity, 1: none, 2: they cannot be compared.
"""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from ascendspeed.cli import parser
from ascendspeed.loss_compare import compare as comparing
from ascendspeed.loss_compare import report
from ascendspeed.loss_compare.metrics import Profile
from ascendspeed.utils import errors


@dataclass(frozen=True)
class Options:
    """Flags of this tool."""

    ref: Annotated[Positional[str], arg(metavar="REF")]
    """Log of the reference run."""
    cand: Annotated[Positional[str], arg(metavar="CAND")]
    """Log of the candidate."""
    out: str = "parity"
    """Folder for parity.json, parity.png and parity.html."""
    ref2: str | None = None
    """Log of a second run of the reference: how far two equal runs are apart is drawn as a band."""
    profile: Profile = "published"
    """published: the mean relative error is below 2 %; strict: that of every step is; bitwise: all losses and
    gradient norms are the same numbers."""
    first: int | None = None
    """Compare from this many consumed samples on (iterations, where the logs say no samples)."""
    last: int | None = None
    """Compare up to this many."""
    same_origin: bool = False
    """Insist on origin.json beside both logs: the same seed, weights and data."""


def main() -> int:
    """Compares, reports, judges."""
    options = parser.parse(Options, description=__doc__ or "")
    report.forget(options.out)
    found = comparing.compare(
        options.ref,
        options.cand,
        options.ref2,
        options.profile,
        options.first,
        options.last,
        options.same_origin,
    )
    written = report.write(found, options.out)
    print("\n".join(report.lines(found)))
    print(f"wrote {', '.join(map(str, written))}")
    return 0 if found.verdict.passed else 1


if __name__ == "__main__":
    errors.run(main)
