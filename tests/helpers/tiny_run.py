"""A training run of a few seconds: random tokens, a model of one layer, and its flags."""

from pathlib import Path

import numpy as np

from ascendspeed.data.indexed.megatron_pair import PairWriter


def token_pair(folder: Path) -> Path:
    """Writes 100 documents of 40 random tokens below 64; returns the prefix of the pair."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    with PairWriter(folder / "data", np.dtype(np.uint16)) as pair:
        pair.add(generator.integers(3, 64, 4000).astype(np.uint16), np.full(100, 40, np.int32))
        pair.commit({"tokens": pair.tokens, "max_token": 63})
    return folder / "data"


def flags(folder: Path, iterations: int = 2) -> list[str]:
    """Flags of the run, whose data and log are in `folder`."""
    sizes = "--model internlm-tiny --num-layers 1 --vocab-size 64 --seq-length 32 --micro-batch-size 2"
    data = ["--data-path", str(token_pair(folder / "tokens")), "--split", "100,0,0"]
    length = ["--train-iters", str(iterations), "--lr", "1e-2"]
    return [*sizes.split(), *data, *length, "--device", "cpu", "--log-dir", str(folder / "logs")]
