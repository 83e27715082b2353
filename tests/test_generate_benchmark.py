"""The benchmark of generation: timing, batch sizes and its table."""

import contextlib
import importlib.util
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import launch, oracle, recipes
from helpers.chat import UNUSED, piecewise, vocabulary
from helpers.generate_command import MODEL, folder, hf_continuation, records, reference, run
from helpers.log_lines import log_lines
from safetensors.torch import save_file

from ascendspeed.inference import args, benchmark_report, prompts
from ascendspeed.inference import stdin as questions
from ascendspeed.inference.benchmark_report import (
    BatchOutOfMemory,
    GenerationTimer,
    GenerationTiming,
    find_largest_batch,
    parse_pairs,
)
from ascendspeed.inference.output import AnswerWriter
from ascendspeed.models import families
from ascendspeed.models.families import FAMILIES
from ascendspeed.tokenization import tokenizer
from ascendspeed.tokenization.chat import ChatFormat, Message
from ascendspeed.utils.errors import UserError


def test_clock_and_table(tmp_path):
    ticks = iter([0.0, 0.5, 2.5])
    clock = GenerationTimer(lambda: next(ticks))
    assert not any(clock.on_token(row, 1) for _ in range(3) for row in range(4))
    timing = clock.timing(4, 100, 5)
    assert timing.row == (4, 100, 5, 2.5, 500.0, 500.0, 8.0, 8.0)
    assert GenerationTiming(1, 8, 1, 0.5, 0.5).row[5:] == (0.0, 0.0, 2.0)
    text = benchmark_report.write_report(
        [timing, GenerationTiming(2, 8, 2, 0.25, 0.125)], tmp_path / "new", "tiny, fp32"
    )
    assert text.splitlines()[0] == "tiny, fp32"
    assert text.splitlines()[2].split() == ["4", "100", "5", "2.50", "500.00", "500.00", "8.00", "8.00"]
    assert (tmp_path / "new/performance.csv").read_text().splitlines()[
        2
    ] == "2,8,2,0.25,125.0,125.0,16.0,16.0"
    assert (tmp_path / "new/performance.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "new").iterdir())) == 3


@pytest.mark.parametrize(("low", "high"), [(1, 64), (1, 1), (5, 64), (3, 7), (1, 2048)])
def test_largest_batch(low, high):
    """Compared with trying all sizes, for every limit and memory size."""
    for fits in (0, 1, 2, 5, 6, 7, 31, 64, 100):
        for memory in (4, 50, 5000):
            tried = []

            def measure(batch, memory=memory, tried=tried):
                tried.append(batch)
                if batch > memory:
                    raise BatchOutOfMemory
                return GenerationTiming(batch, 8, 3, 0.0 + 2 * batch, 0.0)

            with log_lines() as lines:
                best = find_largest_batch(low, high, fits, measure)
            expected = min(fits, memory, high)
            assert (best.batch if best else None) == (expected if expected >= low else None)
            assert len(tried) == len(set(tried)) <= 2 * max(1, high.bit_length())
            assert any("out of memory" in line for line in lines) == any(batch > memory for batch in tried)


def test_pairs():
    assert parse_pairs("[[2048,2048],[256, 1]]", "x") == [(2048, 2048), (256, 1)]
    for wrong in (
        "",
        "[]",
        "[[1]]",
        "[[1,2,3]]",
        "[1,2]",
        "[[0,1]]",
        "[[1,true]]",
        "[[1.5,2]]",
        "{}",
        "[[1,2]",
        "5",
    ):
        with pytest.raises(UserError, match=r"--performance .* is not a list of pairs of integers"):
            parse_pairs(wrong, "--performance")


def test_benchmark_command(cpu, folder, tmp_path, capsys):
    """The command needs no tokenizer, and writes only the table to stdout."""
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, weights)
    spec = importlib.util.spec_from_file_location("benchmark", launch.ROOT / "tasks/inference/benchmark.py")
    benchmark = sys.modules["benchmark"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    flags = ["--load", str(weights), "--device", "cpu", "--output-dir", str(tmp_path / "out")]
    for typed, rows in (
        (["--performance", "[[4,3],[8,2]]", "--batch-size", "2"], [("2", "4", "3"), ("2", "8", "2")]),
        (["--performance-maxbs", "[[4,2]]", "--ranges", "[[1,3]]", "--limit-ms", "1e6"], [("3", "4", "2")]),
        (["--performance", "[[4,2]]", "--fp16"], [("1", "4", "2")]),
    ):
        job, notes = benchmark.resolve([*flags, *typed], 1)
        benchmark.work(job, cpu, notes)
        out, err = capsys.readouterr()
        assert out == (tmp_path / "out/performance.txt").read_text()
        assert [tuple(line.split()[:3]) for line in out.splitlines()[2:]] == rows
        assert f"{weights}: internlm, {'fp16' if '--fp16' in typed else 'fp32'}, on cpu" in err
