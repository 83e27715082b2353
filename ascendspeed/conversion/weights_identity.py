"""Hashes that identify a model's weights, independent of format, layout and sharding, at three levels.

| function | reads | equal for |
|---|---|---|
| `sampled` | a few rows of each matrix, as fp32 | the same weights, in practice; fast for any size |
| `full_values` | every value, as fp32 | exactly the same values, whatever the type on disk |
| `full_bytes` | every byte | exactly the same values and types on disk |

`sampled` is stored with LoRA adapters and in training checkpoints, `full_values` in `origin.json`,
`full_bytes` in evaluation reports: none of the three may change.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice

import torch
from torch import Tensor

from ascendspeed.checkpoint.discovery import Readers
from ascendspeed.config.schema import TRAINING_FIELDS
from ascendspeed.conversion.checkpoint_reader import THREADS, CheckpointReader
from ascendspeed.models import param_mapping
from ascendspeed.models.param_mapping import Parameter, Slice2D

EDGE_ROWS = 16
"""Rows that `sampled` reads at each end of a vocabulary."""
ADDED_FIELDS = {
    "qk_layernorm": False,
    "rope_original_max_position_embeddings": None,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_beta_fast": 32.0,
    "rope_beta_slow": 1.0,
    "rope_attention_factor": None,
    "reward_head": False,
    "scored_token_id": None,
}
"""Fields that are younger than recorded fingerprints -> their defaults, which do not count."""
SAMPLED_PARTS = 8
"""Parts of a matrix for `sampled`, which reads the row at the beginning of each."""
CHUNK = 1 << 24
"""Elements that `full_values` converts at a time."""


def sampled(reader: CheckpointReader) -> str:
    """SHA-256 of the architecture and of some rows of every parameter.

    Tells apart models of one architecture, and weights before and after further training or a merge of
    adapters.
    """
    architecture = _architecture(reader, without=("family", *TRAINING_FIELDS))
    sha = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for parameter in param_mapping.parameters(reader.config):
        sha.update(f"{parameter.name} {list(parameter.shape)}\n".encode())
        for rows in _sampled_rows(parameter):
            sha.update(reader.read_block(parameter.name, rows).float().contiguous().numpy().tobytes())
    return sha.hexdigest()


def _sampled_rows(parameter: Parameter) -> Iterator[Slice2D]:
    """A whole vector; the first and the last row of a matrix, and rows at equal distances in between.

    More rows at both ends of a vocabulary (embedding, head), where tokens are added to a model later.
    """
    if len(parameter.shape) == 1:
        yield Slice2D(0, 0, 0, 0, parameter.shape[0], 1)
        return
    rows, columns = parameter.shape
    edge = min(rows, EDGE_ROWS if parameter.mapping.partition == "vocab" else 1)
    yield Slice2D(0, 0, 0, 0, edge, columns)
    for part in range(1, SAMPLED_PARTS):
        yield Slice2D(rows * part // SAMPLED_PARTS, 0, 0, 0, 1, columns)
    yield Slice2D(rows - edge, 0, 0, 0, edge, columns)


def full_values(reader: CheckpointReader) -> str:
    """SHA-256 of every parameter's name, shape and fp32 values."""
    sha = hashlib.sha256()
    for name, tensor in reader.tensors():
        sha.update(f"{name} {list(tensor.shape)}\n".encode())
        for chunk in tensor.reshape(-1).split(CHUNK):
            sha.update(memoryview(chunk.to(torch.float32).contiguous().numpy()))
    return sha.hexdigest()


def full_bytes(reader: CheckpointReader, readers: Readers | None = None) -> str:
    """SHA-256 of the architecture and of every parameter's name, type, shape and bytes.

    `readers`: ranks that call this together, each hashing its share of the parameters; None: this process
    hashes all.
    """
    readers = readers or Readers()
    tensors = reader.tensors(readers.rank, readers.world)
    digests: list[list[str]] = []
    with ThreadPoolExecutor(THREADS) as pool:
        while batch := list(islice(tensors, THREADS)):  # a few at a time: all would not fit into memory
            digests += pool.map(_tensor_digest, batch)
    gathered = [json.loads(text) for text in readers.gather([json.dumps(digest) for digest in digests])]
    by_name = {digest[0]: digest for digest in gathered}
    ordered = [by_name[parameter.name] for parameter in param_mapping.parameters(reader.config)]
    architecture = _architecture(reader, without=tuple(TRAINING_FIELDS))
    return hashlib.sha256(json.dumps([architecture, ordered], sort_keys=True).encode()).hexdigest()


def _architecture(reader: CheckpointReader, without: tuple[str, ...]) -> dict[str, object]:
    fields = asdict(reader.config)
    defaults = {name for name, default in ADDED_FIELDS.items() if fields[name] == default}
    return {name: value for name, value in fields.items() if name not in without and name not in defaults}


def _tensor_digest(named: tuple[str, Tensor]) -> list[str]:
    name, tensor = named
    return [name, str(tensor.dtype), str(list(tensor.shape)), digest_blocks([tensor])]


def digest_blocks(blocks: Iterable[Tensor]) -> str:
    """SHA-256 of the bytes of one tensor, row-major and little-endian, that is read in blocks of rows."""
    sha = hashlib.sha256()
    for block in blocks:
        sha.update(memoryview(block.contiguous().flatten().view(torch.uint8).numpy()))
    return sha.hexdigest()
