"""DeepSpeed engine: ZeRO 0-3 with tensor, sequence and context parallelism through Megatron's process groups.

Rules of the integration, each found by a wrong loss:
- weights are loaded before `deepspeed.initialize`; later ones would be lost at the first step;
- DeepSpeed does not sum the gradients of sequence-parallel parameters over the tensor-parallel ranks: a hook
  does;
- DeepSpeed divides by the accumulation steps and the replicas, and takes context-parallel ranks for
  replicas; so the loss of a micro-batch is multiplied by both and divided by the items (supervised tokens) of
  the global batch: the result is the mean over these, whatever the layout.
"""

import contextlib
import importlib
import io
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch._dynamo  # importing it inside zero.Init fails
import torch.distributed as dist
from torch import Tensor

from ascendspeed.checkpoint.fragment import KINDS, Fragment
from ascendspeed.config.schema import Run
from ascendspeed.data.dataset import Batch
from ascendspeed.distributed.device import Device, import_uncompiled
from ascendspeed.distributed.fused_kernels import Kernels
from ascendspeed.distributed.process_groups import MPU, ProcessGrid
from ascendspeed.models.gpt import gpt_model
from ascendspeed.models.gpt.layer_spec import transformer_config
from ascendspeed.models.gpt.packed_sequences import packed_sequences_of
from ascendspeed.models.gpt.router_losses import RouterLosses
from ascendspeed.models.lora.layers import without_adapters
from ascendspeed.training.engines import EMPTY_STEP, StepResult, Tensors, deepspeed_check
from ascendspeed.training.engines.common import (
    BaseEngine,
    adamw_settings,
    new_adamw_state,
    new_momentum_state,
    routed_tokens,
)
from ascendspeed.training.engines.muon import AdamW, MatrixShard, Muon, matrices_of
from ascendspeed.training.objectives import LossSums
from ascendspeed.training.objectives.answers import answer_logprobs


def _set_scale(losses: RouterLosses, per_row: float, gradient: Tensor) -> None:
    """Hook of the loss sum of a micro-batch: a row's router losses weigh `per_row` times as much."""
    losses.scale = gradient.detach() * per_row


