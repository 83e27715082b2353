"""Documents with masks on disk, and data sets of them."""

import numpy as np

from ascendspeed.config.schema import DataConfig
from ascendspeed.data.dataset import build_splits
from ascendspeed.data.indexed.masked_pair import MaskedPairWriter

SEQ, SEED, VOCAB = 16, 7, 50_000


def write(prefix, count, longest=30, seed=0, start=0):
    """Documents of 2 to `longest` ids, all different; the second half of each is supervised. Returns (ids,
    mask) of each."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, longest + 1, count).astype(np.int32)
    tokens = np.arange(start, start + lengths.sum(), dtype=np.int32)
    supervised = np.concatenate([np.arange(n) >= n // 2 for n in lengths])
    with MaskedPairWriter(prefix) as writer:
        writer.add(tokens, lengths, supervised)
        writer.commit({"tokens": writer.tokens, "max_token": int(tokens.max()), "vocab_size": VOCAB})
    cuts = np.cumsum(lengths)[:-1]
    return list(
        zip(
            [t.tolist() for t in np.split(tokens, cuts)],
            [m.tolist() for m in np.split(supervised, cuts)],
            strict=True,
        )
    )


def build(prefix, names=("train",), **options):
    return build_splits(
        DataConfig(**({"data_path": (str(prefix),), "seq_length": SEQ, "split": "1,0,0"} | options)),
        SEED,
        VOCAB,
        names,
    )
