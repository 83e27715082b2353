"""Evaluates a model on benchmarks that lie on disk; `bash tasks/evaluation/eval_internlm.sh` starts it.

python tasks/evaluation/evaluation.py --load model_from_hf/internlm-7b --task mmlu --task-data-path data/mmlu --bf16
"""

import importlib.util
import sys

from ascendspeed.cli.train_args import world_size
from ascendspeed.evaluation.args import resolve
from ascendspeed.utils import errors


def main() -> None:
    """Parse and read the questions -> load the model -> ask -> report."""
    job, notes = resolve(sys.argv[1:], world_size())
    if importlib.util.find_spec("lm_eval") is None:
        raise errors.UserError("evaluation needs lm-evaluation-harness: pip install -e '.[eval]'")

    from ascendspeed.evaluation import runner

    runner.run(job, notes)


if __name__ == "__main__":
    errors.run(main, clean_up=True)