class DeepSpeedEngine(BaseEngine):
    """Implements `engines.Engine` with DeepSpeed."""

    def __init__(
        self,
        run: Run,
        grid: ProcessGrid,
        device: Device,
        config: dict[str, Any],
        kernels: Kernels,
        tensors: Tensors | None,
    ) -> None:
        """Builds the model, loads `tensors` (full, by Megatron names; None: `restore` follows) and passes it
        to DeepSpeed.
        """
        super().__init__(run, grid, device)
        self.stage = run.parallel.zero_stage
        deepspeed = import_deepspeed(device)
        module = self._build(deepspeed, config, kernels)
        gather = self._gather if self.stage == 3 else lambda parameter: nullcontext()
        self.deepspeed = deepspeed
        if tensors is not None:
            write = self._weight_writer([module])
            gpt_model.load_weights(module, run.model, run.parallel, tensors, gather, run.lora, write)
        for parameter in module.parameters():
            if parameter.requires_grad and getattr(parameter, "sequence_parallel", False):
                parameter.register_hook(self._sum_over_tensor_parallel)
        self.engine = self._initialize(module, config)
        self.module, self.zero = module, self.engine.optimizer
        if run.optim.optimizer == "muon":
            self._torch_adamw().muon = self._muon()
        if module.config.gradient_accumulation_fusion:
            self._give_sums_to_linears()
        if scaler := getattr(self.zero, "loss_scaler", None):
            scaler.raise_error_at_min_scale = False  # --max-skipped-steps ends such a run with a UserError
        self._start_average()
        if grid.dp_cp == 1 and self.stage < 2 and not hasattr(self.zero, "reduce_gradients"):
            # With one replica there is nothing to sum, but DeepSpeed would copy every gradient into a buffer
            # and back.
            self.engine.enable_backward_allreduce = False

    def _build(self, deepspeed: Any, config: dict[str, Any], kernels: Kernels) -> Any:
        run = self.run
        groups = {"data_parallel_group": self.grid.dp_cp_group} if self.grid.tp > 1 else {}
        with deepspeed.zero.Init(config_dict_or_path=config, mpu=MPU(), enabled=self.stage == 3, **groups):
            settings = transformer_config(run.model, run.parallel, run.train, run.optim.dtype, kernels)
            return gpt_model.build_model(run.model, run.parallel, settings, lora=run.lora)

    def _initialize(self, module: Any, config: dict[str, Any]) -> Any:
        """DeepSpeed's engine. Raises `UserError` if DeepSpeed refuses what a --deepspeed_config file adds."""
        path = self.run.parallel.deepspeed_config
        optimizer = self._adamw(module)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # a dozen lines about memory
                return self.deepspeed.initialize(
                    model=module, optimizer=optimizer, config=config, mpu=MPU(), dist_init_required=False
                )[0]
        except Exception as error:
            if not path or not deepspeed_check.is_refusal(error):
                raise
            raise deepspeed_check.refused(error, path) from error

    def _give_sums_to_linears(self) -> None:
        """Lets linears add their weight gradients to ZeRO's fp32 sums, by the name that Megatron-core has for
        them."""
        for parameters, totals in zip(self.zero.bf16_groups, self.zero.fp32_groups_gradients, strict=True):
            for parameter, total in zip(parameters, totals, strict=True):
                parameter.main_grad = total.view(parameter.shape)

    def _gather(self, parameter: torch.nn.Parameter) -> AbstractContextManager:
        return self.deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)

    def _sum_over_tensor_parallel(self, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=self.grid.tp_group)
        return gradient

    def _adamw(self, module: torch.nn.Module) -> AdamW:
        """AdamW with two groups: no weight decay on biases and one-dimensional weights (Megatron's rule)."""
        decayed, not_decayed, matrices = [], [], []
        own = matrices_of(self.run.model) if self.run.optim.optimizer == "muon" else {}
        names = {parameter: name for name, parameter in gpt_model.named_parameters(module).items()}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            dims = len(getattr(parameter, "ds_shape", parameter.shape))
            is_plain = name.endswith(".bias") or dims == 1
            group = matrices if names[parameter] in own else not_decayed if is_plain else decayed
            group.append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.run.optim.weight_decay},
            {"params": not_decayed, "weight_decay": 0.0},
            {"params": matrices, "weight_decay": self.run.optim.weight_decay},
        ]
        # LoRA matrices are all two-dimensional, and ZeRO cannot flatten an empty group.
        return AdamW(
            [group for group in groups if group["params"]], **adamw_settings(self.run.optim, self.device)
        )

    def _muon(self) -> Muon:
        """Muon for the linears of the layers, which are the last parameter group."""
        matrices, shards, states = matrices_of(self.run.model), [], self._torch_adamw().state
        for name, parameter in gpt_model.named_parameters(self.module).items():
            if name not in matrices:
                continue
            shard = MatrixShard(self.shard_specs[name], matrices[name], self.grid.tp_group, None, parameter)
            if self.stage:
                shard.key, shard.range_group = self._flat_masters()[-1], self.grid.dp_cp_group
            if not self.stage:
                shard.numel = parameter.numel()
            elif (mapping := getattr(parameter, "_hp_mapping", None)) is not None:
                address = mapping.hp_fragment_address
                shard.offset, shard.numel = address.start, address.numel
                shard.start = mapping.lp_fragment_address.start
            shards.append(shard)
        muon = Muon(self.run.optim, shards, self.device.torch)
        for key in muon.keys:
            step = states[key]["step"] if key in states else None
            states[key] = new_momentum_state(key, self.device)
            if step is not None:
                states[key]["step"] = step
        return muon

    # ---------------------------------------------------------------- stepping

    def step(self, batches: list[Batch], lr: float) -> StepResult:
        """See `Engine.step`."""
        count = self._count(batches)
        if not count:
            return EMPTY_STEP
        batches = self.objective.prepare(batches, self)
        self.engine.train()
        for group in self.zero.param_groups:
            group["lr"] = lr
        self._set_micro_batches(len(batches))
        scale = self.grid.dp_cp * len(batches) / count
        reports: list[Tensor] = []  # read after the loop: `float` would wait for the device
        loss_scale = self._loss_scale()
        losses = self.module.config.router_losses
        per_row = count / self._rows(batches)
        for i, batch in enumerate(batches):
            total, report = self._loss_sums(batch)
            reports.append(report)
            if losses:  # the gradient of the loss sum holds all factors of DeepSpeed; it arrives first
                total.register_hook(partial(_set_scale, losses, per_row))
            # A loss that is not finite makes all gradients NaN, so that every rank skips the update.
            self.engine.backward(total * torch.where(report[0].isfinite(), scale, math.nan).float())
            if self.stage == 0 and i == len(batches) - 1:
                norm = self._grad_norm()
                self.zero.overflow = not math.isfinite(norm)
            if self.module.config.gradient_accumulation_fusion:
                for has_gradients in self.zero.fp32_groups_has_gradients:
                    has_gradients[:] = [True] * len(has_gradients)  # linears add theirs behind ZeRO's back
            self.engine.step()
        if self.stage:
            norm = self.engine.get_global_grad_norm()
        if not self.zero.overflow:
            self._average_weights()
        sums = torch.stack(reports).cpu().double()
        loss, *metrics = (total / count for total in self._sum(sums.sum(0).tolist()))
        return StepResult(
            loss=loss,
            items=int(count),
            grad_norm=None if norm is None else float(norm),
            skipped=bool(self.zero.overflow),
            loss_scale=loss_scale,
            bad=()
            if math.isfinite(loss)
            else tuple(i for i, value in enumerate(sums[:, 0]) if not value.isfinite()),
            metrics=dict(zip(self.objective.metrics, metrics, strict=True)),
            **self._take_router_losses(losses, self._rows(batches)),
        )

    def _set_micro_batches(self, number: int) -> None:
        """Tells DeepSpeed how many micro-batches the next update has (--rampup-batch-size)."""
        if number != self.engine.gradient_accumulation_steps():
            self.engine.set_train_batch_size(number * self.run.train.micro_batch_size * self.grid.dp_cp)
            self.engine.micro_steps = 0  # DeepSpeed updates when this is a multiple of the number

    @torch.no_grad()
    def loss(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """See `Engine.loss`."""
        per_pass = self.run.train.global_batch_size // (self.run.train.micro_batch_size * self.grid.dp)
        remaining = iter(batches)
        sums: list[Tensor] = []
        count = 0.0
        while group := list(islice(remaining, per_pass)):
            group = self.objective.prepare(group, self)
            self.engine.eval()
            sums += [self._loss_sums(batch).report[0] for batch in group]
            count += sum(map(self.objective.count, group))
        total = sum(torch.stack(sums).tolist()) if sums else 0.0
        return self._sum(total), int(self._all_reduce_sum(count, self.grid.dp_group))

    @torch.no_grad()
    def score(self, batches: Sequence[Batch], adapters: bool = True) -> list[Tensor]:
        """See `objectives.Scorer.score`."""
        self.engine.eval()
        scores = []
        with nullcontext() if adapters else without_adapters([self.module]):
            for batch in batches:
                losses, own = self._token_losses(batch)
                scores.append(answer_logprobs(losses, own, self.grid)[0])
        return scores

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.weights`."""
        for name, parameter in gpt_model.named_parameters(self.module).items():
            with self._gather(parameter) if self.stage == 3 else nullcontext():
                yield name, parameter.detach()

    def _loss_sums(self, batch: Batch) -> LossSums:
        """Sums over a micro-batch on this rank."""
        losses, own = self._token_losses(batch)
        return self.objective.sums(losses, own, self.grid)

    def _token_losses(self, batch: Batch) -> tuple[Tensor, Batch]:
        """Losses of this rank's positions of a micro-batch [b, s], and these positions, on the device."""
        own = batch.map(lambda x: self.device.copy(self.sequence_shard.take(x, 1)))
        extra: dict[str, Any] = {"packed_seq_params": packed_sequences_of(batch.position_ids)}
        if (valid := routed_tokens(batch, self.module.config.router_losses)) is not None:
            extra["padding_mask"] = self.device.copy(self.sequence_shard.take(valid, 1))
        return self.engine(own.tokens, own.position_ids, None, labels=own.labels, **extra), own

    def _sum(self, value: Any) -> Any:
        """Sum of a number or of several over the replicas, data and context parallel."""
        return self._all_reduce_sum(value, self.grid.dp_cp_group)

    def _grad_norm(self) -> float:
        """Global gradient norm at stage 0; a replicated gradient counts once."""
        # Rows are summed in fp32, then in fp64: a copy of the gradient in fp64 costs 50 times as much. The
        # host sums the rows, since not every device computes in fp64, and waits for the device once.
        rows = [
            torch.linalg.vector_norm(parameter.grad, dim=-1).view(-1)
            for parameter in self.module.parameters()
            if parameter.requires_grad
            and (self.grid.tp_rank == 0 or getattr(parameter, "tensor_model_parallel", False))
        ]
        lengths = [len(row) for row in rows]
        squares = 0.0
        if rows:
            on_host = torch.cat(rows).cpu().double()
            squares = sum(float(part.square().sum()) for part in on_host.split(lengths))
        squares = self._all_reduce_sum(squares, self.grid.tp_group)
        return math.sqrt(squares) if math.isfinite(squares) else math.nan

    def _loss_scale(self) -> float:
        return float(getattr(self.zero, "loss_scale", 1.0)) if self.run.optim.fp16 else 1.0

    # ---------------------------------------------------------------- checkpoint

    def _optimizer_fragments(self) -> Iterator[Fragment]:
        """See `BaseEngine`. ZeRO flattens the parameters: each view is found by name and flat start."""
        for name, parameter in gpt_model.named_parameters(self.module).items():
            if not parameter.requires_grad:
                continue
            spec = self.shard_specs[name]
            for start, views in self._owned_views(parameter):
                holder = (self.grid.tp_rank, self.grid.tp) if spec.dim is None else (0, 1)
                if self.stage == 0:  # every replica holds all
                    replica, replicas = dist.get_rank(self.grid.dp_cp_group), self.grid.dp_cp
                    holder = (holder[0] * replicas + replica, holder[1] * replicas)
                part = 0 if spec.dim is None else self.grid.tp_rank
                for kind, view in zip(KINDS, views, strict=True):
                    yield Fragment(name, kind, spec, part, start, view, holder)

    def _owned_views(self, parameter: torch.nn.Parameter) -> Iterator[tuple[int, list[Tensor]]]:
        """(flat start within the parameter, flat views of master, exp_avg and exp_avg_sq) that this rank owns
        of it.
        """
        zero = self.zero
        if self.stage == 0:
            moments = self._moments(parameter, parameter)
            yield 0, [t.data.view(-1) for t in (parameter, *moments)]
        elif self.stage == 3:
            group, offset, numel = zero.grad_position[zero.get_param_id(parameter)]
            start = numel * dist.get_rank(parameter.ds_process_group)
            numel = min(numel, max(0, parameter.ds_numel - start))  # the last partition is padded
            if numel:
                flat = zero.fp32_partitioned_groups_flat[group]
                yield start, [t.data.narrow(0, offset, numel) for t in (flat, *self._moments(flat, flat))]
        elif (mapping := getattr(parameter, "_hp_mapping", None)) is not None:
            flat = self._flat_masters()[mapping.param_group_index]
            address = mapping.hp_fragment_address
            tensors = (flat, *self._moments(flat, flat))
            yield (
                mapping.lp_fragment_address.start,
                [t.data.narrow(0, address.start, address.numel) for t in tensors],
            )

    def _flat_masters(self) -> list[Tensor]:
        """The fp32 masters of this rank, one flat tensor per parameter group."""
        if self.stage == 3:
            return self.zero.fp32_partitioned_groups_flat
        # bf16 with fp32 accumulation has an optimizer of its own at stage 1
        bf16_masters = getattr(self.zero, "fp32_groups_flat_partition", None)
        return self.zero.single_partition_of_fp32_groups if bf16_masters is None else bf16_masters

    def _torch_adamw(self) -> AdamW:
        return self.zero if self.stage == 0 else self.zero.optimizer

    def _moments(self, key: Tensor, like: Tensor) -> list[Tensor]:
        """Adam's moments of a parameter (or flat group), created here if no step has created them yet."""
        state = self._torch_adamw().state[key]
        if "exp_avg" not in state:
            state.update(new_adamw_state(like, self.device))
        return [state["exp_avg"], self._second_moment(state, like)]

    @property
    def updates(self) -> int:
        """See `Engine.updates`."""
        state = next(iter(self._torch_adamw().state.values()), None)
        return int(state["step"]) if state else 0

    def scalars(self) -> dict[str, Any]:
        """See `Engine.scalars`."""
        values: dict[str, Any] = {"updates": self.updates}
        if self.run.optim.fp16:
            scaler = self.zero.loss_scaler
            values["loss_scale"] = float(scaler.cur_scale)
            values["loss_scaler"] = {
                k: getattr(scaler, k) for k in ("cur_iter", "last_overflow_iter", "cur_hysteresis")
            }
        return values

    def _restore_updates(self, updates: int) -> None:
        for state in self._torch_adamw().state.values():
            state["step"].fill_(updates)

    def _restore_loss_scale(self, scalars: dict[str, Any]) -> None:
        self.zero.loss_scaler.cur_scale = scalars["loss_scale"]
        for name, value in scalars.get("loss_scaler", {}).items():
            setattr(self.zero.loss_scaler, name, value)

    def _refresh_weights(self) -> None:
        if self.stage == 3:
            # The secondary copy of a node (hpZ) holds the old weights.
            self.zero.invalidate_secondary_tensor()
            for i in range(len(self.zero.fp32_partitioned_groups_flat)):
                self.zero._reassign_or_swap_out_partitioned_parameters(i)
        elif self.stage:
            self.zero.update_lp_params()


def import_deepspeed(device: Device) -> Any:
    """Imports DeepSpeed with quiet logging and without the shared-memory op, which it would compile on a CPU
    (25 s, needs ninja).
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed = importlib.import_module("deepspeed")
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # AdamW of this project is compared with the other engine and with plain torch by the tests.
    deepspeed.utils.logger.addFilter(_is_news)
    if device.kind == "cpu":
        importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
        # It refuses fp16 without the CPU's own instructions; `fp32_products` needs none.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    # ZeRO imports it to know whether the optimizer is its Muon.
    import_uncompiled("deepspeed.runtime.zero.muon.muon_optimizer", device.kind)
    if not device.reduces_fp64:  # ZeRO-3 would sum the gradient norm in fp64
        deepspeed.accelerator.get_accelerator().is_fp64_supported = lambda: False
    if dist.is_initialized():  # a dry run has no process group, and DeepSpeed would look for one of MPI
        deepspeed.init_distributed(dist_backend=device.backend, verbose=False)
    return deepspeed


def _is_news(record: logging.LogRecord) -> bool:
    """False for DeepSpeed's warning about any optimizer that is not its own."""
    return "untested optimizer" not in str(record.msg)
