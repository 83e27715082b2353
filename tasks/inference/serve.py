"""Serves a model over HTTP; the script of `intern serve`."""

from ascendspeed.commands.serve import main, run_command

__all__ = ["main", "run_command"]

if __name__ == "__main__":
    run_command()
