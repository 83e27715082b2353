"""Needle-in-a-haystack test of a model; run by the launcher on --tp x --pp processes, or alone.

python tasks/evaluation/needle.py --load model_from_hf/internlm2-chat-7b --bf16 --chat \\
    --lengths 32768 65536 131072 200000
"""

from ascendspeed.cli import command
from ascendspeed.evaluation import needle
from ascendspeed.inference.input_checks import check_folders
from ascendspeed.utils import errors


def main() -> None:
    """Runs the command."""
    command.run_inference(needle.resolve, needle.run, check_folders)


if __name__ == "__main__":
    errors.run(main, clean_up=True)
