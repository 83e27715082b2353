"""Evaluates a model on benchmark files on disk; `bash tasks/evaluation/eval_internlm.sh` starts it.

python tasks/evaluation/evaluation.py --load model_from_hf/internlm-7b --bf16 --task mmlu \\
    --task-data-path data/mmlu
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

from ascendspeed.cli import command
from ascendspeed.evaluation import args as evaluation_args
from ascendspeed.evaluation.args import EvaluationJob
from ascendspeed.inference.input_checks import check_folders
from ascendspeed.utils import errors


def resolve(args: Sequence[str], world: int) -> tuple[EvaluationJob, list[str]]:
    """Checks the command line, then the installation. Raises UserError."""
    job, notes = evaluation_args.resolve(args, world)
    if importlib.util.find_spec("lm_eval") is None:
        raise errors.UserError("evaluation needs lm-evaluation-harness: pip install -e '.[eval]'")
    return job, notes


def work(job: EvaluationJob, device: Any, notes: Sequence[str]) -> None:
    """Loads the model, evaluates and reports."""
    from ascendspeed.evaluation import runner

    runner.run(job, device, notes)


def main() -> None:
    """Runs the command."""
    command.run_inference(resolve, work, check_folders)


def run_command() -> None:
    """Runs the command as a program."""
    errors.run(main, clean_up=True)


if __name__ == "__main__":
    run_command()
