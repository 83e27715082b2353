"""AdamW that keeps 16 bits of an fp32 master weight beside its bf16 weight: together they are the master.

That is 16 instead of 18 bytes per parameter. The masters are exact, but the weights are the masters rounded
half away from zero, where torch rounds a tie to even: 65,536 masters share an even and an odd weight alike,
so that 16 further bits identify them.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

CHUNK = 2**24
"""Elements of a master that exist at the same time."""


def split_master(master: Tensor, weight: Tensor, remainder: Tensor) -> None:
    """Writes finite fp32 numbers into `weight` (bf16), rounded half away from zero, and `remainder`
    (int16)."""
    bits = master.view(torch.int32)
    remainder.copy_(
        bits.bitwise_and(0xFFFF)
    )  # of which int16 keeps the low bits: 0x8000 and more are negative
    weight.view(torch.int16).copy_((bits - remainder) >> 16)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 numbers that `split_master` was given."""
    high = weight.view(torch.int16).to(torch.int32) << 16
    return (high + remainder).view(torch.float32)


class SplitAdamW(torch.optim.AdamW):
    """torch's AdamW, some of whose parameters are fp32 masters that exist only while they are updated.

    Such a master stays the key of its state and has its shape, its gradient and Megatron-core's marks, but no
    memory. An update writes the weights too.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.parts: dict[Tensor, tuple[Tensor, Tensor]] = {}
        """Master -> flat views of its bf16 weight and of its remainder."""

    def split(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Splits masters; `pairs`: (bf16 weights, fp32 master) of the same shape."""
        for weight, master in pairs:
            flat = weight.detach().view(-1)
            self.parts[master] = flat, torch.zeros_like(flat, dtype=torch.int16)
            self.write(master, master.detach())
            master.data = master.new_zeros(()).expand(master.shape)

    @property
    def remainders(self) -> list[Tensor]:
        """The 16 further bits of every master."""
        return [remainder for _, remainder in self.parts.values()]

    def read(self, master: Tensor) -> Tensor:
        """A copy of a master in the host's memory."""
        return join_master(*(part.cpu() for part in self.parts[master])).view(master.shape)

    @torch.no_grad()
    def write(self, master: Tensor, values: Tensor) -> None:
        """Sets a master, and its weight."""
        parts = self.parts[master]
        for chunk, weight, remainder in _chunks(values.view(-1), *parts):
            split_master(chunk.to(weight.device), weight, remainder)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Updates the masters and their weights, and the other parameters as torch does."""
        for group in self.param_groups:
            for master in group["params"]:
                if master in self.parts and master.grad is not None:
                    self._update(master, group)
                    master.grad = None  # torch leaves out what has no gradient
        super().step(closure)

    def _update(self, master: Tensor, group: dict[str, Any]) -> None:
        state = self.state[master]
        flat = (tensor.view(-1) for tensor in (master.grad, state["exp_avg"], state["exp_avg_sq"]))
        for weight, remainder, gradient, average, square in _chunks(*self.parts[master], *flat):
            joined = join_master(weight, remainder)
            adamw(
                *([joined], [gradient], [average], [square], []),
                [state["step"].clone()],
                foreach=group["foreach"],
                fused=group["fused"],
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            split_master(joined, weight, remainder)
        state["step"] += 1


def _chunks(*flat: Tensor) -> Iterable[tuple[Tensor, ...]]:
    return zip(*(tensor.split(CHUNK) for tensor in flat), strict=True)
