"""Compares the losses of two runs; the script of `intern compare`."""

from ascendspeed.commands.compare import CompareCommand as Options
from ascendspeed.commands.compare import main, run_command

__all__ = ["Options", "main", "run_command"]

if __name__ == "__main__":
    run_command()
