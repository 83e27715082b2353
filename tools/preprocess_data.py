"""Tokenizes text; the script of `intern data`."""

from ascendspeed.commands.data import DataCommand as Options
from ascendspeed.commands.data import main, run_command

__all__ = ["Options", "main", "run_command"]

if __name__ == "__main__":
    run_command()
