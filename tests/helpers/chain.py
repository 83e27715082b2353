"""The pre-training recipe with tiny values, as a command and without its launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path

from ascendspeed.training.metric_lines import EvalLine, TrainLine, read_lines
from helpers import launch, recipes

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


RECIPE = "examples/intern/pretrain_internlm_7b_zero.sh"


def values_of(work: Path, name: str, load: Path, **env: str) -> dict[str, str]:
    """The 7B recipe's variables: tiny values, two processes, TP 2; checkpoints in NAME."""
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
    return values | env


def recipe(work: Path, name: str, load: Path, *flags: str, **env: str) -> subprocess.CompletedProcess:
    """The 7B recipe with tiny values under the real launcher; its log in NAME.log."""
    words = ("bash", RECIPE, "--log-dir", str(work / f"{name}.log"), *flags)
    return command(*words, **values_of(work, name, load, **env))


PARSER = """
import json, sys
from deepspeed.launcher.runner import parse_args
words = parse_args(sys.argv[1:])
print(json.dumps([words.user_script, words.num_gpus, words.user_args]))
"""


def forked_recipe(work: Path, name: str, load: Path, **env: str) -> str:
    """Output of rank 0 of `recipe`, whose launcher is a stand-in: ranks forked from the server start at once.

    Must succeed; the words for the launcher must be what DeepSpeed's own parser takes for two ranks.
    """
    (folder := work / f"{name}.ranks").mkdir()
    program = f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/words\n'
    recipes.program(folder / "bin", "deepspeed", program)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    words = ("bash", RECIPE, "--log-dir", str(work / f"{name}.log"))
    done = subprocess.run(
        words,
        env=launch.environment() | values_of(work, name, load, **env) | {"PATH": path},
        cwd=launch.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    given = (folder / "words").read_text().splitlines()
    (parser := folder / "parse.py").write_text(PARSER)
    flags = given[given.index("pretrain_intern.py") + 1 :]
    assert json.loads(launch.must(parser, *given)) == ["pretrain_intern.py", 2, flags]
    launch.forked(2, launch.ROOT / "pretrain_intern.py", flags, folder)
    return (folder / "rank0.log").read_text()


def lines(work: Path, name: str) -> list[TrainLine | EvalLine]:
    return list(read_lines(work / f"{name}.log" / "train.log"))
