"""Converts a checkpoint to another format; the script of `intern convert`."""

from ascendspeed.commands.convert import ConvertCommand as Options
from ascendspeed.commands.convert import main, run_command

__all__ = ["Options", "main", "run_command"]

if __name__ == "__main__":
    run_command()
