"""Megatron-core's own training: its data parallelism, distributed optimizer and pipeline schedules, on every layout.

The rules that the wiring keeps, each found by a wrong loss:
- a micro-batch's loss is its sum over the counted tokens of the *global* batch, and nothing scales gradients afterwards: the result
  is the mean over these, however they are spread (and fp16's loss scale means what it does elsewhere);
- Megatron-core applies `wd_mult` in its scheduler, which is not used here: weight decay is set per group when AdamW is made;
- AdamW's states are made at once, each with a `step` of its own: one that is shared advances once per parameter;
- in fp32 and bf16 Megatron-core would step on gradients that are not finite: the step is taken in its parts, with a look between.
"""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from ascendspeed.checkpoint.fragment import KINDS, Fragment
from ascendspeed.checkpoint.load import Checkpoint, load_fragments
from ascendspeed.config.schema import Run
from ascendspeed.data.dataset import Batch
from ascendspeed.distributed.device import Device
from ascendspeed.distributed.fused_kernels import Kernels
from ascendspeed.distributed.process_groups import ProcessGrid, rng_states, set_rng_states
from ascendspeed.models.gpt import gpt_model
from ascendspeed.models.gpt.context_parallel import SequenceShard
from ascendspeed.models.gpt.layer_spec import transformer_config
from ascendspeed.models.gpt.packed_sequences import packed_sequences_of
from ascendspeed.training.engines import NOTHING, StepResult, Tensors


