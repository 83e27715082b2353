"""The pre-training recipe as a command, with tiny values."""

import os
import subprocess
import sys
from pathlib import Path

from ascendspeed.training.metrics_log import EvalLine, TrainLine, read_lines
from helpers import launch

ITERS, STOP = 6, 3


SIZES = {
    "SEQ_LENGTH": "64",
    "MICRO_BATCH": "2",
    "GLOBAL_BATCH": "4",
    "TRAIN_ITERS": str(ITERS),
    "LR_DECAY_ITERS": str(ITERS),
    "LR": "1e-2",
}


def command(*words: str, **env: str) -> subprocess.CompletedProcess:
    """Runs a command in the repository's root with this Python's programs first in the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        words,
        env=launch.environment(PATH=path, **env),
        cwd=launch.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def prepare_tokens(work: Path, rows: int) -> None:
    """Writes text and a tokenizer to `work`/data, and its tokens as `work`/alpaca_text_document."""
    data = work / "data"
    launch.must("examples/intern/make_quickstart_data.py", "--output-dir", data, "--rows", rows)
    launch.must(
        "tools/preprocess_data.py",
        *("--input", data / "train.parquet", "--output-prefix", work / "alpaca", "--append-eod"),
        *("--tokenizer-type", "PretrainedFromHF", "--tokenizer-name-or-path", data / "tokenizer"),
        *("--handler-name", "AlpacaPretrainHandler", "--workers", 2),
    )


def recipe(work: Path, name: str, load: Path, *flags: str, **env: str) -> subprocess.CompletedProcess:
    """The 7B recipe with tiny values on two processes, TP 2; checkpoints in NAME, log in NAME.log."""
    values = SIZES | {
        "MODEL": "internlm-tiny",
        "DTYPE": "fp32",
        "TP": "2",
        "NPROC": "2",
        "EVAL_INTERVAL": "3",
        "EVAL_ITERS": "2",
    }
    values |= {"DATA": str(work / "alpaca_text_document"), "TOKENIZER_PATH": str(work / "data" / "tokenizer")}
    values |= {
        "CHECKPOINT": str(load),
        "SAVE": str(work / name),
        "SAVE_INTERVAL": "100",
        "MASTER_PORT": str(launch.free_port()),
    }
    script = "examples/intern/pretrain_internlm_7b_zero.sh"
    return command("bash", script, "--log-dir", str(work / f"{name}.log"), *flags, **(values | env))


def lines(work: Path, name: str) -> list[TrainLine | EvalLine]:
    return list(read_lines(work / f"{name}.log" / "train.log"))
