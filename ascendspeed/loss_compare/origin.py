"""Origin of a run: its seed and hashes of its weights and data, in `origin.json` beside the log.

The hash of the weights covers the values of the full tensors by Megatron names: a Hugging Face directory and
rank files of any layout and type that hold them exactly have the same hash. So the two runs of a comparison
may be made on machines that share nothing.
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

FILE_NAME = "origin.json"


def origin_of_log(log: str | Path) -> dict[str, str]:
    """Returns seed and hashes of the run that wrote this log of ours. Raises UserError."""
    try:
        with open(log, encoding="utf-8", errors="replace") as lines:
            curve = console_logs.parse_console_log(str(log), lines)
    except OSError as error:
        raise UserError(f"{log}: cannot read this log: {error.strerror}") from error
    if not curve.config or "train" not in curve.config:
        raise UserError(f"{log} has no line `run: ...`: it is not a log of this project")
    run = from_dict(dict(curve.config))
    return {
        "seed": str(run.train.seed),
        "weights": _hash_weights(run, _generator(curve.device or "")),
        "data": _hash_data(run),
    }


def write_origin(log: str | Path) -> Path:
    """Writes origin.json beside a log and returns its path."""
    path = Path(log).parent / FILE_NAME
    write_file(path, json.dumps(origin_of_log(log), indent=2) + "\n")
    return path


def check_same_origin(*logs: str, required: bool = False) -> dict[str, str] | None:
    """Returns the common origin of all runs; None if one of them has no origin.json and it is not `required`.

    Raises UserError naming what differs.
    """
    paths = [(Path(log) if Path(log).is_dir() else Path(log).parent) / FILE_NAME for log in logs]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing:
        if required:
            raise UserError(
                f"{missing} is missing: `python examples/intern/parity_origin.py LOG` writes it on the "
                "machine of the run"
            )
        return None
    origins = [safe_io.read_json_object(path) for path in paths]
    first = origins[0]
    for path, origin in zip(paths[1:], origins[1:], strict=True):
        for name in ("seed", "weights", "data"):
            if first.get(name) != origin.get(name):
                difference = f"{_short(first, name)} in {paths[0]}, {_short(origin, name)} in {path}"
                raise UserError(f"the runs began with another {name}: {difference}")
    return first


def _short(origin: dict[str, Any], name: str) -> str:
    return str(origin.get(name))[:40]


def _generator(device: str) -> str:
    """Names the random generator: `cuda (Some GPU), nccl; ...` -> `cuda Some GPU`.

    Each kind of accelerator draws other numbers from one seed; all CPUs draw the same.
    """
    kind, _, name = device.partition("), ")[0].partition(" (")
    return kind if kind == "cpu" else f"{kind} {name}"


def _hash_weights(run: Run, generator: str) -> str:
    if not run.train.load:
        settings = json.dumps([asdict(run.model), run.train.seed, generator])
        return f"random on {generator}: {hashlib.sha256(settings.encode()).hexdigest()}"
    from ascendspeed.checkpoint.paths import looks_like_checkpoint
    from ascendspeed.conversion import weights_identity
    from ascendspeed.conversion.formats.registry import open_reader

    if looks_like_checkpoint(run.train.load) and not run.train.finetune:
        raise UserError(
            f"--load {run.train.load} is a training checkpoint: begin both runs with weights, or with "
            "--finetune"
        )
    return f"sha256: {weights_identity.full_values(open_reader(run.train.load))}"


def _hash_data(run: Run) -> str:
    from ascendspeed.distributed import device

    device.suppress_megatron_warnings()
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
