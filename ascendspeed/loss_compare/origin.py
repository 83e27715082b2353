"""What a run begins with: its seed, and hashes of its weights and of its data, in `origin.json` beside its log.

The hash of weights is that of the values of the full tensors by our names: the same for a Hugging Face directory and for rank files
of any layout and type that hold them exactly. So the two halves of a comparison may be made on machines that share nothing.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ascendspeed.config.schema import Run, from_dict
from ascendspeed.loss_compare import console_logs
from ascendspeed.utils import safe_io
from ascendspeed.utils.atomic import write_file
from ascendspeed.utils.errors import UserError

NAME = "origin.json"
CHUNK = 1 << 24


def of_log(log: str | Path) -> dict[str, str]:
    """Seed and hashes of what the run of a log of ours says that it began with. Raises `UserError`."""
    try:
        with open(log, encoding="utf-8", errors="replace") as lines:
            curve = console_logs.read(str(log), lines)
    except OSError as error:
        raise UserError(f"{log}: cannot read this log: {error.strerror}") from error
    if not curve.config or "train" not in curve.config:
        raise UserError(f"{log} has no line `run: ...`: it is no log of this project")
    run = from_dict(dict(curve.config))
    return {
        "seed": str(run.train.seed),
        "weights": _weights(run, _generator(curve.device or "")),
        "data": _data(run),
    }


def write(log: str | Path) -> Path:
    """Leaves origin.json beside a log."""
    path = Path(log).parent / NAME
    write_file(path, json.dumps(of_log(log), indent=2) + "\n")
    return path


def check_same(*logs: str, needed: bool = False) -> dict[str, str] | None:
    """What all these runs began with; None when one of them has no origin.json, unless they are `needed`.

    Raises `UserError` naming what is not the same.
    """
    paths = [(Path(log) if Path(log).is_dir() else Path(log).parent) / NAME for log in logs]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing:
        if needed:
            raise UserError(
                f"{missing} is missing: `python examples/intern/parity_origin.py LOG` makes it where the run was made"
            )
        return None
    begins = [safe_io.read_table(path) for path in paths]
    for path, other in zip(paths[1:], begins[1:], strict=True):
        for name in ("seed", "weights", "data"):
            if begins[0].get(name) != other.get(name):
                said = f"{_short(begins[0], name)} in {paths[0]}, {_short(other, name)} in {path}"
                raise UserError(f"the runs began with another {name}: {said}")
    return begins[0]


def _short(begin: dict[str, Any], name: str) -> str:
    return str(begin.get(name))[:40]


def _generator(device: str) -> str:
    """`cuda (Some GPU), nccl; ...` -> `cuda Some GPU`: from one seed every such device draws numbers of its own, CPUs the same."""
    kind, _, name = device.partition("), ")[0].partition(" (")
    return kind if kind == "cpu" else f"{kind} {name}"


def _weights(run: Run, generator: str) -> str:
    if not run.train.load:
        drawn = json.dumps([asdict(run.model), run.train.seed, generator])
        return f"random on {generator}: {hashlib.sha256(drawn.encode()).hexdigest()}"
    import torch

    from ascendspeed.checkpoint.paths import looks_like_checkpoint
    from ascendspeed.conversion.formats.registry import open_reader

    if looks_like_checkpoint(run.train.load) and not run.train.finetune:
        raise UserError(
            f"--load {run.train.load} is a training checkpoint: begin both runs with weights, or with --finetune"
        )
    sha = hashlib.sha256()
    for name, tensor in open_reader(run.train.load).tensors():
        sha.update(f"{name} {list(tensor.shape)}\n".encode())
        for piece in tensor.reshape(-1).split(CHUNK):
            sha.update(memoryview(piece.to(torch.float32).contiguous().numpy()))
    return f"sha256: {sha.hexdigest()}"


def _data(run: Run) -> str:
    from ascendspeed.data.dataset import dataset_files, parse_blend

    sha = hashlib.sha256()
    for weight, prefix in parse_blend(run.data.data_path):
        sha.update(f"{weight}\n".encode())
        for path in dataset_files(prefix):
            try:
                with open(path, "rb") as file:
                    sha.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise UserError(
                    f"{path}: cannot read the data that the run used: {error.strerror}"
                ) from error
    return f"sha256: {sha.hexdigest()}"
