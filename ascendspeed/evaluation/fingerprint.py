"""Which model and which tokenizer it was, as hashes that do not depend on how the files are cut."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ascendspeed.checkpoint.discovery import Readers
from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.models import param_mapping
from ascendspeed.tokenization.tokenizer import TOKENIZER_CLASSES

THREADS = 4


def of_model(source: CheckpointReader, readers: Readers | None = None) -> str:
    """SHA-256 of the architecture and of every tensor: equal for a Hugging Face directory and the rank files made of it.

    `readers`: the ranks that call this together, each reading its share of the tensors; None: this process reads all.
    """
    readers = readers or Readers()
    digests = []
    tensors = source.tensors(readers.rank, readers.world)
    with ThreadPoolExecutor(THREADS) as pool:
        while some := list(
            islice(tensors, THREADS)
        ):  # a few at a time: they need not fit into memory together
            digests += pool.map(_digest, some)
    every = {
        name: [name, *more]
        for name, *more in map(json.loads, readers.gather([json.dumps(one) for one in digests]))
    }
    digests = [every[parameter.name] for parameter in param_mapping.parameters(source.config)]
    architecture = {name: value for name, value in asdict(source.config).items() if name != "init_method_std"}
    return hashlib.sha256(json.dumps([architecture, digests], sort_keys=True).encode()).hexdigest()


def _digest(named: tuple[str, Tensor]) -> list[str]:
    name, tensor = named
    view = memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return [name, str(tensor.dtype), str(list(tensor.shape)), hashlib.sha256(view).hexdigest()]


def of_tokenizer(folder: Path) -> str:
    """SHA-256 of the vocabulary that is read there."""
    name = next(name for name in TOKENIZER_CLASSES if (folder / name).is_file())
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()
