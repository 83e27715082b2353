"""Rates of fp32 matrix products by torch and by oneDNN: the limit of what oneDNN can gain.

    python benchmarks/product_rates.py --out benchmarks/results/product-rates-cpu.md

`train_step.py` and `generate.py` append the tables of their own products.
"""

import datetime
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from ascendspeed.cli import parser
from ascendspeed.config.schema import ModelConfig
from ascendspeed.utils import errors

ROUNDS = 5
MEASURED_BYTES = 1 << 25
"""Size of the weights that products of few rows read in turn, as a step of decoding reads all of a model."""
SHAPES = ((2752, 512), (512, 1376), (24064, 512), (4096, 1024))


@dataclass(frozen=True)
class Options:
    """Flags of this benchmark."""

    tokens: int = 1024
    """Rows of the products of training."""
    batches: tuple[int, ...] = (1, 4, 16)
    """Rows of the products of decoding."""
    threads: int | None = None
    """CPU threads; None: torch's default. Use 1 on a shared machine."""
    out: Annotated[Path | None, parser.output_flag("out")] = None
    """Markdown file to write; None: print only."""


def weights_of(model: ModelConfig) -> list[tuple[int, int]]:
    """Returns the (outputs, inputs) of the linears of a dense model: qkv, projection, MLP, output layer."""
    width, hidden, ffn = model.head_dim, model.hidden_size, model.ffn_hidden_size
    qkv = width * (model.num_attention_heads + 2 * model.kv_heads)
    projection = (hidden, width * model.num_attention_heads)
    return [(qkv, hidden), projection, (2 * ffn, hidden), (hidden, ffn), (model.vocab_size, hidden)]


def training_table(shapes: list[tuple[int, int]], tokens: int) -> str:
    """Returns a table of the three products of training, in GFLOP/s of CPU time."""
    import torch
    from torch.nn import functional as F

    from ascendspeed.distributed import onednn

    lines = ["| tokens x inputs x outputs | product | torch | oneDNN | ratio |", "|---|---|---|---|---|"]
    for outputs, inputs in shapes:
        x, weight, gradient = (
            torch.randn(tokens, inputs),
            torch.randn(outputs, inputs),
            torch.randn(tokens, outputs),
        )
        products = {
            "forward": (x, weight),
            "input gradient": (gradient, weight.t()),
            "weight gradient": (gradient.t(), x.t()),
        }
        for name, pair in products.items():
            sides = [lambda pair=pair: F.linear(*pair), lambda pair=pair: onednn.linear(*pair)]
            lines.append(_line(f"{tokens} x {inputs} x {outputs} | {name}", tokens * inputs * outputs, sides))
    return "\n".join(lines)


def decoding_table(shapes: list[tuple[int, int]], batches: tuple[int, ...]) -> str:
    """Returns a table of the products of decoding, plain or packed weights, in GFLOP/s of CPU time."""
    import torch
    from torch.nn import functional as F

    from ascendspeed.distributed import onednn

    lines = ["| rows x inputs x outputs | torch | oneDNN, packed | ratio |", "|---|---|---|---|"]
    for outputs, inputs in shapes:
        count = -(-MEASURED_BYTES // (4 * outputs * inputs))
        plain = [torch.randn(outputs, inputs) for _ in range(count)]
        packed = [onednn.pack(weight) for weight in plain]
        for rows in batches:
            x = torch.randn(rows, inputs)
            sides = [
                lambda x=x, plain=plain: [F.linear(x, weight) for weight in plain],
                lambda x=x, packed=packed: [onednn.linear(x, weight) for weight in packed],
            ]
            lines.append(_line(f"{rows} x {inputs} x {outputs}", rows * inputs * outputs * count, sides))
    return "\n".join(lines)


def _line(label: str, multiplications: int, sides: list[Callable[[], Any]]) -> str:
    """Measures both sides in turns after a warm-up; returns a row of a table with the medians."""
    import torch

    seconds: list[list[float]] = [[] for _ in sides]
    with torch.inference_mode():
        for number in range(ROUNDS + 1):
            for side, times in zip(sides, seconds, strict=True):
                start = time.process_time()
                side()
                if number:
                    times.append(time.process_time() - start)
    torchs, onednns = (2e-9 * multiplications / statistics.median(times) for times in seconds)
    return f"| {label} | {torchs:.0f} | {onednns:.0f} | {onednns / torchs:.2f} |"


def main() -> None:
    """Measures, prints and writes the report."""
    options = parser.parse(Options, description=__doc__ or "")
    from ascendspeed.distributed import device as devices

    here = devices.prepare("cpu")
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    units = [unit for unit in ("avx512f", "avx2") if unit in devices.cpu_info().get("flags", "").split()]
    text = (
        f"# Rates of fp32 matrix products\n\n{datetime.date.today()}, {here.name} ({', '.join(units)}), "
        f"{torch.get_num_threads()} threads; torch {version('torch')}. GFLOP/s of CPU time, medians of "
        f"{ROUNDS} rounds in turns.\n\n"
        f"## Training\n\n{training_table(list(SHAPES), options.tokens)}\n\n"
        f"## Decoding\n\n{decoding_table(list(SHAPES), options.batches)}\n"
    )
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    errors.run(main)
