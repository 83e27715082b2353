"""The engines: one protocol, same loss. `deepspeed` has ZeRO 0-3, `megatron` pipelines, context and expert parallel."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ascendspeed.checkpoint import Checkpoint, Fragment
from ascendspeed.data.dataset import Batch

Tensors = Iterable[tuple[str, Tensor]]
"""Weights by our names, full."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step."""

    loss: float
    """Mean over the counted tokens of the global batch; NaN or infinite as it came."""
    tokens: int
    """Counted tokens of the global batch."""
    grad_norm: float | None
    """Global norm before clipping."""
    skipped: bool
    """The loss or the gradients were not finite: nothing was updated. The same on every rank."""
    loss_scale: float
    bad: tuple[int, ...] = ()
    """Of this rank's micro-batches those, by their place, whose loss was not finite."""


class Engine(Protocol):
    """What the training loop asks of an engine."""

    def step(self, batches: list[Batch], lr: float) -> StepResult:
        """Forward and backward over this rank's micro-batches of one global batch, and one update at learning rate `lr`."""

    @property
    def updates(self) -> int:
        """Updates done: Adam's own step, iterations less skipped ones."""

    def loss(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Sum of the token losses over all ranks' batches, and the tokens that count; no update."""

    def fragments(self) -> Iterator[Fragment]:
        """What this rank owns of the optimizer: live views, for saving and for restoring."""

    def scalars(self) -> dict[str, Any]:
        """The engine's numbers that a checkpoint keeps (updates, loss scaler)."""

    def rng(self) -> dict[str, Tensor]:
        """This rank's random number generators."""

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes weights, moments, scalars and (in the same layout) the generators from a checkpoint of any layout and engine."""
