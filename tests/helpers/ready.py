"""Imported by a fork server: everything that a rank of the toy needs, so that each rank starts at once. No process group yet."""

from ascendspeed.distributed import device

device.prepare("cpu")

from ascendspeed.distributed import process_groups  # noqa: E402, F401
from ascendspeed.training import fault_tolerance, loop, setup  # noqa: E402, F401
from helpers import toy  # noqa: E402, F401
