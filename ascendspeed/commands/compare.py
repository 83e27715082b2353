"""Compares the losses of two runs from their logs: metrics, a plot and a verdict.

    python tools/compare_loss.py REF CAND --output DIR [--ref2 SECOND_RUN_OF_REF] [--profile strict]

REF and CAND are logs of this project, AscendSpeed, MindSpeed, Megatron-LM, NeMo, InternEvo, MindFormers,
XTuner, torchtitan, GPT-NeoX, DeepSpeed's pipeline engine or Hugging Face's Trainer (trainer_state.json),
TensorBoard events, JSON lines, CSV of W&B, or the folder of a run. Exit code 0: parity, 1: no parity, 2: the
logs cannot be compared.
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
class CompareCommand:
    """Flags of compare_loss.py."""

    ref: Annotated[Positional[str], arg(metavar="REF")]
    """Log of the reference run."""
    cand: Annotated[Positional[str], arg(metavar="CAND")]
    """Log of the candidate."""
    out: Annotated[str, parser.output_flag("out")] = "parity"
    """Folder for parity.json, parity.png and parity.html."""
    ref2: str | None = None
    """Log of a second run of the reference; the distance between the two is drawn as a band."""
    profile: Profile = "published"
    """published: the mean relative error is below 2 %; strict: the error of every step is; bitwise: all
    losses and gradient norms are identical."""
    first: int | None = None
    """First position to compare, in consumed samples (in iterations if the logs have no samples)."""
    last: int | None = None
    """Last position to compare, inclusive."""
    same_origin: bool = False
    """Require an origin.json beside every log: the same seed, weights and data."""


def main() -> int:
    """Compares, writes the report, and returns the exit code."""
    options = parser.parse(CompareCommand, description=__doc__ or "")
    report.remove_report(options.out)
    comparison = comparing.compare(
        options.ref,
        options.cand,
        options.ref2,
        options.profile,
        options.first,
        options.last,
        options.same_origin,
    )
    written = report.write_report(comparison, options.out)
    print("\n".join(report.as_text(comparison)))
    print(f"wrote {', '.join(map(str, written))}")
    return 0 if comparison.verdict.passed else 1


def run_command() -> None:
    """Runs the command as a program."""
    errors.run(main)


if __name__ == "__main__":
    run_command()
