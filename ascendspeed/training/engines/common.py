"""Base of both engines: AdamW settings and states, sums over ranks, restoring, random-number states."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ascendspeed.checkpoint.fragment import EMA, KINDS, Fragment
from ascendspeed.checkpoint.load import Checkpoint, load_fragments
from ascendspeed.config.schema import OptimConfig, Run
from ascendspeed.data.batch import Batch
from ascendspeed.distributed.device import Device
from ascendspeed.distributed.process_groups import ProcessGrid, rng_states, set_rng_states
from ascendspeed.models.gpt import gpt_model
from ascendspeed.models.gpt.router_losses import RouterLosses, valid_tokens_of
from ascendspeed.models.gpt.sequence_shard import SequenceShard
from ascendspeed.training import objectives

MOMENTS = KINDS[1:]
"""Adam's states, by the names that torch and the checkpoint give them."""


def adamw_settings(optim: OptimConfig, device: Device) -> dict[str, Any]:
    """Keyword arguments of `torch.optim.AdamW`; weight decay is set for each parameter group."""
    return {
        "lr": optim.lr,
        "betas": (optim.adam_beta1, optim.adam_beta2),
        "eps": optim.adam_eps,
        "fused": device.fused_adamw,
    }


def new_adamw_state(parameter: Tensor, device: Device) -> dict[str, Tensor]:
    """The state of a parameter before its first update, which torch would make lazily; every parameter has
    its own `step`.
    """
    step_device = parameter.device if device.fused_adamw else "cpu"  # where torch puts it
    moments = {
        kind: torch.zeros_like(parameter.data, memory_format=torch.contiguous_format) for kind in MOMENTS
    }
    return {"step": torch.zeros((), device=step_device), **moments}


