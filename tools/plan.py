"""Plans a training run without starting it; the script of `intern plan`."""

from ascendspeed.commands.plan import PlanCommand as Options
from ascendspeed.commands.plan import main, run_command

__all__ = ["Options", "main", "run_command"]

if __name__ == "__main__":
    run_command()
