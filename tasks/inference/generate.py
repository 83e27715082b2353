"""Generates text or chats; the script of `intern generate` and `intern chat`."""

from ascendspeed.commands.generate import main, run_command

__all__ = ["main", "run_command"]

if __name__ == "__main__":
    run_command()
