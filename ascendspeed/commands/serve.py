"""Serves InternLM over HTTP with OpenAI's API; run by the launcher on --tp x --pp processes, or alone.

python tasks/inference/serve.py --load model_from_hf/internlm2-chat-7b --bf16 --port 8000
"""

from collections.abc import Sequence
from typing import Any

from ascendspeed.cli import command
from ascendspeed.inference.input_checks import check_folders
from ascendspeed.inference.serving.args import ServeJob, resolve
from ascendspeed.utils import errors


def work(job: ServeJob, device: Any, notes: Sequence[str]) -> None:
    """Loads the model and serves it."""
    from ascendspeed.inference.serving import server

    server.run(job, device, notes)


def main() -> None:
    """Runs the command."""
    command.run_inference(resolve, work, check_folders)


def run_command() -> None:
    """Runs the command as a program."""
    errors.run(main)


if __name__ == "__main__":
    run_command()
