"""Reads the loss curve of a run from a console log, TensorBoard events, JSON or CSV, or the folder that
contains them.
"""

from dataclasses import replace
from pathlib import Path

from ascendspeed.loss_compare import console_logs, record_logs
from ascendspeed.loss_compare.curve import LossCurve
from ascendspeed.utils import safe_io
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import HEAD_BYTES, refuse_compressed

EVENTS = "*tfevents*"
FILE_NAMES = ("train.log", "trainer_state.json", "trainer_log.jsonl", "logging.jsonl")
"""Names of logs in the folder of a run: this project's, the Trainer's, LLaMA-Factory's, swift's."""
UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_log(path: str | Path) -> LossCurve:
    """Reads a log with at least one loss. Raises UserError if it cannot be read or has none."""
    log = _find_log(Path(path))
    curve = _parse(log)
    if not any(step.loss is not None for step in curve.steps):
        raise UserError(
            f"{log}: no training loss in this log; known are console logs of this project, Megatron-LM, "
            "AscendSpeed, MindSpeed, InternEvo, GPT-NeoX, NeMo, MindFormers, XTuner, torchtitan, Hugging "
            "Face's Trainer and DeepSpeed's pipeline engine (DeepSpeed's lines `step=N, skipped=, lr=` have "
            "no loss), trainer_state.json, JSON lines, TensorBoard events and W&B's CSV"
        )
    folder = log if log.is_dir() else log.parent
    if curve.config is None and (folder / "run.json").is_file():
        return replace(curve, config=safe_io.read_json_object(folder / "run.json"))
    return curve


def _find_log(path: Path) -> Path:
    """Returns the log in a folder: train.log or another known file, else the folder for its TensorBoard
    events.
    """
    if not path.exists():
        raise UserError(f"{path}: there is no such log")
    if path.is_dir():
        for name in FILE_NAMES:
            if (path / name).is_file():
                return path / name
        steps = {
            int(number): folder
            for folder in path.glob("checkpoint-*")
            if (number := folder.name.removeprefix("checkpoint-")).isdigit()
            and (folder / "trainer_state.json").is_file()
        }
        if steps:  # the history of a checkpoint includes that of the earlier ones
            return steps[max(steps)] / "trainer_state.json"
        if not any(path.glob(EVENTS)):
            raise UserError(
                f"{path}: neither {', '.join(FILE_NAMES)} nor TensorBoard events in this folder; name "
                "the log itself"
            )
    return path


def _parse(path: Path) -> LossCurve:
    if path.is_dir() or path.match(EVENTS):
        from ascendspeed.loss_compare import tensorboard

        return tensorboard.read_events(path)
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
        refuse_compressed(path, head)
        if head[:2] in UTF16:
            raise UserError(
                f"{path} is UTF-16, as PowerShell's `>` writes it: iconv -f UTF-16 -t UTF-8 makes it readable"
            )
        with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as lines:
            first_line = lines.readline()
            lines.seek(0)
            if record_logs.is_csv(first_line):
                return record_logs.read_csv(path, lines)
            if first_line.lstrip().startswith(("{", "[")) or not first_line.strip():
                curve = record_logs.read_records(path, lines.read())
                lines.seek(0)
                if curve:
                    return curve
            return console_logs.parse_console_log(str(path), lines)
    except OSError as error:
        raise UserError(f"{path}: cannot read this log: {error.strerror}") from error
