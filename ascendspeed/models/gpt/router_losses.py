"""Auxiliary losses of a router: load balancing and z-loss of every row, their gradients and sums over a step.

Both are means over the layers and over the rows of the global batch, so that they depend neither on
micro-batches nor on the layout. The load-balancing loss of a row in a layer is Hugging Face's
`load_balancing_loss_func` of the router scores of the row's tokens (the unused end of a packed row is left
out, as an attention mask leaves it out there); the z-loss is the mean of log² Σ exp(scores).

The losses never meet the language-model loss: a layer adds their gradient to that of its scores, which needs
no communication between pipeline stages and survives recomputation.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ascendspeed.config.schema import ModelConfig


@dataclass(eq=False)
class RouterLosses:
    """Coefficients, gradient scale and running sums; one object for all layers of a rank."""

    aux_coeff: float
    z_coeff: float
    num_layers: int
    scale: float | Tensor = 1.0
    """Gradient of the loss that is differentiated with respect to the sum of the rows' losses."""
    _sums: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, model: ModelConfig) -> "RouterLosses | None":
        """The losses of a model; None without coefficients."""
        if not (model.num_experts and (model.moe_aux_loss_coeff or model.moe_z_loss_coeff)):
            return None
        return cls(model.moe_aux_loss_coeff, model.moe_z_loss_coeff, model.num_layers)

    def attach(self, logits: Tensor, topk: int, valid: Tensor | None, group: Any) -> Tensor:
        """Returns the scores [s, b, experts] with the losses' gradient attached.

        `valid` [s, b] is true for tokens that are not padding (None: all); `group` are the ranks that share
        the rows. Sums are taken where gradients are: neither in an evaluation nor twice under recomputation.
        """
        if not torch.is_grad_enabled():
            return logits
        statistics = _row_statistics(logits.detach().float(), topk, valid, group)
        self._sums.append(statistics.losses() / dist.get_world_size(group))
        return _Attach.apply(logits, statistics, self)

    def take_sums(self) -> list[float]:
        """Sums of the load-balancing and the z-loss over this rank's rows and layers since the last call."""
        sums = torch.stack(self._sums).sum(0).tolist() if self._sums else [0.0, 0.0]
        self._sums = []
        return sums


@dataclass(eq=False)
class RowStatistics:
    """Sums over the tokens of every row, over all ranks that share the rows; fp32."""

    valid: Tensor
    """[s, b] of this rank, 1 or 0."""
    tokens: Tensor
    """Tokens of every row [b], at least 1."""
    counts: Tensor
    """Tokens sent to each expert [b, experts]."""
    probabilities: Tensor
    """Sums of the softmax [b, experts]."""
    squares: Tensor
    """Sums of log² Σ exp(scores) [b]."""

    def losses(self) -> Tensor:
        """[load-balancing loss, z-loss], summed over the rows."""
        shares = self.counts * self.probabilities / self.tokens[:, None].square()
        return torch.stack((shares.sum() * self.counts.size(1), (self.squares / self.tokens).sum()))


def _row_statistics(logits: Tensor, topk: int, valid: Tensor | None, group: Any) -> RowStatistics:
    experts = logits.size(2)
    valid = logits.new_ones(logits.shape[:2]) if valid is None else _own_part(valid, logits, group).float()
    selected = torch.zeros_like(logits).scatter_(2, logits.topk(topk, dim=2).indices, 1.0)
    squares = torch.logsumexp(logits, 2).square()
    columns = torch.cat(
        (selected, logits.softmax(2), squares[..., None], torch.ones_like(squares)[..., None]), 2
    )
    sums = (columns * valid[..., None]).sum(0)
    if dist.get_world_size(group) > 1:
        dist.all_reduce(sums, group=group)
    counts, probabilities, squares, tokens = sums.split((experts, experts, 1, 1), 1)
    return RowStatistics(valid, tokens[:, 0].clamp(min=1), counts, probabilities, squares[:, 0])


def _own_part(valid: Tensor, logits: Tensor, group: Any) -> Tensor:
    """Part [s, b] of a mask that belongs to these scores: Megatron-core splits it for sequence parallel on
    the first pipeline stage only."""
    parts = valid.size(0) // logits.size(0)
    return valid.chunk(parts)[dist.get_rank(group) % parts]


class _Attach(torch.autograd.Function):
    """Identity whose backward pass adds the gradient of the auxiliary losses."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, statistics: RowStatistics, losses: RouterLosses) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.statistics, ctx.losses = statistics, losses
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        statistics, losses = ctx.statistics, ctx.losses
        scores = logits.float()
        softmax = scores.softmax(2)
        shares = statistics.counts * scores.size(2) / statistics.tokens[:, None]
        own = softmax * (shares - (softmax * shares).sum(2, keepdim=True)) * losses.aux_coeff
        own += softmax * torch.logsumexp(scores, 2, keepdim=True) * (2 * losses.z_coeff)
        own *= (statistics.valid / statistics.tokens)[..., None] * (losses.scale / losses.num_layers)
        return gradient + own.to(gradient.dtype), None, None


def valid_tokens_of(tokens: Tensor, loss_mask: Tensor, position_ids: Tensor) -> Tensor | None:
    """Mask [b, s] that is false in the unused end of packed rows; None if no row has one.

    The unused end is a last document of zeros without supervised tokens.
    """
    length = tokens.size(1)
    index = torch.arange(length)
    last_start = ((position_ids == 0) * index).amax(1, keepdim=True)
    in_last = index >= last_start
    is_unused = ~((in_last & ((tokens != 0) | (loss_mask != 0))).any(1, keepdim=True))
    return ~(in_last & is_unused) if bool(is_unused.any()) else None
