"""Muon for the matrices of the layers, whatever their layout: the update of `torch.optim.Muon` on whole
matrices.

A rank holds a flat range of its tensor-parallel part of a weight. It updates the momentum of that range; then
the ranks gather the whole weight, every rank orthogonalizes it, and each takes its own range of the result.
Fused weights are split into the matrices that they stand for: q, k and v; gate and up.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ascendspeed.config.schema import ModelConfig, OptimConfig
from ascendspeed.models import param_mapping
from ascendspeed.models.families.base import Fusion, Span, block_spans
from ascendspeed.models.param_mapping import ShardSpec

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of an iteration's quintic polynomial; its slope at 0 is as large as possible."""
EPSILON = 1e-7
FUSIONS: dict[str, Fusion] = {
    "linear_qkv": "qkv",
    "linear_fc1": "glu",
    "linear_proj": "one",
    "linear_fc2": "one",
}
"""Linears whose weights Muon updates, and the matrices that they hold. The router and the gate of a shared
expert, whose rows are one output each, stay with AdamW, as embeddings, head, norms and biases."""

Blocks = list[list[Span]]


def matrices_of(model: ModelConfig) -> dict[str, Blocks]:
    """Weights that Muon updates -> the spans of rows of each of their matrices."""
    found = {}
    for parameter in param_mapping.parameters(model):
        module, _, kind = parameter.name.rpartition(".")
        fusion = FUSIONS.get(module.rpartition(".")[2])
        if kind == "weight" and fusion:
            found[parameter.name] = block_spans(model, replace(parameter.mapping, fusion=fusion))
    return found


@dataclass(eq=False)
class MatrixShard:
    """The range of a weight that a rank holds."""

    spec: ShardSpec
    blocks: Blocks
    tp_group: Any
    range_group: Any
    """Ranks that hold the ranges of a tensor-parallel part; None: every rank holds all of it."""
    key: Tensor | None
    """Tensor of the optimizer that holds the range, or would if this rank had one; None: there is none."""
    offset: int = 0
    """First element in `key`."""
    start: int = 0
    """First element in the flat tensor-parallel part."""
    numel: int = 0
    """Elements of the range; 0: other ranks hold all."""

    def view(self, tensor: Tensor) -> Tensor:
        """The range of `key`, of its gradient or of its momentum."""
        return tensor.view(-1).narrow(0, self.offset, self.numel)


class Muon:
    """Updates matrices; the optimizer that it belongs to updates all other tensors."""

    def __init__(self, optim: OptimConfig, shards: Iterable[MatrixShard], device: torch.device) -> None:
        self.optim, self.shards, self.device = optim, list(shards), device

    @property
    def keys(self) -> list[Tensor]:
        """Tensors that hold ranges, without repetition."""
        return list({id(shard.key): shard.key for shard in self.shards if shard.key is not None}.values())

    @torch.no_grad()
    def step(self, lr: float, states: Mapping[Any, Any], keys: Collection[int] | None = None) -> None:
        """Updates the ranges in the tensors of `keys` (by id; None: all) from the gradients of the tensors,
        with the momenta in `states`. Collective."""
        for shard in self.shards:
            if keys is not None and id(shard.key) not in keys:
                continue
            update = torch.empty(0, device=self.device)
            if shard.key is not None and shard.numel:
                gradient, momentum = shard.view(shard.key.grad), shard.view(states[shard.key]["exp_avg"])
                momentum.lerp_(gradient, 1 - self.optim.muon_momentum)
                update = gradient.lerp(momentum, self.optim.muon_momentum)
            direction = self._direction(shard, update)
            if shard.key is not None and shard.numel:
                master = shard.view(shard.key.data)
                master.mul_(1 - lr * self.optim.weight_decay).add_(direction, alpha=-lr)

    def _direction(self, shard: MatrixShard, update: Tensor) -> Tensor:
        """This rank's range of the orthogonalized weight, times the factor of the learning rate."""
        full = _gather(shard, update)
        result = torch.empty_like(full)
        for block in shard.blocks:
            matrix = torch.cat([full[first : first + count] for first, count in block])
            orthogonal = newton_schulz(matrix, self.optim.muon_num_ns_steps).float()
            orthogonal *= lr_factor(self.optim.muon_scale_mode, *matrix.shape)
            for (first, count), rows in zip(block, orthogonal.split([n for _, n in block]), strict=True):
                result[first : first + count] = rows
        part = shard.spec.shard(result, dist.get_rank(shard.tp_group))
        return part.reshape(-1)[shard.start : shard.start + shard.numel]


def _gather(shard: MatrixShard, update: Tensor) -> Tensor:
    """The whole weight from the ranges of all ranks."""
    spec = shard.spec
    part = update
    if shard.range_group is not None:
        part = update.new_zeros(math.prod(spec.shard_shape))
        part[shard.start : shard.start + shard.numel] = update
        dist.all_reduce(part, group=shard.range_group)
    if spec.dim is None or spec.num_shards == 1:
        return part.view(spec.shape)
    parts = [torch.empty_like(part) for _ in range(spec.num_shards)]
    dist.all_gather(parts, part.contiguous(), group=shard.tp_group)
    full = part.new_empty(spec.shape)
    for rank, flat in enumerate(parts):
        local = flat.view(spec.shard_shape)
        for s in spec.slices(rank):
            rows = local[s.local_row : s.local_row + s.rows, s.local_column : s.local_column + s.columns]
            full[s.row : s.row + s.rows, s.column : s.column + s.columns] = rows
    return full


def newton_schulz(matrix: Tensor, steps: int) -> Tensor:
    """An approximation of U Vᵀ of the singular value decomposition, in bfloat16; any shape [m, n]."""
    a, b, c = COEFFICIENTS
    is_tall = matrix.size(0) > matrix.size(1)
    x = matrix.bfloat16()
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=EPSILON)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def lr_factor(mode: str, rows: int, columns: int) -> float:
    """Factor of the learning rate for a matrix: `match_rms_adamw` gives the update the size of AdamW's."""
    if mode == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


class AdamW(torch.optim.AdamW):
    """AdamW that leaves some tensors to Muon, and skips an update while `overflow` is set: ZeRO's own
    optimizers do so themselves, stage 0 does not."""

    overflow = False
    muon: Muon | None = None

    def step(self, closure: Callable | None = None) -> Any:
        """Updates the parameters unless `overflow` is set."""
        if self.overflow:
            return None
        hidden = list(self._give_to_muon())
        result = super().step(closure)
        for key, gradient in hidden:
            key.grad = gradient  # engines keep buffers there
        return result

    def _give_to_muon(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Lets Muon update its tensors in the groups of this step, and yields their gradients, which AdamW
        then does not see."""
        if self.muon is None:
            return
        stepped = {id(p) for group in self.param_groups for p in group["params"]}
        keys = [key for key in self.muon.keys if id(key) in stepped]
        self.muon.step(self.param_groups[0]["lr"], self.state, {id(key) for key in keys})
        for key in keys:
            self.state[key]["step"] += 1
            yield key, key.grad
            key.grad = None