class MegatronEngine:
    """The Megatron-core side of `engines.Engine`."""

    def __init__(
        self, run: Run, grid: ProcessGrid, device: Device, kernels: Kernels, tensors: Tensors | None
    ) -> None:
        """Builds the model, fills it from `tensors` (our names, full; None: `restore` follows) and wraps it."""
        self.run, self.grid, self.device = run, grid, device
        self.share, self.updates = SequenceShard(grid.cp_rank, grid.cp), 0
        self.config = transformer_config(run.model, run.parallel, run.train, run.optim.dtype, kernels)
        self.modules = self._build(tensors)
        self.chunks = self._wrap()
        self.optimizer = get_megatron_optimizer(
            self._optimizer_config(), self.chunks, use_gloo_process_groups=False
        )
        for part in self.optimizer.chained_optimizers:
            part.optimizer = self._adamw(part.optimizer.param_groups)
        self.config.grad_scale_func = self.optimizer.scale_loss if run.optim.fp16 else None
        self.config.finalize_model_grads_func = _sum_gradients
        self.cuts = gpt_model.shard_specs(run.model, run.parallel, run.lora)

    def _build(self, tensors: Tensors | None) -> list[gpt_model.GPTLanguageModel]:
        run, virtual = self.run, self.run.parallel.num_virtual_stages_per_pipeline_rank
        stages = range(virtual) if virtual > 1 else [None]
        modules = [
            gpt_model.build_model(run.model, run.parallel, self.config, stage, run.lora).to(self.device.torch)
            for stage in stages
        ]
        if tensors is not None:
            gpt_model.load_weights(modules, run.model, run.parallel, tensors, lora=run.lora)
        return modules

    def _wrap(self) -> list[DistributedDataParallel]:
        parallel = self.run.parallel
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
        )
        chunks = [  # later pieces of an interleaved pipeline are not on the critical path: one bucket each
            DistributedDataParallel(self.config, settings, module, disable_bucketing=i > 0)
            for i, module in enumerate(self.modules)
        ]
        if parallel.overlap_grad_reduce:
            functions = [chunk.no_sync for chunk in chunks]
            self.config.no_sync_func = functions if len(chunks) > 1 else functions[0]
        return chunks

    def _optimizer_config(self) -> OptimizerConfig:
        optim, parallel = self.run.optim, self.run.parallel
        return OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.adam_beta1,
            adam_beta2=optim.adam_beta2,
            adam_eps=optim.adam_eps,
            clip_grad=optim.clip_grad,
            bf16=optim.bf16,
            fp16=optim.fp16,
            params_dtype=self.config.params_dtype,
            initial_loss_scale=optim.initial_loss_scale,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_param_gather=parallel.overlap_param_gather,
        )

    def _adamw(self, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
        """torch's, whatever else is installed, on Megatron-core's groups; with its states, which torch would make lazily."""
        optim = self.run.optim
        adamw = torch.optim.AdamW(
            [{"params": [], "weight_decay": optim.weight_decay * group["wd_mult"]} for group in groups],
            lr=optim.lr,
            betas=(optim.adam_beta1, optim.adam_beta2),
            eps=optim.adam_eps,
            fused=self.device.fused_adamw,
        )
        for mine, theirs in zip(adamw.param_groups, groups, strict=True):
            mine["params"] = theirs[
                "params"
            ]  # put in afterwards: a shard is a view of a parameter, which torch would refuse
        for master in (p for group in adamw.param_groups for p in group["params"]):
            step = torch.zeros(
                (), device=master.device if self.device.fused_adamw else "cpu"
            )  # where torch itself puts it
            moments = {kind: torch.zeros_like(master.data) for kind in KINDS[1:]}
            adamw.state[master].update(step=step, **moments)
        return adamw

    # ---------------------------------------------------------------- stepping

    def step(self, batches: list[Batch], lr: float) -> StepResult:
        """See `Engine.step`."""
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        tokens = self._sum(sum(float(batch.loss_mask.sum()) for batch in batches), self.grid.dp_group)
        if not tokens:
            return NOTHING
        scale_used = float(self.optimizer.get_loss_scale())
        sums = self._pass(batches, 1 / tokens)
        overflow = self.optimizer.prepare_grads()
        norm = None if overflow else float(self.optimizer.get_grad_norm())
        finite = norm is not None and math.isfinite(norm)
        bad = tuple(i for i, one in enumerate(sums) if not math.isfinite(one))
        total, wrong = self._sum([sum(sums), float(not finite or bool(bad))])
        if not wrong:
            self._update(norm)
        return StepResult(total / tokens, int(tokens), norm, bool(wrong), scale_used, bad)

    def _update(self, norm: float) -> None:
        clip = self.run.optim.clip_grad
        for part in self.optimizer.chained_optimizers:
            if clip and (masters := part.get_parameters()):
                clip_grad_by_total_norm_fp32(masters, clip, norm)
        self.optimizer.step_with_ready_grads()
        self.updates += 1

    @torch.no_grad()
    def loss(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """See `Engine.loss`."""
        for chunk in self.chunks:
            chunk.eval()
        each, batches = (
            self.run.train.global_batch_size // (self.run.train.micro_batch_size * self.grid.dp),
            iter(batches),
        )
        total = tokens = 0.0
        while some := list(islice(batches, each)):
            total += sum(self._pass(some, 1.0, forward_only=True))
            tokens += sum(float(batch.loss_mask.sum()) for batch in some)
        return self._sum(total), int(self._sum(tokens, self.grid.dp_group))

    def _pass(self, batches: list[Batch], scale: float, forward_only: bool = False) -> list[float]:
        """Forward (and backward) over the micro-batches by the schedule of the layout; each one's loss (sum), if this rank counts.

        Of the ranks that see the same samples, those of the last stage count, and of each tensor-parallel group one.
        """
        forward_backward = get_forward_backward_func()
        micro_batch, length = batches[0].tokens.shape
        sums = forward_backward(
            forward_step_func=partial(self._forward, scale),
            data_iterator=[iter(batches) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=micro_batch,
            forward_only=forward_only,
        )
        return [float(one) for one in sums] if self.grid.tp_rank == 0 else []

    def _forward(
        self, scale: float, batches: Iterator[Batch], chunk: DistributedDataParallel
    ) -> tuple[Tensor, Any]:
        """One micro-batch through one piece of the model -> its output, and what the last stage makes the loss of it with."""
        batch = next(batches)
        tokens, labels, mask, positions = (
            self.share.take(x, 1).to(self.device.torch)
            for x in (batch.tokens, batch.labels, batch.loss_mask, batch.position_ids)
        )

        def loss(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """(what is differentiated, tokens for Megatron-core to divide by: none, what is reported)."""
            total = (losses.float() * mask).sum()
            return (
                total * scale,
                torch.zeros((), dtype=torch.int, device=total.device),
                total.detach().double(),
            )

        return chunk(
            tokens, positions, None, labels=labels, packed_seq_params=packed_sequences_of(batch.position_ids)
        ), loss

    def _sum(self, values: Any, group: Any = None) -> Any:
        """Over all ranks, or those of a group."""
        numbers = torch.as_tensor(values, dtype=torch.float64, device=self.device.torch).clone()
        dist.all_reduce(numbers, group=group)
        return numbers.tolist()

    # ---------------------------------------------------------------- checkpoint

    def fragments(self) -> Iterator[Fragment]:
        """See `Engine.fragments`. A data-parallel rank has all of a parameter or, under the distributed optimizer, its shard."""
        owned = dict(self._masters())
        for module in self.modules:
            for name, parameter in gpt_model.named_parameters(module).items():
                if parameter not in owned:
                    continue  # in another rank's shard
                tied = name == gpt_model.OUTPUT and module.share_embeddings_and_output_weights
                if tied:
                    name = gpt_model.EMBEDDING  # the last stage's copy of it: read, never written
                cut, (views, start, i, n) = self.cuts[name], owned[parameter]
                if cut.dim is None:
                    part, i, n = 0, self.grid.tp_rank * n + i, self.grid.tp * n
                else:
                    part = self.grid.tp_rank
                for kind, view in zip(KINDS, views, strict=True):
                    yield Fragment(
                        name, kind, cut, part, start, view.data.view(-1), (-1, 1) if tied else (i, n)
                    )

    def _masters(self) -> Iterator[tuple[torch.nn.Parameter, tuple[list[Tensor], int, int, int]]]:
        """Parameter, ([master, exp_avg, exp_avg_sq], flat start within the parameter, i, n): the i-th of n holders of the same."""
        for part in self.optimizer.chained_optimizers:
            for parameter, master in _pairs(part):
                state = part.optimizer.state[master]
                views = [master, *(state[kind] for kind in KINDS[1:])]
                if isinstance(part, DistributedOptimizer):
                    yield parameter, (views, part._get_model_param_range_map(parameter)["param"].start, 0, 1)
                else:
                    group = _holders(parameter)
                    yield parameter, (views, 0, group.rank(), group.size())

    def scalars(self) -> dict[str, Any]:
        """See `Engine.scalars`."""
        values: dict[str, Any] = {"updates": self.updates}
        if self.run.optim.fp16:
            scaler = self.optimizer.chained_optimizers[0].grad_scaler
            values["loss_scale"] = float(scaler.scale)
            values["grad_scaler"] = {
                name: getattr(scaler, name) for name in ("_growth_tracker", "_hysteresis_tracker")
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
        self.updates = scalars["updates"]
        for part in self.optimizer.chained_optimizers:
            for state in part.optimizer.state.values():
                state["step"].fill_(self.updates)
            if self.run.optim.fp16 and "loss_scale" in scalars:
                part.grad_scaler._scale.fill_(scalars["loss_scale"])
                for name, value in scalars.get(
                    "grad_scaler", {}
                ).items():  # the other engine keeps other things
                    setattr(part.grad_scaler, name, value)
        self._publish()
        if (checkpoint.world, checkpoint.run.parallel.layout_key) == (
            self.grid.world,
            self.run.parallel.layout_key,
        ):
            set_rng_states(checkpoint.rng(self.grid.rank))

    def _publish(self) -> None:
        """Masters -> the weights that the forward pass uses; collective."""
        for part in self.optimizer.chained_optimizers:
            if hasattr(part, "_copy_main_params_to_model_params"):
                part._copy_main_params_to_model_params()
        if self.run.parallel.use_distributed_optimizer:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)


def _sum_gradients(
    model: list[DistributedDataParallel], num_tokens: Tensor | None = None, **groups: Any
) -> None:
    """Over the ranks that must agree; not divided by `num_tokens`: the losses have been."""
    finalize_model_grads(model, None, **groups)


def _pairs(part: Any) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """A parameter and its fp32 master (or this rank's shard of it) in one of Megatron-core's optimizers."""
    if isinstance(part, DistributedOptimizer):
        groups = zip(
            part.model_fp32_groups + part.model_float16_groups,
            part.shard_fp32_groups + part.shard_fp32_from_float16_groups,
            strict=True,
        )
    elif hasattr(part, "float16_groups"):
        groups = zip(
            part.fp32_from_fp32_groups + part.float16_groups,
            part.fp32_from_fp32_groups + part.fp32_from_float16_groups,
            strict=True,
        )
    else:
        groups = ((group["params"], group["params"]) for group in part.optimizer.param_groups)
    for parameters, masters in groups:
        yield from zip(parameters, masters, strict=True)


def _holders(parameter: torch.nn.Parameter) -> Any:
    """Process group of the ranks that hold the same part of a parameter."""
    if getattr(parameter, "allreduce", True):
        return parallel_state.get_data_parallel_group(with_context_parallel=True)
    return parallel_state.get_expert_data_parallel_group()
