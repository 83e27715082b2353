"""Megatron-core engine: its data parallelism, distributed optimizer and pipeline schedules, for every layout.

Rules of the integration, each found by a wrong loss:
- the loss of a micro-batch is its sum divided by the items (supervised tokens) of the *global* batch, and
  gradients are not scaled afterwards: the result is the mean over these, whatever the layout (and fp16's
  loss scale has its usual meaning);
- Megatron-core applies `wd_mult` in its scheduler, which is not used here: weight decay is set for each group
  of AdamW;
- AdamW's states are created at once, each with its own `step`: a shared one would advance once per parameter;
- in fp32 and bf16 Megatron-core would apply gradients that are not finite: the step is split, with a check in
  between.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from ascendspeed.checkpoint.fragment import KINDS, Fragment
from ascendspeed.config.schema import Run
from ascendspeed.data.dataset import Batch
from ascendspeed.distributed.device import Device
from ascendspeed.distributed.fused_kernels import Kernels
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.models.gpt import gpt_model
from ascendspeed.models.gpt.layer_spec import transformer_config
from ascendspeed.models.gpt.packed_sequences import packed_sequences_of
from ascendspeed.models.lora.layers import without_adapters
from ascendspeed.training.engines import EMPTY_STEP, StepResult, Tensors
from ascendspeed.training.engines.common import BaseEngine, routed_tokens
from ascendspeed.training.engines.megatron_optimizer import (
    build_optimizer,
    clip_gradients,
    grad_norm,
    loss_scale_state,
    parameters_and_masters,
    replica_group,
    restore_loss_scale,
    state_of,
)
from ascendspeed.training.engines.muon import MatrixShard, Muon, matrices_of
from ascendspeed.training.engines.split_masters import SplitAdamW
from ascendspeed.training.objectives import LossSums
from ascendspeed.training.objectives.answers import answer_logprobs

LossFunction = Callable[[Tensor, Batch], LossSums]
"""(losses [b, s], this rank's part of a micro-batch) -> its sums."""


class MegatronEngine(BaseEngine):
    """Implements `engines.Engine` with Megatron-core."""

    def __init__(
        self, run: Run, grid: ProcessGrid, device: Device, kernels: Kernels, tensors: Tensors | None
    ) -> None:
        """Builds the model, loads `tensors` (full, by Megatron name; None: `restore` follows), wraps it."""
        super().__init__(run, grid, device)
        self.updates = 0
        self.config = transformer_config(run.model, run.parallel, run.train, run.optim.dtype, kernels)
        self.modules = self._build(tensors)
        self.chunks = self._wrap()
        self.optimizer = self._make_optimizer()
        self.muon = self._muon() if run.optim.optimizer == "muon" else None
        self.config.grad_scale_func = self.optimizer.scale_loss if run.optim.fp16 else None
        self.config.finalize_model_grads_func = _sum_gradients
        self._start_average()

    def _build(self, tensors: Tensors | None) -> list[gpt_model.GPTLanguageModel]:
        run = self.run
        virtual = run.parallel.num_virtual_stages_per_pipeline_rank
        stages = range(virtual) if virtual > 1 else [None]
        modules = [
            gpt_model.build_model(run.model, run.parallel, self.config, stage, run.lora).to(self.device.torch)
            for stage in stages
        ]
        if tensors is not None:
            write = self._weight_writer(modules)
            gpt_model.load_weights(modules, run.model, run.parallel, tensors, lora=run.lora, write=write)
        return modules

    def _make_optimizer(self) -> Any:
        return build_optimizer(self.run, self.config.params_dtype, self.chunks, self.device)

    def _wrap(self) -> list[Any]:
        """Wraps the model's parts for data parallelism."""
        parallel = self.run.parallel
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
        )
        chunks = [  # later chunks of an interleaved pipeline are not on the critical path: one bucket each
            DistributedDataParallel(self.config, settings, module, disable_bucketing=i > 0)
            for i, module in enumerate(self.modules)
        ]
        if parallel.num_distributed_optimizer_instances > 1:
            _sum_over_optimizer_instances(chunks, parallel.num_distributed_optimizer_instances)
        if parallel.overlap_grad_reduce:
            functions = [chunk.no_sync for chunk in chunks]
            self.config.no_sync_func = functions if len(chunks) > 1 else functions[0]
        return chunks

    def _muon(self) -> Muon:
        """Muon for the linears of the layers; their second moments are dropped."""
        owned, matrices, shards = dict(self._masters()), matrices_of(self.run.model), []
        for module in self.modules:
            for name, parameter in gpt_model.named_parameters(module).items():
                if name not in matrices:
                    continue
                group = replica_group(parameter) if self.run.parallel.use_distributed_optimizer else None
                shard = MatrixShard(
                    self.shard_specs[name], matrices[name], self.grid.tp_group, group, key=None
                )
                if parameter in owned:
                    (shard.key, *_), shard.start, _ = owned[parameter]
                    shard.numel = shard.key.numel()
                    state_of(self.optimizer, shard.key).pop("exp_avg_sq")
                shards.append(shard)
        return Muon(self.run.optim, shards, self.device.torch)

    # ---------------------------------------------------------------- stepping

    def step(self, batches: list[Batch], lr: float) -> StepResult:
        """See `Engine.step`."""
        count = self._count(batches)
        if not count:
            return EMPTY_STEP
        batches = self.objective.prepare(batches, self)
        for chunk in self.chunks:
            chunk.train()
        loss_scale = self._begin_step(lr)
        if losses := self.config.router_losses:
            losses.scale = loss_scale / self._rows(batches)
        reports = self._run_schedule(batches, self._loss_sums, scale=1 / count)
        sums = reports[:, 0].tolist()
        overflow = self._prepare_gradients()
        norm = None if overflow else self._grad_norm()
        finite = norm is not None and math.isfinite(norm)
        bad = tuple(i for i, value in enumerate(sums) if not math.isfinite(value))
        failed = float(not finite or bool(bad))
        *totals, failures = self._all_reduce_sum([*reports.sum(0).tolist(), failed])
        if not failures:
            self._update(norm)
        routers = self._take_router_losses(losses, self._rows(batches))
        loss, *metrics = (total / count for total in totals)
        named = dict(zip(self.objective.metrics, metrics, strict=True))
        return StepResult(
            loss, int(count), norm, bool(failures), loss_scale, bad=bad, metrics=named, **routers
        )

    def _begin_step(self, lr: float) -> float:
        """Clears the gradients and sets the learning rate; returns the loss scale."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return float(self.optimizer.get_loss_scale())

    def _prepare_gradients(self) -> bool:
        """Gives the gradients to the masters; True if fp16 has overflown."""
        return bool(self.optimizer.prepare_grads())

    def _grad_norm(self) -> float:
        return grad_norm(self.optimizer, self.device)

    def _update(self, norm: float) -> None:
        clip_gradients(self._trained_masters(), self.run.optim.clip_grad, norm)
        if self.muon:
            states = {key: state_of(self.optimizer, key) for key in self.muon.keys}
            self.muon.step(self.optimizer.param_groups[0]["lr"], states)
            for key in self.muon.keys:
                key.grad = None  # AdamW leaves out what has no gradient
        self._apply_gradients()
        self._average_weights()
        self.updates += 1

    def _trained_masters(self) -> list[Tensor]:
        return [m for chained in self.optimizer.chained_optimizers for m in chained.get_parameters()]

    def _apply_gradients(self) -> None:
        self.optimizer.step_with_ready_grads()

    @torch.no_grad()
    def loss(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """See `Engine.loss`."""
        for chunk in self.chunks:
            chunk.eval()
        per_pass = self.run.train.global_batch_size // (self.run.train.micro_batch_size * self.grid.dp)
        remaining = iter(batches)
        total = count = 0.0
        while group := list(islice(remaining, per_pass)):
            group = self.objective.prepare(group, self)
            total += float(self._run_schedule(group, self._loss_sums)[:, 0].sum())
            count += sum(map(self.objective.count, group))
        return self._all_reduce_sum(total), int(self._all_reduce_sum(count, self.grid.dp_group))

    @torch.no_grad()
    def score(self, batches: Sequence[Batch], adapters: bool = True) -> list[Tensor]:
        """See `objectives.Scorer.score`."""
        for chunk in self.chunks:
            chunk.eval()
        with nullcontext() if adapters else without_adapters(self.modules):
            return self._forward_all(batches, self._answer_logprobs)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.weights`."""
        if self.run.parallel.overlap_param_gather:  # else the shards are gathered after the update
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)
        for module in self.modules:
            for name, parameter in gpt_model.named_parameters(module).items():
                yield name, parameter.detach()

    def _run_schedule(
        self, batches: Sequence[Batch], function: LossFunction, scale: float | None = None
    ) -> Tensor:
        """Runs forward (and backward, if there is a `scale` for the loss) over the micro-batches; returns the
        report of each, [micro-batches, 1 + metrics] fp64 on the CPU.

        Only the last pipeline stage reports, and of each tensor-parallel group only rank 0; other ranks
        return no rows.
        """
        reports = self._forward_all(batches, function, scale)
        if not reports or self.grid.tp_rank:
            return torch.zeros(0, 1 + len(self.objective.metrics), dtype=torch.float64)
        return torch.stack(reports).cpu().double()

    def _forward_all(
        self, batches: Sequence[Batch], function: LossFunction, scale: float | None = None
    ) -> list[Tensor]:
        """Reports of the micro-batches, in the pipeline schedule; only on the last pipeline stage."""
        forward_backward = get_forward_backward_func()
        micro_batch, length = batches[0].tokens.shape
        return forward_backward(
            forward_step_func=partial(self._forward, function, scale or 1.0),
            data_iterator=[iter(batches) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=micro_batch,
            forward_only=scale is None,
        )

    def _loss_sums(self, losses: Tensor, batch: Batch) -> LossSums:
        return self.objective.sums(losses, batch, self.grid)

    def _answer_logprobs(self, losses: Tensor, batch: Batch) -> LossSums:
        """Log-probabilities of answers in the place of a report."""
        logprobs, _ = answer_logprobs(losses, batch, self.grid)
        return LossSums(logprobs.sum(), logprobs.detach())

    def _forward(
        self, function: LossFunction, scale: float, batches: Iterator[Batch], chunk: DistributedDataParallel
    ) -> tuple[Tensor, Any]:
        """Runs one micro-batch through a model chunk; returns its output and the function that makes the loss
        of it.
        """
        batch = next(batches)
        own = batch.map(lambda x: self.device.copy(self.sequence_shard.take(x, 1)))

        def loss(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """(loss to differentiate, tokens for Megatron-core to divide by: 0, report)."""
            total, report = function(losses, own)
            no_tokens = torch.zeros((), dtype=torch.int, device=total.device)
            return total * scale, no_tokens, report

        extra: dict[str, Any] = {"packed_seq_params": packed_sequences_of(batch.position_ids)}
        if (valid := routed_tokens(batch, self.config.router_losses)) is not None:
            extra["padding_mask"] = self.device.copy(self.sequence_shard.take(valid, 1))
        return chunk(own.tokens, own.position_ids, None, labels=own.labels, **extra), loss

    # ---------------------------------------------------------------- checkpoint

    def _optimizer_fragments(self) -> Iterator[Fragment]:
        """See `BaseEngine._optimizer_fragments`.

        A data-parallel rank has a whole parameter or, with the distributed optimizer, its shard.
        """
        owned = dict(self._masters())
        for module in self.modules:
            for name, parameter in gpt_model.named_parameters(module).items():
                if parameter not in owned:
                    continue  # in another rank's shard
                views, start, holder = owned[parameter]
                part = 0
                if name == gpt_model.OUTPUT and module.share_embeddings_and_output_weights:
                    name = gpt_model.EMBEDDING  # the last stage's copy: read, never written
                    holder = (-1, 1)
                if self.shard_specs[name].dim is not None:
                    part = self.grid.tp_rank
                elif holder[0] >= 0:
                    holder = (self.grid.tp_rank * holder[1] + holder[0], self.grid.tp * holder[1])
                for kind, view in zip(KINDS, views, strict=True):
                    fragment = Fragment(
                        name, kind, self.shard_specs[name], part, start, view.data.view(-1), holder
                    )
                    yield self._with_joined_master(fragment, view)

    def _with_joined_master(self, fragment: Fragment, master: Tensor) -> Fragment:
        """The fragment of a split master has a copy of it; others stay as they are."""
        for chained in self.optimizer.chained_optimizers:
            adamw = chained.optimizer
            if isinstance(adamw, SplitAdamW) and master in adamw.parts:
                joined = adamw.read(master)
                return replace(
                    fragment, tensor=joined.view(-1), write_back=partial(adamw.write, master, joined)
                )
        return fragment

    def optimizer_tensors(self) -> Iterator[Tensor]:
        """See `BaseEngine.optimizer_tensors`."""
        yield from super().optimizer_tensors()
        for chained in self.optimizer.chained_optimizers:
            if isinstance(chained.optimizer, SplitAdamW):
                yield from chained.optimizer.remainders

    def _masters(self) -> Iterator[tuple[torch.nn.Parameter, tuple[list[Tensor], int, tuple[int, int]]]]:
        """Parameter -> ([master, exp_avg, exp_avg_sq], flat start within the parameter, (i, n)): the i-th of
        n holders.
        """
        for chained in self.optimizer.chained_optimizers:
            for parameter, master in parameters_and_masters(chained):
                state = chained.optimizer.state[master]
                views = [master, state["exp_avg"], self._second_moment(state, master)]
                if isinstance(chained, DistributedOptimizer):
                    start = chained._get_model_param_range_map(parameter)["param"].start
                    instances = self.run.parallel.num_distributed_optimizer_instances
                    holder = (chained.distributed_optimizer_instance_id, instances)
                    yield parameter, (views, start, holder)
                else:
                    group = replica_group(parameter)
                    yield parameter, (views, 0, (group.rank(), group.size()))

    def scalars(self) -> dict[str, Any]:
        """See `Engine.scalars`."""
        values: dict[str, Any] = {"updates": self.updates}
        if self.run.optim.fp16:
            values |= loss_scale_state(self.optimizer)
        return values

    def _restore_updates(self, updates: int) -> None:
        self.updates = updates
        for chained in self.optimizer.chained_optimizers:
            for state in chained.optimizer.state.values():
                state["step"].fill_(updates)

    def _restore_loss_scale(self, scalars: dict[str, Any]) -> None:
        restore_loss_scale(self.optimizer, scalars)

    def _refresh_weights(self) -> None:
        for chained in self.optimizer.chained_optimizers:
            if hasattr(chained, "_copy_main_params_to_model_params"):
                chained._copy_main_params_to_model_params()
        if self.run.parallel.use_distributed_optimizer:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)


def _sum_over_optimizer_instances(chunks: list[DistributedDataParallel], instances: int) -> None:
    """Makes the gradient sum of every chunk include the other instances of the distributed optimizer.

    Megatron-core's constructor does so too, but with a CUDA stream, which a sum that is not overlapped does
    not use and a CPU does not have.
    """
    group = parallel_state.get_inter_distributed_optimizer_instance_group()
    for chunk in chunks:
        chunk.ddp_config.num_distributed_optimizer_instances = instances
        for buckets in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            buckets.inter_distributed_optimizer_instance_group = group


def _sum_gradients(
    model: list[DistributedDataParallel], num_tokens: Tensor | None = None, **groups: Any
) -> None:
    """Sums gradients over the ranks that must agree; does not divide by `num_tokens`, since the losses are
    divided already.
    """
    finalize_model_grads(model, None, **groups)
