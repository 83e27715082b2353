"""Memory of one rank: its real engine is built and takes two steps, on fake tensors or on real ones."""

import gc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ascendspeed.config.schema import Run
from ascendspeed.distributed.device import Device
from ascendspeed.planning import balanced_experts, fake_world
from ascendspeed.planning.allocations import AllocationTracker, by_category

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "working")


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank."""

    rank: int
    persistent: dict[str, int]
    """Category -> bytes that live during the whole run."""
    at_peak: dict[str, int]
    """Category -> bytes at the peak; `working` is what lives only inside one operation or one layer."""
    peak: int
    place: str
    """Part of the step and operation at the peak."""


def micro_batches(run: Run, data_parallel: int) -> int:
    """Micro-batches of a rank and step that show the peak: two, or enough to fill a pipeline."""
    parallel, train = run.parallel, run.train
    pp = parallel.pipeline_model_parallel_size
    in_run = train.global_batch_size // (train.micro_batch_size * data_parallel)
    enough = 2 if pp == 1 else pp if parallel.num_virtual_stages_per_pipeline_rank == 1 else 2 * pp
    return min(in_run, enough)


def measure(
    run: Run,
    device: Device,
    world: int,
    rank: int,
    engine_of: Any,
    *,
    fake: bool = True,
    granularity: int = 1,
) -> RankMemory:
    """Builds the engine of rank `rank` of `world` and takes two steps, of as few micro-batches as show the
    peak.

    `engine_of(run, grid)` builds the engine.
    """
    tracker = AllocationTracker(granularity)
    tensors = (fake_world.fake_tensors if fake else fake_world.real_tensors)(run.parallel.deepspeed)
    with fake_world.joined(device, run.parallel, world, rank) as grid:
        count = micro_batches(run, grid.dp)
        run = replace(
            run, train=replace(run.train, global_batch_size=run.train.micro_batch_size * grid.dp * count)
        )
        with tensors, balanced_experts.balanced(run.model), tracker:
            tracker.place = "start"
            engine = engine_of(run, grid)
            steps = Steps(run, engine, tracker)
            result = steps.measure(rank, count)
        del engine, steps
        gc.collect()
    return result


class Steps:
    """Steps of an engine under a tracker."""

    def __init__(self, run: Run, engine: Any, tracker: AllocationTracker) -> None:
        self.run, self.engine, self.tracker = run, engine, tracker
        self.modules = getattr(engine, "modules", None) or [engine.module]
        self.is_forward = False
        self.passes = 0
        for module in self.modules:
            self._watch(module)

    def measure(self, rank: int, count: int) -> RankMemory:
        """Takes two steps; the second one has all states that the first one creates."""
        peaks = [(self.tracker.peak, self.tracker.at_peak)]
        persistent: Counter[str] = Counter()
        for _ in range(2):
            self.tracker.start_peak()
            self.passes = 0
            self.engine.step([self._batch() for _ in range(count)], 1e-4)
            peaks.append((self.tracker.peak, self.tracker.at_peak))
            self._sort()
            persistent = self.tracker.categories()
        peak, (place, labels) = max(reversed(peaks), key=lambda item: item[0])
        return RankMemory(rank, _named(persistent), _named(by_category(labels)), peak, place)

    def _batch(self) -> Any:
        from ascendspeed.data.dataset import Batch

        rows, length = self.run.train.micro_batch_size, self.run.data.seq_length
        tokens = torch.zeros(rows, length, dtype=torch.int64)
        with fake_world.unset_fake_temporarily():
            positions = torch.arange(length).expand(rows, -1)
        return Batch(tokens, tokens.clone(), torch.ones(rows, length), positions)

    def _sort(self) -> None:
        """Puts everything that lives between two steps into its category."""
        tracker = self.tracker
        for old in ("model", "activations", "logits", "working"):
            tracker.relabel_live(old, "buffers")
        tracker.relabel(_gradients(self.engine, self.modules), "gradients")
        tracker.relabel(self.engine.optimizer_tensors(), "optimizer")
        tracker.relabel(_weights(self.modules), "weights")

    def _watch(self, module: Any) -> None:
        """Labels allocations by the module whose forward pass runs."""
        module.register_forward_pre_hook(self._start_forward)
        module.register_forward_hook(self._end_forward)
        for layer in module.decoder.layers:
            layer.register_forward_pre_hook(self._labeler("activations", f"layer {layer.layer_number - 1}"))
            layer.register_forward_hook(self._labeler("activations", ""))
        if module.post_process:
            module.output_layer.register_forward_pre_hook(self._labeler("logits", "output layer"))

    def _start_forward(self, *_: Any) -> None:
        self.is_forward = True
        self.passes += 1
        self.tracker.label = ("activations", "")
        self.tracker.place = f"forward pass of micro-batch {self.passes}"

    def _end_forward(self, *_: Any) -> None:
        self.is_forward = False
        self.tracker.label = ("working", "")
        self.tracker.place = f"backward pass after {self.passes} forward passes, or the update"

    def _labeler(self, category: str, place: str) -> Any:
        def label(*_: Any) -> None:
            if self.is_forward:  # not while a layer is recomputed
                self.tracker.label = (category, place)

        return label


def _named(sums: Counter[str]) -> dict[str, int]:
    return {name: sums[name] for name in CATEGORIES}


def _weights(modules: list[Any]) -> Iterator[Tensor]:
    """The parameters, under ZeRO-3 this rank's part of them, and the scales of quantised ones."""
    for module in modules:
        for part in module.modules():
            if isinstance(scale := getattr(part, "weight_scale", None), Tensor):
                yield scale
        for parameter in module.parameters():
            yield parameter
            if isinstance(part := getattr(parameter, "ds_tensor", None), Tensor):
                yield part


def _gradients(engine: Any, modules: list[Any]) -> Iterator[Tensor]:
    """Tensors that hold gradients between two steps."""
    for module in modules:
        for parameter in module.parameters():
            for name in ("grad", "main_grad"):
                if isinstance(gradient := getattr(parameter, name, None), Tensor):
                    yield gradient
    holder = getattr(engine, "zero", None)
    for name, value in vars(holder).items() if holder is not None else ():
        if "grad" in name:
            yield from _tensors_in(value)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)
