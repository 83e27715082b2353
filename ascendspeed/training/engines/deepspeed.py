"""DeepSpeed: ZeRO 0-3 with tensor and sequence parallel through Megatron's groups.

The rules that the wiring keeps, each found by a wrong loss:
- weights are in the module before `deepspeed.initialize`, later ones would be lost at the first step;
- DeepSpeed does not sum the gradients of sequence-parallel parameters over the tensor-parallel ranks: a hook does;
- the engine divides by the accumulation steps and the data-parallel size, so a micro-batch's loss is scaled by both, over the
  global batch's counted tokens: the result is the mean over these, however they are spread.
"""

import importlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # importing it inside zero.Init fails
import torch.distributed as dist
from torch import Tensor

from ascendspeed.checkpoint.fragment import KINDS, Fragment
from ascendspeed.checkpoint.load import Checkpoint, load_fragments
from ascendspeed.config.schema import ParallelConfig, Run
from ascendspeed.data.dataset import Batch
from ascendspeed.distributed.device import Device
from ascendspeed.distributed.fused_kernels import Kernels
from ascendspeed.distributed.process_groups import MPU, ProcessGrid, rng_states, set_rng_states
from ascendspeed.models.gpt import gpt_model
from ascendspeed.models.gpt.layer_spec import transformer_config
from ascendspeed.models.gpt.packed_sequences import packed_sequences_of
from ascendspeed.training.engines import NOTHING, StepResult, Tensors
from ascendspeed.utils.errors import UserError


