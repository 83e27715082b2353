"""Trains InternLM: `deepspeed pretrain_intern.py --deepspeed ...`, or `torchrun` without --deepspeed."""

from ascendspeed.commands.train import main, run_command

__all__ = ["main", "run_command"]

if __name__ == "__main__":
    run_command()
