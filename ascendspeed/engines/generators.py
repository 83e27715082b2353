"""The random number generators of a rank: torch's, the device's, and those of Megatron-core's tensor-parallel regions."""

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from ascendspeed import device

TRACKER = "tracker."


def state() -> dict[str, Tensor]:
    """Name -> state (uint8)."""
    tracked = {TRACKER + name: value for name, value in get_cuda_rng_tracker().get_states().items()}
    return {"torch": torch.get_rng_state(), "device": device.rng_state(), **tracked}


def restore(states: dict[str, Tensor]) -> None:
    """Sets what `state` gave."""
    torch.set_rng_state(states["torch"])
    device.set_rng_state(states["device"])
    get_cuda_rng_tracker().set_states({n.removeprefix(TRACKER): s for n, s in states.items() if n.startswith(TRACKER)})
