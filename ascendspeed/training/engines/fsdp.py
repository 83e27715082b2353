"""Megatron-core's model under torch's FSDP2 (`fully_shard`): weights, gradients and optimizer states are
sharded over the data- and context-parallel ranks, each layer's weights are gathered when it computes.

Megatron-core's own wrappers of FSDP need a CUDA device; torch's function has none of their limits. It divides
gradient sums by the ranks, which the factor of the loss undoes.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ascendspeed.checkpoint.fragment import KINDS, Fragment
from ascendspeed.data.batch import Batch
from ascendspeed.models.gpt import gpt_model
from ascendspeed.training.engines.megatron import LossFunction, MegatronEngine
from ascendspeed.training.engines.megatron_optimizer import new_adamw


class FsdpEngine(MegatronEngine):
    """Implements `engines.Engine` with FSDP2, at TP, PP and EP 1."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.config.finalize_model_grads_func = None  # FSDP sums gradients in the backward pass

    def _wrap(self) -> list[Any]:
        """Shards the model. The shards are fp32, and masters; under bf16 the gathered weights are bf16."""
        (module,) = self.modules
        module.float()
        module.register_forward_hook(_copy_output)
        settings: dict[str, Any] = {
            "mesh": DeviceMesh.from_group(self.grid.dp_cp_group, self.device.torch.type),
            "mp_policy": MixedPrecisionPolicy(self.config.params_dtype, torch.float32),
            "reshard_after_forward": True,
        }
        for layer in module.decoder.layers:
            fully_shard(layer, **settings)
        fully_shard(module, **settings)
        named = gpt_model.named_parameters(module)
        self._sharded = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        with torch.no_grad():
            self._shards = {name: parameter.to_local() for name, parameter in self._sharded.items()}
        return [module]

    def _make_optimizer(self) -> torch.optim.AdamW:
        """AdamW over this rank's shards: no weight decay on biases and one-dimensional weights."""
        is_plain = {
            name: name.endswith(".bias") or parameter.dim() == 1 for name, parameter in self._sharded.items()
        }
        groups: dict[bool, list[Tensor]] = {False: [], True: []}
        for name, shard in self._shards.items():
            groups[is_plain[name]].append(shard)
        return new_adamw(
            self.run.optim,
            [{"params": groups[False], "wd_mult": 1.0}, {"params": groups[True], "wd_mult": 0.0}],
            self.device,
        )

    # ---------------------------------------------------------------- stepping

    def _begin_step(self, lr: float) -> float:
        for parameter in self._sharded.values():
            parameter.grad = None
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return 1.0

    def _run_schedule(
        self, batches: Sequence[Batch], function: LossFunction, scale: float | None = None
    ) -> Tensor:
        """See `MegatronEngine._run_schedule`; FSDP divides by the ranks."""
        if scale is not None:
            scale *= self.grid.dp_cp
            if losses := self.config.router_losses:
                losses.scale = losses.scale * self.grid.dp_cp
        return super()._run_schedule(batches, function, scale)

    def _prepare_gradients(self) -> bool:
        for name, shard in self._shards.items():
            gradient = self._sharded[name].grad
            shard.grad = torch.zeros_like(shard) if gradient is None else gradient.to_local()
        return False

    def _grad_norm(self) -> float:
        norms = torch._foreach_norm([shard.grad for shard in self._shards.values()])
        square = torch.stack(norms).norm().view(1) ** 2.0
        dist.all_reduce(square, group=self.grid.dp_cp_group)
        return math.sqrt(square.item())

    def _trained_masters(self) -> list[Tensor]:
        return list(self._shards.values())

    def _apply_gradients(self) -> None:
        self.optimizer.step()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.weights`; the masters, which are cast when a layer gathers them."""
        for name, parameter in self._sharded.items():
            yield name, parameter.detach().full_tensor()

    # ---------------------------------------------------------------- checkpoint

    def _optimizer_fragments(self) -> Iterator[Fragment]:
        """See `BaseEngine`. A rank holds consecutive rows of every parameter, as torch.chunk divides them."""
        rank, ranks = dist.get_rank(self.grid.dp_cp_group), self.grid.dp_cp
        for name, shard in self._shards.items():
            if not shard.numel():
                continue
            rows = -(-self._sharded[name].size(0) // ranks)
            start = rank * rows * (shard.numel() // shard.size(0))
            state = self.optimizer.state[shard]
            for kind, view in zip(KINDS, (shard, state["exp_avg"], state["exp_avg_sq"]), strict=True):
                yield Fragment(name, kind, self.shard_specs[name], 0, start, view.view(-1))

    def scalars(self) -> dict[str, Any]:
        """See `Engine.scalars`."""
        return {"updates": self.updates}

    def _restore_updates(self, updates: int) -> None:
        self.updates = updates
        for state in self.optimizer.state.values():
            state["step"].fill_(updates)

    def _refresh_weights(self) -> None:
        """Nothing: weights are gathered from the masters in every pass."""


def _copy_output(module: torch.nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """Forward hook: FSDP's own hook on the output is lost if that is a view which is changed in place."""
    return output.clone()
