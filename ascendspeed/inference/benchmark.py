"""Measures the speed of generation for given prompt and answer lengths."""

import logging
from dataclasses import dataclass

import torch

from ascendspeed.inference.benchmark_report import (
    BatchOutOfMemory,
    GenerationTimer,
    GenerationTiming,
    find_largest_batch,
)
from ascendspeed.inference.engine import CacheOutOfMemory, LanguageModel, SamplingParams, sample
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchmarkCase:
    """Lengths to measure, and the batch size or the range to search for the largest one."""

    prompt_tokens: int
    new_tokens: int
    batch_size: int = 1
    batch_range: tuple[int, int] | None = None
    """Smallest and largest batch size; None: measure `batch_size`."""


def run_cases(model: LanguageModel, cases: list[BenchmarkCase], limit: float) -> list[GenerationTiming]:
    """Measures every case; a case with `batch_range` at the largest batch whose decoding step takes at most
    `limit` seconds.

    Collective. Raises `UserError` if nothing could be measured.
    """
    measure(model, 1, min(16, cases[0].prompt_tokens), 2)  # warm-up
    timings = []
    for case in cases:
        logger.info(f"input {case.prompt_tokens}, output {case.new_tokens}")
        timing = _measure_case(model, case, limit)
        if timing:
            timings.append(timing)
    if not timings:
        raise UserError("nothing was measured: every batch is out of memory or above the limit")
    return timings


def _measure_case(model: LanguageModel, case: BenchmarkCase, limit: float) -> GenerationTiming | None:
    def measure_batch(batch: int) -> GenerationTiming:
        return measure(model, batch, case.prompt_tokens, case.new_tokens)

    if case.batch_range is None:
        try:
            return measure_batch(case.batch_size)
        except BatchOutOfMemory:
            logger.info(f"batch {case.batch_size}: out of memory")
            return None
    low, high = case.batch_range
    timing = find_largest_batch(low, high, limit, measure_batch)
    if timing is None:
        logger.info(f"not even a batch of {low} stays within {limit * 1e3:g} ms")
    return timing


def measure(model: LanguageModel, batch: int, prompt_tokens: int, new_tokens: int) -> GenerationTiming:
    """Generates a batch from random prompts and returns rank 0's timing on every rank.

    Raises `BatchOutOfMemory` if memory does not suffice: normally on all ranks, as they need the same.
    """
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(0, model.config.vocab_size, (batch, prompt_tokens), generator=generator).tolist()
    model.grid.barrier()
    timer = GenerationTimer()
    try:
        sample(model, prompts, SamplingParams(max_new_tokens=new_tokens), timer.on_token)
    except (MemoryError, torch.OutOfMemoryError, CacheOutOfMemory) as error:
        model.device.empty_cache()
        raise BatchOutOfMemory from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # raised by the CPU's allocator
            raise
        raise BatchOutOfMemory from error
    return model.grid.all_gather_object(timer.timing(batch, prompt_tokens, new_tokens))[0]
