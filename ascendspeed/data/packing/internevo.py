"""InternEvo's packings, by name: all documents of a file one after the other, cut into rows wherever these end.

The documents of a file are shuffled once, by a seed of its own that never changes, and what does not fill the last row is left
out. A row is what InternEvo calls a pack, its length (`packed_length`) is --seq-length, and `max_length_per_sample` is
--max-segment-length.
"""

from functools import partial

import numpy as np

from ascendspeed.config.schema import DataConfig
from ascendspeed.data.packing.algorithms import PACKERS, Packer, Packing
from ascendspeed.utils.errors import UserError

SEED = 1024
"""InternEvo's, of the order of the documents."""
CUT, WHOLE = "internevo-cut", "internevo-whole"


def packer(data: DataConfig, default: str) -> Packer:
    """The one of `--packing`, or `default`. Raises `UserError` for a --max-segment-length that means nothing there."""
    name, segment = data.packing or default, data.max_segment_length
    if name in PACKERS:
        if segment is not None:
            raise UserError(
                f"--max-segment-length {segment} belongs to --packing {CUT} and {WHOLE}, not to {name}; leave it out"
            )
        return PACKERS[name]
    segment = segment or data.seq_length
    if name == CUT:
        return Packer(
            partial(split_contiguous, segment=segment), goes_on=True, keeps=True, seed=SEED, apart=True
        )
    if data.seq_length % segment:
        raise UserError(
            f"--packing {WHOLE}: --seq-length {data.seq_length} is not a multiple of --max-segment-length {segment}"
        )
    return Packer(split_contiguous, keeps=True, segment=segment, seed=SEED, apart=True)


def split_contiguous(lengths: np.ndarray, row: int, segment: int | None = None) -> Packing:
    """Documents one after the other, cut where a row ends, and their parts in a row after every `segment` tokens.

    `lengths`: [documents], above 0; `row`: tokens of a row. A last row that is not full is left out.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    rows = int(ends[-1]) // row if len(ends) else 0
    begins, edges = ends - lengths, np.arange(rows, dtype=np.int64) * row
    parts = np.union1d(begins[begins < rows * row], edges)  # of one document in one row
    sizes = np.diff(parts, append=rows * row)
    counts = -(-sizes // (segment or row))
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    first = np.repeat(parts, counts) + within * (segment or row)
    last = np.minimum(first + (segment or row), np.repeat(parts + sizes, counts))
    documents = np.searchsorted(ends, first, side="right")
    bounds = np.append(np.searchsorted(first, edges), len(first))
    return Packing(bounds, documents, first - begins[documents], last - begins[documents])
