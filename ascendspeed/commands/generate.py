"""Generates text with InternLM, or chats with it; run by the launcher on --tp x --pp processes, or alone.

python tasks/inference/generate.py --load model_from_hf/internlm2-7b --bf16 \\
    --prompt "The capital of France is"
python tasks/inference/generate.py --load model_from_hf/internlm2-chat-7b --bf16 --task chat
"""

from collections.abc import Sequence
from typing import Any

from ascendspeed.cli import command
from ascendspeed.inference.args import GenerationJob, resolve
from ascendspeed.inference.input_checks import check_folders
from ascendspeed.utils import errors


def work(job: GenerationJob, device: Any, notes: Sequence[str]) -> None:
    """Loads the model and answers."""
    from ascendspeed.inference import runner

    runner.run(job, device, notes)


def main() -> None:
    """Runs the command."""
    command.run_inference(resolve, work, check_folders)


def run_command() -> None:
    """Runs the command as a program."""
    errors.run(main)


if __name__ == "__main__":
    run_command()
