"""Experiment trackers of `--report-to`, through the tracker classes of accelerate."""

import importlib.util
import json
import logging
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ascendspeed.config.schema import Run, TrainConfig, to_dict
from ascendspeed.training.metric_lines import MetricsLine, scalars
from ascendspeed.utils.atomic import write_file
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import read_json_object

logger = logging.getLogger(__name__)

IDENTITY_FILE = "trackers.json"
"""Beside the log: what a resumed run continues."""
PROJECT = "intern"


def names_of(train: TrainConfig) -> list[str]:
    """Trackers of a run, without TensorBoard; --wandb-project alone asks for W&B, as in Megatron-LM."""
    names = [name for name in dict.fromkeys(train.report_to) if name != "tensorboard"]
    return [*names, "wandb"] if train.wandb_project and "wandb" not in names else names


def events_dir(train: TrainConfig) -> str | None:
    """Folder of the TensorBoard events; None: none are written."""
    if train.tensorboard_dir is None and "tensorboard" in train.report_to:
        return str(Path(train.log_dir, "tensorboard"))
    return train.tensorboard_dir


def check_installed(names: list[str]) -> None:
    """Raises UserError for a tracker whose package is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report-to {name}: the package is missing: pip install {name}")


class TrackerSink:
    """Writes metrics to one tracker."""

    def __init__(self, tracker: Any, settings: Mapping[str, Any]) -> None:
        """Starts the tracker; its run receives the settings."""
        self.name = f"--report-to {tracker.name}"
        self.tracker = tracker
        tracker.start()
        try:
            tracker.store_init_configuration(dict(settings))
        except Exception as error:  # the metrics matter more
            logger.warning(f"{self.name}: the settings were not stored: {_one_line(error)}")

    def write(self, line: MetricsLine) -> None:
        """Sends the numbers of a line."""
        numbers = {_legal(tag): value for tag, value in scalars(line)}
        self.tracker.log(numbers, step=line.iteration)

    def close(self) -> None:
        """Ends the tracker's run."""
        self.tracker.finish()


def open_trackers(run: Run, step: int) -> list[TrackerSink]:
    """Starts the trackers of a run, in the same runs as before if it is resumed (`step` above 0).

    A tracker that fails is left out with a warning.
    """
    names = names_of(run.train)
    if not names:
        return []
    path = Path(run.train.log_dir, IDENTITY_FILE)
    identity = _identity(path, resumed=step > 0)
    sinks = []
    for name in names:
        try:
            sink = TrackerSink(_create(name, run.train, identity), _flat(to_dict(run)))
        except Exception as error:  # a service that is down must not end the training
            logger.warning(f"--report-to {name}: {_one_line(error)}; nothing is written there")
            continue
        if name == "mlflow":
            identity["mlflow_run_id"] = sink.tracker.tracker.info.run_id
        sinks.append(sink)
    write_file(path, json.dumps(identity) + "\n")
    return sinks


def _identity(path: Path, resumed: bool) -> dict[str, Any]:
    """Identifiers of the trackers' runs: those of the run that is resumed, or new ones."""
    if resumed and path.is_file():
        return read_json_object(path)
    return {"id": secrets.token_hex(8)}


def _options(name: str, train: TrainConfig, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a tracker that name its run, so that a resumed one continues it."""
    title = train.wandb_exp_name or f"run-{identity['id']}"
    options: dict[str, dict[str, Any]] = {
        "wandb": {
            "id": identity["id"],
            "resume": "allow",
            "name": train.wandb_exp_name,
            "entity": train.wandb_entity,
            "dir": train.wandb_save_dir or train.log_dir,
        },
        "swanlab": {"id": identity["id"], "resume": "allow", "experiment_name": title},
        "trackio": {"name": title, "resume": "allow"},
        "mlflow": {"run_id": identity.get("mlflow_run_id"), "run_name": title},
    }
    return {key: value for key, value in options.get(name, {}).items() if value is not None}


def _create(name: str, train: TrainConfig, identity: Mapping[str, Any]) -> Any:
    """Returns accelerate's tracker of a name, which belongs to this rank alone."""
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState(cpu=True)  # its logger needs it; the process group exists already, and the device stays
    cls = LOGGER_TYPE_TO_CLASS[name]
    folder = [str(train.log_dir)] if cls.requires_logging_directory else []
    local = type(cls.__name__, (cls,), {"main_process_only": False})
    return local(train.wandb_project or PROJECT, *folder, **_options(name, train, identity))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train": {"lr": 1}}` -> `{"train.lr": 1}`, with lists as text."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
    return flat


def _legal(tag: str) -> str:
    """Tag in the characters that all trackers take; MLflow refuses parentheses and commas."""
    return re.sub(r"[^\w\-. :/]", "_", re.sub("[()]", "", tag))


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