class BaseEngine:
    """Base class of the engines; a subclass adds the model, the steps and the four hooks below."""

    def __init__(self, run: Run, grid: ProcessGrid, device: Device) -> None:
        self.run, self.grid, self.device = run, grid, device
        self.sequence_shard = SequenceShard(grid.cp_rank, grid.cp)
        self._zeros: Tensor | None = None
        self._averages: list[tuple[Fragment, Tensor]] = []
        self.objective = objectives.create(run)
        self.shard_specs = gpt_model.shard_specs(run.model, run.parallel, run.lora)

    def _weight_writer(self, modules: Sequence[gpt_model.GPTLanguageModel]) -> gpt_model.WriteShard:
        """Writes weights as they are, or for QLoRA those of frozen linears in 8 or 4 bits."""
        bits = self.run.lora.quantization_bit
        return gpt_model.quantizing_writer(bits, *modules) if bits else Tensor.copy_

    def fragments(self) -> Iterator[Fragment]:
        """See `Engine.fragments`."""
        yield from self._optimizer_fragments()
        for master, average in self._averages:
            yield replace(master, kind=EMA, tensor=average)

    def optimizer_tensors(self) -> Iterator[Tensor]:
        """Tensors of the optimizer that live between two steps."""
        yield from (fragment.tensor for fragment in self.fragments())

    def _start_average(self) -> None:
        """Begins the average of --ema-decay with the weights."""
        if self.run.train.ema_decay is not None:
            owned = (f for f in self._optimizer_fragments() if f.kind == "master" and f.holder[0] >= 0)
            self._averages = [(master, master.tensor.detach().clone()) for master in owned]

    @torch.no_grad()
    def _average_weights(self) -> None:
        """Moves the average towards the weights; called after every update."""
        if self._averages:
            masters = [master.tensor.detach() for master, _ in self._averages]
            averages = [average for _, average in self._averages]
            torch._foreach_lerp_(averages, masters, 1 - self.run.train.ema_decay)

    # Hooks of `fragments` and `restore`.

    def _optimizer_fragments(self) -> Iterator[Fragment]:
        """The fragments of the kinds that every checkpoint has."""
        raise NotImplementedError

    def _restore_updates(self, updates: int) -> None:
        """Sets the number of updates, in every AdamW state too."""
        raise NotImplementedError

    def _restore_loss_scale(self, scalars: dict[str, Any]) -> None:
        """Sets fp16's loss scale, and the counters of its scaler if the same engine saved them."""
        raise NotImplementedError

    def _refresh_weights(self) -> None:
        """Copies the fp32 masters to the weights that the forward pass uses; collective."""
        raise NotImplementedError

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """See `Engine.restore`."""
        load_fragments(checkpoint, self._optimizer_fragments())
        self._start_average()
        if self._averages and checkpoint.has_kind(EMA):
            load_fragments(checkpoint, (f for f in self.fragments() if f.kind == EMA))
        scalars = checkpoint.state.engine
        self._restore_updates(scalars["updates"])
        if self.run.optim.fp16 and "loss_scale" in scalars:
            self._restore_loss_scale(scalars)
        self._refresh_weights()
        saved_layout = (checkpoint.world, checkpoint.run.parallel.layout_key)
        if saved_layout == (self.grid.world, self.run.parallel.layout_key):
            set_rng_states(checkpoint.rng(self.grid.rank))

    def _second_moment(self, state: dict[str, Tensor], like: Tensor) -> Tensor:
        """Adam's second moment; zeros, of which none are kept, for tensors that Muon updates."""
        if "exp_avg_sq" in state:
            return state["exp_avg_sq"]
        if self._zeros is None or self._zeros.numel() < like.numel():
            self._zeros = torch.zeros(like.numel(), device=like.device)
        return self._zeros[: like.numel()].view(like.shape)

    def _rows(self, batches: list[Batch]) -> int:
        """Samples of the global batch of which these are this rank's micro-batches."""
        return len(batches) * self.run.train.micro_batch_size * self.grid.dp

    def _take_router_losses(self, losses: RouterLosses | None, rows: int) -> dict[str, float | None]:
        """The routers' losses of a global batch of `rows`, as fields of `StepResult`; collective."""
        if losses is None:
            return {}
        count = rows * losses.num_layers
        aux, z = self._all_reduce_sum(losses.take_sums())
        return {
            "aux_loss": aux / count if losses.aux_coeff else None,
            "z_loss": z / count if losses.z_coeff else None,
        }

    def rng(self) -> dict[str, Tensor]:
        """See `Engine.rng`."""
        return rng_states()

    def _count(self, batches: Iterable[Batch]) -> float:
        """Items of the objective in the global batch; collective."""
        return self._all_reduce_sum(sum(map(self.objective.count, batches)), self.grid.dp_group)

    def sum_over_batch(self, values: Sequence[float]) -> list[float]:
        """See `objectives.Scorer.sum_over_batch`."""
        return self._all_reduce_sum(list(values), self.grid.dp_group)

    def _all_reduce_sum(self, values: Any, group: Any = None) -> Any:
        """Sums a number or a list of numbers over a process group (None: all ranks), in fp64."""
        if self.device.reduces_fp64:
            numbers = torch.as_tensor(values, dtype=torch.float64, device=self.device.torch).clone()
            dist.all_reduce(numbers, group=group)
            return numbers.tolist()
        numbers = torch.as_tensor(values, dtype=torch.float64, device="cpu")
        # The bits of every rank, as integers, and the sum on the host: no fp64 on the device.
        own = numbers.reshape(1, -1).view(torch.int64).to(self.device.torch)
        gathered = own.new_empty(dist.get_world_size(group), numbers.numel())
        dist.all_gather_into_tensor(gathered, own, group=group)
        return gathered.cpu().view(torch.float64).sum(0).view(numbers.shape).tolist()


def new_momentum_state(parameter: Tensor, device: Device) -> dict[str, Tensor]:
    """The state of a tensor that Muon updates, before its first update."""
    return {name: t for name, t in new_adamw_state(parameter, device).items() if name != "exp_avg_sq"}


def routed_tokens(batch: Batch, losses: RouterLosses | None) -> Tensor | None:
    """Mask [b, s] of the tokens that count in the routers' losses; None if all do or there are none."""
    return losses and valid_tokens_of(batch.tokens, batch.loss_mask, batch.position_ids)