def ds_config(run: Run, world: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run; a `--deepspeed_config` file may add to it. Raises `UserError` when it contradicts."""
    optim, train, parallel = run.optim, run.train, run.parallel
    dp = world // parallel.tensor_model_parallel_size
    derived: dict[str, Any] = {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // (train.micro_batch_size * dp),
        "gradient_clipping": optim.clip_grad,
        "zero_optimization": {"stage": parallel.zero_stage, **_partition(parallel)},
        "bf16": {"enabled": optim.bf16, "check_grad_overflow": True} if optim.bf16 else {"enabled": False},
        "fp16": {"enabled": optim.fp16, "initial_scale_power": int(math.log2(optim.initial_loss_scale))}
        if optim.fp16
        else {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    defaults: dict[str, Any] = {  # what a file may change
        "zero_optimization": {
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 500_000_000,
            "allgather_bucket_size": 500_000_000,
        },
        "communication_data_type": "fp32",  # as Megatron does; bf16 halves the traffic and rounds every gradient on the way
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    if parallel.zero_stage in (0, 3):
        for name in ("allgather_bucket_size", "reduce_scatter"):
            defaults["zero_optimization"].pop(name)
    given = _read_json(parallel.deepspeed_config) if parallel.deepspeed_config else {}
    _refuse_contradictions(derived, given, parallel.deepspeed_config)
    return _merge(_merge(defaults, given), derived)


def _partition(parallel: ParallelConfig) -> dict[str, Any]:
    """What ZeRO does beyond its stage: a second partition within each node, states that live off the device."""
    more: dict[str, Any] = {}
    if parallel.zero_hpz_partition_size > 1:
        more["zero_hpz_partition_size"] = parallel.zero_hpz_partition_size
    if parallel.zero_offload != "none":
        path = {"nvme_path": parallel.zero_offload_nvme_path} if parallel.zero_offload == "nvme" else {}
        more["offload_optimizer"] = {"device": parallel.zero_offload, **path}
    return more


def _read_json(path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--deepspeed_config {path}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"--deepspeed_config {path} is not a table")
    if (found.get("fp16") or {}).get("loss_scale"):
        raise UserError(
            f"--deepspeed_config {path}: fp16.loss_scale is fixed there; remove it, the loss scale is dynamic here"
        )
    return found


def _refuse_contradictions(
    derived: dict[str, Any], given: dict[str, Any], path: str | None, where: str = ""
) -> None:
    for key, value in given.items():
        mine = derived.get(key)
        if isinstance(mine, dict) and isinstance(value, dict):
            _refuse_contradictions(mine, value, path, f"{where}{key}.")
        elif key in derived and value not in (mine, "auto"):
            raise UserError(
                f"--deepspeed_config {path}: {where}{key} = {value!r}, but the flags make it {mine!r}; correct one of them"
            )
    if not where and (extra := {"optimizer", "scheduler"} & given.keys()):
        raise UserError(
            f"--deepspeed_config {path}: {', '.join(sorted(extra))} come from the flags (--lr, --adam-beta2 ...); remove them there"
        )


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` wins; nested dictionaries are merged."""
    both = below.keys() & above.keys()
    return (
        below
        | above
        | {
            k: _merge(below[k], above[k])
            for k in both
            if isinstance(below[k], dict) and isinstance(above[k], dict)
        }
    )


class AdamW(torch.optim.AdamW):
    """AdamW that can be told to leave an update out; ZeRO's own optimizers skip by themselves, stage 0 does not."""

    overflow = False

    def step(self, closure: Callable | None = None) -> Any:
        """One update, unless `overflow` is set."""
        return None if self.overflow else super().step(closure)


class DeepSpeedEngine:
    """The DeepSpeed side of `engines.Engine`."""

    def __init__(
        self,
        run: Run,
        grid: ProcessGrid,
        device: Device,
        config: dict[str, Any],
        kernels: Kernels,
        tensors: Tensors | None,
    ) -> None:
        """Builds the model, fills it from `tensors` (our names, full; None: `restore` follows) and hands it to DeepSpeed."""
        self.run, self.grid, self.device, self.stage = run, grid, device, run.parallel.zero_stage
        deepspeed = _import(device)
        module = self._build(deepspeed, config, kernels)
        gather = self._gather if self.stage == 3 else lambda parameter: nullcontext()
        self.deepspeed = deepspeed
        if tensors is not None:
            gpt_model.load_weights(module, run.model, run.parallel, tensors, gather, run.lora)
        for parameter in module.parameters():
            if parameter.requires_grad and getattr(parameter, "sequence_parallel", False):
                parameter.register_hook(self._sum_over_tensor_parallel)
        self.engine = deepspeed.initialize(
            model=module, optimizer=self._adamw(module), config=config, mpu=MPU(), dist_init_required=False
        )[0]
        self.module, self.zero = module, self.engine.optimizer
        if scaler := getattr(self.zero, "loss_scaler", None):
            scaler.raise_error_at_min_scale = (
                False  # --max-skipped-steps ends such a run, and says what to do
            )
        if grid.dp == 1 and self.stage < 2 and not hasattr(self.zero, "reduce_gradients"):
            # One replica has nothing to sum, but DeepSpeed would copy every gradient into a buffer and back.
            self.engine.enable_backward_allreduce = False
        self.cuts = gpt_model.shard_specs(run.model, run.parallel, run.lora)

    def _build(self, deepspeed: Any, config: dict[str, Any], kernels: Kernels) -> Any:
        run = self.run
        groups = {"data_parallel_group": self.grid.dp_group} if self.grid.tp > 1 else {}
        with deepspeed.zero.Init(config_dict_or_path=config, mpu=MPU(), enabled=self.stage == 3, **groups):
            settings = transformer_config(run.model, run.parallel, run.train, run.optim.dtype, kernels)
            return gpt_model.build_model(run.model, run.parallel, settings, lora=run.lora)

    def _gather(self, parameter: torch.nn.Parameter) -> AbstractContextManager:
        return self.deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)

    def _sum_over_tensor_parallel(self, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=self.grid.tp_group)
        return gradient

    def _adamw(self, module: torch.nn.Module) -> AdamW:
        """Two groups: no weight decay on biases and one-dimensional weights (Megatron's rule)."""
        optim = self.run.optim
        decay, plain = [], []
        for name, parameter in module.named_parameters():
            flat = name.endswith(".bias") or len(getattr(parameter, "ds_shape", parameter.shape)) == 1
            if parameter.requires_grad:
                (plain if flat else decay).append(parameter)
        groups = [
            {"params": decay, "weight_decay": optim.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        return AdamW(
            [
                group for group in groups if group["params"]
            ],  # adapters are all matrices, and ZeRO cannot flatten nothing
            lr=optim.lr,
            betas=(optim.adam_beta1, optim.adam_beta2),
            eps=optim.adam_eps,
            fused=self.device.fused_adamw,
        )

    # ---------------------------------------------------------------- stepping

    def step(self, batches: list[Batch], lr: float) -> StepResult:
        """See `Engine.step`."""
        self.engine.train()
        for group in self.zero.param_groups:
            group["lr"] = lr
        tokens = self._sum(sum(float(batch.loss_mask.sum()) for batch in batches))
        if not tokens:
            return NOTHING
        scale = self.grid.dp * len(batches) / tokens
        sums: list[Tensor] = []  # read at the end: the device's queue runs ahead
        scale_used = self._loss_scale()
        for i, batch in enumerate(batches):
            loss_sum = self._loss_sum(batch)
            sums.append(loss_sum.detach().double())
            # Gradients do not know their loss: one that is not finite makes them so, and the update is left out on every rank.
            self.engine.backward(loss_sum * torch.where(sums[-1].isfinite(), scale, math.nan).float())
            if self.stage == 0 and i == len(batches) - 1:
                norm = self._grad_norm()
                self.zero.overflow = not math.isfinite(norm)
            self.engine.step()
        if self.stage:
            norm = self.engine.get_global_grad_norm()
        loss = self._sum(torch.stack(sums).sum()) / tokens
        return StepResult(
            loss=loss,
            tokens=int(tokens),
            grad_norm=None if norm is None else float(norm),
            skipped=bool(self.zero.overflow),
            loss_scale=scale_used,
            bad=() if math.isfinite(loss) else tuple(i for i, one in enumerate(sums) if not one.isfinite()),
        )

    @torch.no_grad()
    def loss(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """See `Engine.loss`."""
        self.engine.eval()
        total, tokens = torch.zeros((), dtype=torch.float64, device=self.device.torch), 0.0
        for batch in batches:
            total += self._loss_sum(batch)
            tokens += float(batch.loss_mask.sum())
        return self._sum(total), int(self._sum(tokens))

    def _loss_sum(self, batch: Batch) -> Tensor:
        to = self.device.torch
        documents = packed_sequences_of(batch.position_ids)
        losses = self.engine(
            batch.tokens.to(to),
            batch.position_ids.to(to),
            None,
            labels=batch.labels.to(to),
            packed_seq_params=documents,
        )
        return (losses.float() * batch.loss_mask.to(to)).sum()

    def _sum(self, value: float | Tensor) -> float:
        """Over the data-parallel ranks."""
        number = torch.as_tensor(value, dtype=torch.float64, device=self.device.torch).clone()
        dist.all_reduce(number, group=self.grid.dp_group)
        return float(number)

    def _grad_norm(self) -> float:
        """Stage 0: the global norm, every replicated gradient counted once."""
        squares = torch.zeros((), dtype=torch.float64, device=self.device.torch)
        for parameter in self.module.parameters():
            if parameter.requires_grad and (
                self.grid.tp_rank == 0 or getattr(parameter, "tensor_model_parallel", False)
            ):
                # fp32 sums of rows, then fp64: a copy of the gradient in fp64 costs 50 times as much
                squares += torch.linalg.vector_norm(parameter.grad, dim=-1).double().square().sum()
        dist.all_reduce(squares, group=self.grid.tp_group)
        return math.sqrt(float(squares)) if math.isfinite(float(squares)) else math.nan

    def _loss_scale(self) -> float:
        return float(getattr(self.zero, "loss_scale", 1.0)) if self.run.optim.fp16 else 1.0

    # ---------------------------------------------------------------- checkpoint

    def fragments(self) -> Iterator[Fragment]:
        """See `Engine.fragments`. ZeRO has flattened the parameters; every rank's pieces are found by name and flat start."""
        for name, parameter in gpt_model.named_parameters(self.module).items():
            if not parameter.requires_grad:
                continue
            cut = self.cuts[name]
            for start, views in self._pieces(parameter):
                holder = (self.grid.tp_rank, self.grid.tp) if cut.dim is None else (0, 1)
                if self.stage == 0:  # every data-parallel rank holds all
                    holder = (holder[0] * self.grid.dp + self.grid.dp_rank, holder[1] * self.grid.dp)
                part = 0 if cut.dim is None else self.grid.tp_rank
                for kind, view in zip(KINDS, views, strict=True):
                    yield Fragment(name, kind, cut, part, start, view, holder)

    def _pieces(self, parameter: torch.nn.Parameter) -> Iterator[tuple[int, list[Tensor]]]:
        """(flat start within the parameter, [master, exp_avg, exp_avg_sq]) of what this rank owns of it."""
        zero = self.zero
        if self.stage == 0:
            state = self._moments(parameter, parameter)
            yield 0, [t.data.view(-1) for t in (parameter, *state)]
        elif self.stage == 3:
            group, offset, numel = zero.grad_position[zero.get_param_id(parameter)]
            start = numel * dist.get_rank(parameter.ds_process_group)
            numel = min(numel, max(0, parameter.ds_numel - start))  # the last piece is padded
            if numel:
                flat = zero.fp32_partitioned_groups_flat[group]
                yield start, [t.data.narrow(0, offset, numel) for t in (flat, *self._moments(flat, flat))]
        elif (mapping := getattr(parameter, "_hp_mapping", None)) is not None:
            flat = self._flats()[mapping.param_group_index]
            at = mapping.hp_fragment_address
            yield (
                mapping.lp_fragment_address.start,
                [t.data.narrow(0, at.start, at.numel) for t in (flat, *self._moments(flat, flat))],
            )

    def _flats(self) -> list[Tensor]:
        """fp32 masters of this rank, one flat tensor per parameter group."""
        if self.stage == 3:
            return self.zero.fp32_partitioned_groups_flat
        bf16_optimizer = getattr(
            self.zero, "fp32_groups_flat_partition", None
        )  # what bf16 with fp32 accumulation gets at stage 1
        return self.zero.single_partition_of_fp32_groups if bf16_optimizer is None else bf16_optimizer

    def _torch_adamw(self) -> AdamW:
        return self.zero if self.stage == 0 else self.zero.optimizer

    def _moments(self, key: Tensor, like: Tensor) -> list[Tensor]:
        """Adam's moments, made if the first step has not made them yet; a `step` of its own for each tensor, never shared."""
        state = self._torch_adamw().state[key]
        if "exp_avg" not in state:
            step = torch.zeros(
                (), device=like.device if self.device.fused_adamw else "cpu"
            )  # where torch itself puts it
            state.update(
                step=step, exp_avg=torch.zeros_like(like.data), exp_avg_sq=torch.zeros_like(like.data)
            )
        return [state[kind] for kind in KINDS[1:]]

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

    def rng(self) -> dict[str, Tensor]:
        """See `Engine.rng`."""
        return rng_states()

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """See `Engine.restore`."""
        load_fragments(checkpoint, self.fragments())
        scalars = checkpoint.state.engine
        for state in self._torch_adamw().state.values():
            state["step"].fill_(scalars["updates"])
        if self.run.optim.fp16 and "loss_scale" in scalars:
            self.zero.loss_scaler.cur_scale = scalars["loss_scale"]
            for name, value in scalars.get("loss_scaler", {}).items():  # the other engine keeps other things
                setattr(self.zero.loss_scaler, name, value)
        self._publish()
        if (checkpoint.world, checkpoint.run.parallel.layout_key) == (
            self.grid.world,
            self.run.parallel.layout_key,
        ):
            set_rng_states(checkpoint.rng(self.grid.rank))

    def _publish(self) -> None:
        """Masters -> the weights that the forward pass uses; collective."""
        if self.stage == 3:
            self.zero.invalidate_secondary_tensor()  # a node's second copy (hpz) is of the weights before
            for i in range(len(self.zero.fp32_partitioned_groups_flat)):
                self.zero._reassign_or_swap_out_partitioned_parameters(i)
        elif self.stage:
            self.zero.update_lp_params()


def _import(device: Device) -> Any:
    """DeepSpeed, quiet, without the shared-memory op that it would compile on a CPU (25 s; it dies without ninja)."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed = importlib.import_module("deepspeed")
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if device.kind == "cpu":
        importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=device.backend, verbose=False)
    return deepspeed
