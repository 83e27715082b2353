"""Times real answers: what `performance` needs measured."""

import logging

import torch

from ascendspeed.inference.benchmark_report import (
    BatchOutOfMemory,
    GenerationTimer,
    GenerationTiming,
    largest_batch,
)
from ascendspeed.inference.engine import CacheOutOfMemory, LanguageModel, SamplingParams, sample
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

Pairs = list[tuple[int, int]]


def run_cases(
    model: LanguageModel, cases: Pairs, ranges: Pairs, batch: int, limit: float
) -> list[GenerationTiming]:
    """One for each (input, output) of `cases`: at `batch`, or where there are `ranges` at the largest within `limit` seconds.

    Collective. Raises `UserError` when nothing could be measured.
    """
    measure(model, 1, min(16, cases[0][0]), 2)  # warms up
    found = []
    for number, (inputs, outputs) in enumerate(cases):
        logger.info(f"input {inputs}, output {outputs}")
        if ranges:
            low, high = ranges[number]
            best = largest_batch(
                low, high, limit, lambda batch, a=inputs, b=outputs: measure(model, batch, a, b)
            )
            if best is None:
                logger.info(f"not even a batch of {low} stays within {limit * 1e3:g} ms")
            found += [best] if best else []
            continue
        try:
            found.append(measure(model, batch, inputs, outputs))
        except BatchOutOfMemory:
            logger.info(f"batch {batch}: out of memory")
    if not found:
        raise UserError("nothing was measured: every batch is out of memory, or above the limit")
    return found


def measure(model: LanguageModel, batch: int, inputs: int, outputs: int) -> GenerationTiming:
    """By rank 0's clock, on every rank. Raises `OutOfMemory` where memory does not suffice, as it usually does on no rank then."""
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(0, model.config.vocab_size, (batch, inputs), generator=generator).tolist()
    model.grid.barrier()
    clock = GenerationTimer()
    try:
        sample(model, prompts, SamplingParams(max_new_tokens=outputs), clock.watch)
    except (MemoryError, torch.OutOfMemoryError, CacheOutOfMemory) as error:
        model.device.empty_cache()
        raise BatchOutOfMemory from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # the CPU's allocator
            raise
        raise BatchOutOfMemory from error
    return model.grid.all_gather_object(clock.timing(batch, inputs, outputs))[0]
