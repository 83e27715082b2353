"""Log-probabilities of answers under the reference weights, computed once before the training and kept in a
file beside the data.

`P_reference.safetensors` holds `logprobs` [pairs, 2] (chosen, rejected; NaN for a pair that did not fit into
--seq-length), and in its metadata the fingerprint of the weights, the hash of the data and the compute type.
Adapters need no file: the weights without them are their reference.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ascendspeed.config.schema import Run
from ascendspeed.data import batch as micro_batch
from ascendspeed.data.batch import Batch
from ascendspeed.data.dataset import hash_dataset, micro_batch_starts
from ascendspeed.data.packing.algorithms import FirstFit
from ascendspeed.data.packing.packed_pairs import PackedPairs
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.training.data_setup import BatchFunction, SplitBatches
from ascendspeed.training.engines import Engine
from ascendspeed.training.setup import Start
from ascendspeed.utils.atomic import replace_file
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

TENSOR = "logprobs"
CHANGED = {"weights": "other weights than those at the start of this run", "data": "other data"}
"""Keys of the metadata that must agree -> description of a difference."""


def attach(run: Run, grid: ProcessGrid, engine: Engine, batches: BatchFunction, start: Start) -> None:
    """Gives every sample the log-probabilities of its answers under the reference weights, if the loss needs
    them from a file; computes files that do not exist. Collective. Raises `UserError`."""
    if not run.preference.needs_reference or run.lora.lora_rank:
        return
    if not isinstance(batches, SplitBatches):
        raise UserError(
            f"--loss {run.preference.loss} keeps log-probabilities of the reference beside .bin/.idx "
            "files, and "
            "these data are tokenized in training: run tools/preprocess_data.py, or train adapters "
            "(--lora-rank)"
        )
    computed: dict[Path, np.ndarray] = {}
    for samples in batches.splits.values():
        for source in samples.sources:
            assert isinstance(source, PackedPairs)
            path = _path(run, source.prefix)
            if path not in computed:
                computed[path] = _load_or_compute(run, grid, engine, source, path, start)
            source.set_reference(computed[path], str(path))


def _path(run: Run, prefix: str) -> Path:
    folder = run.data.data_cache_path
    return (
        Path(folder, f"{Path(prefix).name}_reference.safetensors")
        if folder
        else Path(f"{prefix}_reference.safetensors")
    )


def _load_or_compute(
    run: Run, grid: ProcessGrid, engine: Engine, source: PackedPairs, path: Path, start: Start
) -> np.ndarray:
    """Log-probabilities [pairs, 2] of all pairs of a dataset."""
    facts = {"weights": start.reference_fingerprint or "", "data": hash_dataset(source.prefix)}
    exists = grid.all_gather_object(path.is_file())
    if any(exists) != all(exists):
        raise UserError(f"{path}: {exists.count(False)} of {len(exists)} ranks do not see this file")
    if not all(exists):
        if start.resume:
            raise UserError(
                f"{path} is missing: the run compares with the weights from before its first iteration; "
                "restore "
                "the file, or start a new run with --finetune"
            )
        logprobs = _compute(run, grid, engine, source)
        if grid.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, save({TENSOR: logprobs}, facts | {"dtype": run.optim.dtype}))
            logger.info(f" reference log-probabilities of {len(logprobs):,} pairs in {path}")
        grid.barrier()
    return _read(path, facts)


def _read(path: Path, expected: dict[str, str]) -> np.ndarray:
    try:
        with safe_open(path, "numpy") as file:
            facts, logprobs = file.metadata() or {}, file.get_tensor(TENSOR)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged: {error}; remove it, and a new run computes it again") from error
    for key, description in CHANGED.items():
        if facts.get(key) != expected[key]:
            raise UserError(
                f"{path} was computed from {description}; remove it, and a new run computes it again, or "
                "name "
                "another folder by --data-cache-path"
            )
    return logprobs


def _compute(run: Run, grid: ProcessGrid, engine: Engine, source: PackedPairs) -> np.ndarray:
    """Scores every pair that fits into a row, with the weights that the engine holds."""
    rows = source.repacked(FirstFit())
    logger.info(f"computing reference log-probabilities: {rows.note}")
    logprobs = np.full((len(rows.documents.lengths), 2), np.nan, np.float32)
    scored = []
    for batches, numbers in _batches(run, grid, rows):
        scores = engine.score(batches)
        if scores and grid.tp_rank == 0 and grid.cp_rank == 0:
            values = np.concatenate([score.cpu().numpy() for score in scores]).reshape(-1, 2)
            scored.append((np.concatenate(numbers), values))
    for of_rank in grid.all_gather_object(scored):
        for pairs, values in of_rank:
            logprobs[pairs] = values
    return logprobs


def _batches(
    run: Run, grid: ProcessGrid, rows: PackedPairs
) -> Iterator[tuple[list[Batch], list[np.ndarray]]]:
    """This rank's micro-batches over all rows, as many at once as a step has, and their pairs; the last rows
    fill up the last ones."""
    size, count = run.train.micro_batch_size, run.train.global_batch_size
    assert count is not None
    for first in range(0, rows.samples_per_epoch, count):
        batches, numbers = [], []
        for begin in micro_batch_starts(first, count, size, grid.dp_rank, grid.dp):
            chosen = [min(row, rows.samples_per_epoch - 1) for row in range(begin, begin + size)]
            batches.append(micro_batch.stack([rows.row(row) for row in chosen]))
            numbers.append(np.concatenate([rows.pairs_of(row) for row in chosen]))
        yield batches, numbers
