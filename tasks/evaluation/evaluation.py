"""Evaluates a model on benchmark files; the script of `intern eval`."""

from ascendspeed.commands.evaluate import main, run_command

__all__ = ["main", "run_command"]

if __name__ == "__main__":
    run_command()
